"""The compiled launches of CUDA kernels, on a runtime that only counts: whose error is whose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rbwa_fused.engine import backends

if backends._C_cuda is None:
    pytest.skip("the CUDA kernels are not built here", allow_module_level=True)

HERE = Path(__file__).parent
# Every function of csrc/cuda/*.cu that launches, as g++ mangles it. Each does so once.
PROGRAM = """
import ctypes, sys
from rbwa_fused.engine import backends

runtime, kernels = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(backends._C_cuda.__file__)
memory = [ctypes.create_string_buffer(1 << 16) for _ in range(2)]
some = [address + -address % 16 for address in map(ctypes.addressof, memory)]
calls = {
    "step": (kernels._Z9step_cudaRK9KernelKeyPKvlPv, (some[0], some[1], 1, None)),
    "advance": (kernels._Z12advance_cudaRK14DeviceCountersPv, (some[0], None)),
    "pull": (kernels._Z9pull_cuda5DtypePKvlPv, (0, some[0], 1, None)),
}
for name, (function, arguments) in calls.items():
    function.restype = ctypes.c_char_p
    function.argtypes = [
        ctypes.c_int64 if isinstance(a, int) and a < 100 else ctypes.c_void_p for a in arguments
    ]
    for fails in (0, 1):
        runtime.pretend(0 if fails else 2, fails)
        said = function(*arguments)
        print(name, fails, said is None, runtime.launched(), runtime.cudaGetLastError())
"""
LEFT_BEHIND = 2


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, bool, int, int]]:
    """Of each function: whether its launch failed, whether it said nothing, launches, the error
    left."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler, and a loader that takes LD_PRELOAD")
    library = tmp_path_factory.mktemp("pretended") / "pretended.so"
    source = HERE / "pretended_cuda.cpp"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, library],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, int(f), fine == "True", int(n), int(e)) for name, f, fine, n, e in lines]


def test_an_error_that_another_library_left_is_neither_ours_nor_taken_away(
    said: list[tuple[str, int, bool, int, int]],
) -> None:
    whole = [line for line in said if line[1] == 0]
    assert [line[0] for line in whole] == ["step", "advance", "pull"]
    assert all(fine and left == LEFT_BEHIND for _, _, fine, _, left in whole), whole


def test_a_launch_that_failed_is_told_once_and_not_tried_again(
    said: list[tuple[str, int, bool, int, int]],
) -> None:
    failed = [line for line in said if line[1] > 0]
    assert len(failed) == 3
    for name, _, fine, launches, left in failed:
        assert not fine and launches == 1 and left == 0, name
