"""The CUDA code under g++'s address and alignment sanitizers, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CASES = "bits and (momentum or explicit) and not float64 or alignment or launch or skipped"


def test_no_thread_reads_or_writes_what_is_not_its_own() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("the sanitizers are g++'s")

    def library(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        **os.environ,
        # libstdc++ with it, or the sanitizer finds no exceptions to intercept
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0,halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "RBWA_TEST_SANITIZERS": "address,alignment",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", CASES, "test_cuda.py", "test_replicas.py"],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
