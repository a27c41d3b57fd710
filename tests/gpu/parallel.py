"""pytest in several processes, each with every n-th test: python tests/gpu/parallel.py 8 -q tests.

Their lines come as they are printed, with the process's number, and the sum of their results last;
the status is 1 if a test failed, a process died or nothing passed. As a plugin of pytest this file
deals them out.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

SHARE = "RBWA_SHARE_OF_TESTS"  # such as 3/8, counted from 0
NO_TESTS = 5  # pytest's status for a process that got none
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|error|xfailed)")


@pytest.hookimpl(trylast=True)  # when -m and -k have chosen
def pytest_collection_modifyitems(items: list[Any]) -> None:
    if SHARE in os.environ:
        which, count = map(int, os.environ[SHARE].split("/"))
        items[:] = items[which::count]


def start(which: int, count: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """One process with its share of the tests."""
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "parallel", *arguments],
        env={**os.environ, SHARE: f"{which}/{count}", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def follow(which: int, process: subprocess.Popen[str], counts: Counter[str]) -> None:
    """Prints a process's lines, and adds up its last one's counts."""
    summary = ""
    assert process.stdout is not None
    for line in process.stdout:
        # A failure's own line stays as pytest prints it, for whoever looks for them.
        told = line if line.startswith(("FAILED ", "ERROR ")) else f"[{which}] {line}"
        sys.stdout.write(told if told.endswith("\n") else f"{told}\n")
        if re.search(r"\bin \d+\.\d+s", line):
            summary = line
    counts.update({kind: int(number) for number, kind in COUNTED.findall(summary)})


def main(argv: Sequence[str]) -> int:
    """Runs pytest with `argv[1:]` in `argv[0]` processes."""
    count, arguments = int(argv[0]), argv[1:]
    processes = [start(which, count, arguments) for which in range(count)]
    counts: Counter[str] = Counter()
    threads = [
        Thread(target=follow, args=(which, process, counts))
        for which, process in enumerate(processes)
    ]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends the processes, which say where they were
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [process.wait() for process in processes]
    for which, status in enumerate(statuses):
        if status not in (0, 1, NO_TESTS):
            how = f"died by signal {-status}" if status < 0 else f"ended with status {status}"
            print(f"ERROR process {which} {how}")
    print(", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "no tests")
    return int(not counts["passed"] or any(status not in (0, NO_TESTS) for status in statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
