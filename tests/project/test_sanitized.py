"""The CUDA code under g++'s sanitizers, in a process of its own; `make sanitize` runs more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitize import environment

TESTS = Path(__file__).resolve().parents[1]
CASES = "bits and (momentum or explicit) and not float64 or alignment or launch or skipped"


def test_no_thread_reads_or_writes_what_is_not_its_own() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the sanitizers are g++'s")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", CASES, "update/test_cuda.py", "update/test_replicas.py"],
        cwd=TESTS,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
