"""Lives of studies.digits' process, one for each line of standard input, a JSON object:

    options: of the command line
    notes: the folder that gets what is printed, and each finished run's last checkpoint
    death: null, or [file, count, when, signal]: "before" or "after" replacing the file that often

Imports take seconds and most lives less, so a process that has imported everything, and computed
nothing, forks one for each. It prints a life's process id, and after another line of input the
exit code: until then that id is no other process's, and may be killed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from forked import fork_lives

from studies.digits import compare, timing

timing.ROUNDS = 3  # the times of a step are not what a life is about


def copy_last_checkpoints(notes: Path) -> None:
    save = compare.save

    def copying(results: dict[str, Any], path: Path) -> None:
        if results["runs"]:
            run = results["runs"][-1]
            shutil.copy(path.with_name("checkpoint.pt"), notes / f"{run['method']}.{run['seed']}")
        save(results, path)

    compare.save = copying


def die(file: str, count: int, when: str, signal: int) -> None:
    replace = os.replace

    def deadly(source: Any, target: Any) -> None:
        nonlocal count
        count -= Path(target).name == file
        if count == 0 and when == "before":
            os.kill(os.getpid(), signal)
        replace(source, target)
        if count == 0:
            os.kill(os.getpid(), signal)

    os.replace = deadly


def live(options: list[str], notes: str, death: list[Any] | None) -> int:
    with open(Path(notes) / "printed", "a", encoding="utf-8") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    copy_last_checkpoints(Path(notes))
    if death is not None:
        die(*death)
    code = compare.main(options)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    fork_lives(live)
