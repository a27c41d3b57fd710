"""The ceiling: ceiling.cpp, compiled at run time for this processor, on contiguous buffers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows.maths import Average, Maths
from benchmarks.rows.problem import LR, MOMENTUM, WEIGHT_DECAY, Problem
from benchmarks.rows.provider import Provider

HERE = Path(__file__).resolve().parent
FLAGS = ["-O3", "-march=native", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
NAME = "rbwa_benchmarks_ceiling"
EMA_WEIGHT = 0.001

# The rows: which streams there are. Adam's without an average move as much as momentum's with one.
STREAMS = ("theta, g", "theta, g, m", "theta, g, m, a", "theta, g, m, v, a")


def build(machine: str) -> Path:
    """Compiles the loop where that is needed, and returns the library's path.

    Args:
        machine: `benchmarks.measure.machine.slug`, since the loop is for this processor alone.

    Raises:
        RuntimeError, OSError: without a working compiler and ninja.
    """
    from torch.utils.cpp_extension import load

    folder = HERE.parents[1] / "build" / f"ceiling-{machine}-{torch.__version__}"
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # about CUDA
    folder.mkdir(parents=True, exist_ok=True)
    load(
        NAME,
        [str(HERE / "ceiling.cpp")],
        extra_cflags=FLAGS,
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder / f"{NAME}.so"


def use(library: Path) -> None:
    """Makes a compiled loop known to this process."""
    torch.ops.load_library(library)


def loop(streams: str) -> Callable[[Problem, str], Provider]:
    """The plain loop over these streams. 16-bit ones are moved as integers, see ceiling.cpp."""
    has_m, has_v, has_a = (stream in streams.split(", ") for stream in ("m", "v", "a"))

    def build_row(problem: Problem, name: str) -> Provider:
        weights = [p.detach() for p in problem.model.parameters()]
        theta = _flat(weights)
        gradients = [_flat(g) for g in problem.gradients]
        m = torch.zeros_like(theta) if has_m else None
        v = torch.zeros_like(theta) if has_v else None
        a = theta.to(torch.float32 if theta.dtype == torch.int16 else theta.dtype, copy=True)
        average = a if has_a else None
        state = [t for t in (m, v, average) if t is not None]
        integers = theta.dtype == torch.int16
        numbers = (0, 1, 1) if integers else (WEIGHT_DECAY, MOMENTUM, LR)
        current = 0

        def use_gradients(which: int) -> None:
            nonlocal current
            current = which

        op: Any = torch.ops.rbwa_benchmarks.ceiling.default

        def step() -> None:
            op(theta, gradients[current], m, v, average, *numbers, EMA_WEIGHT)

        def split(flat: Tensor) -> list[Tensor]:
            pieces = flat.split([p.numel() for p in weights])
            return [piece.view(p.shape) for piece, p in zip(pieces, weights, strict=True)]

        item = theta.element_size()
        moved = 3.0 * item + 2 * sum(t.element_size() for t in state)
        return Provider(
            name=name,
            kind="ceiling",
            maths=Maths("momentum" if has_m else "plain", Average(lambda n: EMA_WEIGHT)),
            params=split(theta),
            step=step,
            use_gradients=use_gradients,
            averages=lambda: None if average is None else split(average),
            state=lambda: state,
            moved=lambda: (moved, moved),
        )

    return build_row


def _flat(tensors: list[Tensor]) -> Tensor:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    return flat.view(torch.int16) if flat.element_size() == 2 else flat
