"""What is left of a comparison: results.json while it runs, and the table at its end."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from examples.data import TEST_IMAGES
from examples.methods import CONTROLS, KEPT, METHODS
from examples.options import Settings
from examples.timing import BASELINE, ROUNDS, Time
from examples.training import Run


def save(results: dict[str, Any], path: Path) -> None:
    """Replaces the file in one piece: whoever reads it, or stops us, finds a whole one."""
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with null for what JSON cannot say: a diverged run's nan and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


HEADER = ("method", "test accuracy %", "test loss", "training loss", "step ms", "ratio")


def table(runs: Sequence[Run], times: dict[str, Time]) -> str:
    """One row a method, after the last epoch, over the seeds."""
    rows = [HEADER]
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        rows.append(
            (
                name,
                spread([run["test_accuracy"][-1] for run in own], 2),
                spread([run["test_loss"][-1] for run in own], 4),
                spread([run["train_loss"][-1] for run in own], 5),
                f"{times[name]['ms']:.4f}",
                f"{times[name]['ratio']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; the mean alone of one run."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def caption(settings: Settings, runs: Sequence[Run], times: dict[str, Time], size: int) -> str:
    """How to read the table."""
    seeds = len(settings.seeds)
    faster = settings.lr / (1 - settings.momentum)
    text = f"""\
{settings.epochs} epochs of {settings.steps_per_epoch} steps, {seeds} seed{"s" * (seeds > 1)}: \
mean ± standard deviation, losses in nats an image. One of the {TEST_IMAGES} test images is \
{100 / TEST_IMAGES:.2f} points. Learning rate {settings.lr:g}, momentum {settings.momentum:g}; \
sgd and rsgdm take {faster:g}, which is the same pace. Averages start after epoch \
{settings.start_epoch} (lookahead's at once) and are tested with BatchNorm re-estimated where they \
are kept in a buffer ({names(settings, KEPT)}); elsewhere the live weights are tested. \
Step: median of {ROUNDS} `opt.step()` taken in turns; ratio to {BASELINE}, \
{times[BASELINE]["ms"]:.4f} ms in the same run. The network is small ({size:,} parameters), so \
this is mostly host time, and a median sees no step that samples only once in a while."""
    for method, control in CONTROLS.items():
        if method in settings.methods and control in settings.methods:
            percent = 100 * gap(runs, method, control)
            text += (
                f" {method} and {control}: test losses of a seed within {percent:.2g} % of each "
                f"other, in {settings.dtype}."
            )
    return textwrap.fill(text, 100)


def progress(run: Run, finished: int, wanted: int) -> str:
    """One line about a finished run."""
    return (
        f"{finished}/{wanted} {run['method']}, seed {run['seed']}: "
        f"{run['test_accuracy'][-1]:.2f} %, test loss {run['test_loss'][-1]:.4f}"
    )


def names(settings: Settings, family: str) -> str:
    """The methods of a family that were compared."""
    return ", ".join(n for n in settings.methods if METHODS[n].family == family) or "none here"


def gap(runs: Sequence[Run], method: str, control: str) -> float:
    """Largest relative difference of the final test losses of the same seed."""
    final = {(run["method"], run["seed"]): run["test_loss"][-1] for run in runs}
    return max(
        abs(loss - final[control, seed]) / max(loss, sys.float_info.min)
        for (name, seed), loss in final.items()
        if name == method
    )
