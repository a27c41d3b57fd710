"""The compiled code under g++'s address and undefined-behaviour sanitizers: `make sanitize`.

A copy of the tree is compiled with them under build/sanitized and runs the tests that exercise C++.
Then the copy is broken on purpose in one place after the other, and each time the sanitizers must
say so: that they find nothing means something only where they look. Leaks are not their business
here, since LeakSanitizer takes minutes over what Python keeps until its end; test_ops.py counts the
heap instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parent / "tools"))

from workspace import ROOT, Edit, Workspace

from rbwa_fused.command import Parser

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
TESTS = (
    "update/test_update.py",
    "update/test_ops.py",
    "update/test_methods.py",
    "optimizer/test_optimizer.py",
    "update/test_threads.py",
    "engine/test_outside_edits.py",
    "averages/test_averaged.py",
    "optimizer/test_bad_input.py",
    "update/test_cuda.py",
    "update/test_launch_forms.py",
    "update/test_replicas.py",
    "update/test_norm.py",
    "optimizer/test_schedule_free_on_devices.py",
)
PATIENCE = 3600.0  # seconds for one of them, on a slow machine that does other things


class Canary(NamedTuple):
    """A defect, the tests that run into it, and what the sanitizers call it."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    found: str


LOOP = "csrc/cpu/loop.h"
NARROW_LOOP = "csrc/cpu/narrow_loop.h"
BODY = "csrc/cuda/body.h"
TABLES = "csrc/tables.cpp"
FLOAT32_ALONE: tuple[Edit, ...] = (  # which compiles in a fraction of the time
    ("csrc/dispatch.h", "operator()<storage>()", "operator()<float>()"),
)
# -fwrapv gives a signed overflow a meaning, so that the sanitizer is silent about it.
OVERFLOWS_TOLD: Edit = ("setup.py", '    "-fwrapv",', '    "-Wall",')
BROKEN_TABLE = "update/test_ops.py::test_a_broken_table_is_refused_before_anything_is_written"
CANARIES = (
    Canary(
        "a loop that goes one element too far",
        ((LOOP, "i < n; ++i) {\n    Element", "i <= n; ++i) {\n    Element"),),
        ("update/test_update.py", "-k", "literal and decay and none and cpu"),
        "heap-buffer-overflow",
    ),
    Canary(
        "a last tile that is as long as the others",
        ((NARROW_LOOP, "n - at < kTile ? n - at : kTile", "kTile"),),
        ("update/test_update.py", "-k", "literal and decay and none and float16"),
        "heap-buffer-overflow",
    ),
    Canary(
        "a row that nobody checks",
        ((TABLES, "row < row_count - 1", "true"),),
        (f"{BROKEN_TABLE}[row out of range]",),
        "heap-buffer-overflow",
    ),
    Canary(
        "a sum that overflows",
        (
            (
                TABLES,
                "column[kShape] <= shape_count - 2 * dims",
                "column[kShape] + 2 * dims <= shape_count",
            ),
        ),
        (f"{BROKEN_TABLE}[a shape whose end overflows]",),
        "signed integer overflow",
    ),
    Canary(
        "a thread of CUDA's that goes one element too far",
        ((BODY, "i < chunk.n; i += kThreads", "i <= chunk.n; i += kThreads"), *FLOAT32_ALONE),
        ("update/test_cuda.py", "-k", "bits and decay and none and float32"),
        "heap-buffer-overflow",
    ),
    Canary(
        "a vector of CUDA's off its boundary",
        ((BODY, "all % kVectorBytes == 0", "true"), *FLOAT32_ALONE),
        ("update/test_cuda.py", "-k", "bits and decay and none and float32"),
        "misaligned address",
    ),
)


def environment() -> dict[str, str]:
    """What a process needs to load sanitized modules; an error aborts it."""

    def library(name: str) -> str:
        command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {
        # libstdc++ with them, or they find no exceptions to intercept
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0",
        "UBSAN_OPTIONS": "abort_on_error=1:halt_on_error=1:print_stacktrace=1",
        "RBWA_TEST_SANITIZERS": "address,undefined",
    }


def run(workspace: Workspace, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the tests pass, and the first of what the sanitizers or else pytest say."""
    done = workspace.pytest(  # -s, or a report is lost
        "-s", *tests, environment=environment(), timeout=PATIENCE
    )
    said = done.stdout + done.stderr
    report = re.search(r"[^\n]*(ERROR: AddressSanitizer|runtime error: )", said)
    said = said[report.start() :][:3000] if report else said[-3000:]
    return done.returncode == 0, said


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tests, then the canaries; the exit status counts what went wrong."""
    Parser(prog="sanitize.py", description=(__doc__ or "").split("\n")[0]).parse_args(argv)
    start = time.monotonic()

    def tell(words: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {words}", flush=True)

    workspace = Workspace(ROOT / "build" / "sanitized")
    with workspace.broken(OVERFLOWS_TOLD):
        workspace.compile(FLAGS)
        tell("built the CPU module; building the emulated CUDA kernels is part of their tests")
        wrong = 0
        for test in TESTS:
            clean, said = run(workspace, (test,))
            wrong += not clean
            tell(f"{test}: {'clean' if clean else said}")
        for canary in CANARIES:
            with workspace.broken(*canary.edits):
                workspace.compile(FLAGS)
                clean, said = run(workspace, canary.tests)
            caught = not clean and canary.found in said
            wrong += not caught
            tell(f"{canary.name}: {f'caught, {canary.found}' if caught else f'NOT CAUGHT {said}'}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
