"""The CUDA backend's own code on the CPU: built once, then a backend like the others."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import rbwa_fused as rf
from rbwa_fused.engine import backends, doors
from rbwa_fused.engine.counters import DeviceCounters

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["tests/emulated_cuda.cpp", "csrc/cuda/device_tables.cpp", "csrc/cuda/packer.cpp"]
SOURCES += [
    "csrc/tables.cpp",
    "csrc/views.cpp",
    "csrc/replica_tables.cpp",
    "csrc/cuda/pull_packer.cpp",
    "csrc/summed.cpp",
    "csrc/cuda/norm_packer.cpp",
]
FLAGS = ["-O1", "-g0", "-std=c++20", "-ffp-contract=off"]
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


@functools.cache
def emulated() -> Any:
    """The compiled module, with g++'s sanitizers if RBWA_TEST_SANITIZERS names some."""
    import pybind11
    from torch.utils.cpp_extension import load

    sanitizers = list(filter(None, os.environ.get("RBWA_TEST_SANITIZERS", "").split(",")))
    folder = ROOT / "build" / "-".join(("emulated", torch.__version__, *sanitizers))
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    sanitize = [f"-fsanitize={name}" for name in sanitizers]
    load(
        "emulated_cuda",
        [str(ROOT / source) for source in SOURCES],
        extra_cflags=[*FLAGS, TARGET, f"-I{ROOT / 'csrc'}", *sanitize],
        extra_include_paths=[pybind11.get_include()],
        extra_ldflags=sanitize,
        build_directory=str(folder),
        is_python_module=False,
    )
    path = folder / "emulated_cuda.so"
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def backend() -> doors.Backend:
    """`backends.CUDA`, with the compiled module exchanged for the emulated one."""
    module = emulated()

    def advance(d: DeviceCounters) -> None:
        counted = d.counts, d.policies, d.samplings64, d.samplings32, d.marks
        module.advance(*counted, d.found_inf, d.schedules)

    squares = doors.squares_door(module)
    return doors.Backend("cuda", doors.door(module), True, advance, squares)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """backend="cuda" serves CPU tensors by emulated kernels; an lr tensor counts as on a device."""
    chosen = backend()
    choose = backends.choose

    def pick(name: str, device: torch.device) -> doors.Backend:
        return chosen if name == "cuda" else choose(name, device)

    monkeypatch.setattr(backends, "choose", pick)
    monkeypatch.setattr(
        rf.rules,
        "lr_on_device",
        lambda group: group["lr"] if isinstance(group.get("lr"), torch.Tensor) else None,
    )
    return emulated()
