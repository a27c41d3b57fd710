"""Rows of ours that are launched otherwise than usual, for a GPU to decide between: the questions
and what is expected stand in docs/benchmarks.md. All have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from benchmarks.rows.ours import METHODS, ours
from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Build, Provider, Row
from rbwa_fused.engine import backends

USUAL = (True, False)  # of launch_form
VARIED = ("SGD + momentum", "EMA")

Setting = Callable[[], AbstractContextManager[None]]


def launch_form(small: bool, block_table: bool) -> None:
    """How the CUDA kernels are launched from now on (csrc/cuda/packer.h)."""
    assert backends._C_cuda is not None
    backends._C_cuda.launch_form(small, block_table)


def cuda(small: bool, block_table: bool) -> Setting:
    """Launch arguments of 8 KB where they suffice or always of 32, and whether they say each
    block's segment."""

    @contextmanager
    def setting() -> Iterator[None]:
        launch_form(small, block_table)
        try:
            yield
        finally:
            launch_form(*USUAL)

    return setting


def triton(chunk: int, warps: int) -> Setting:
    """Elements that a program takes at once, and its warps."""

    @contextmanager
    def setting() -> Iterator[None]:
        from rbwa_fused.triton_kernels import step

        before = step.CHUNK, step.WARPS
        step.CHUNK, step.WARPS = chunk, dict.fromkeys(step.WARPS, warps)
        try:
            yield
        finally:
            step.CHUNK, step.WARPS = before

    return setting


VARIANTS: dict[str, tuple[tuple[str, Setting], ...]] = {
    "cuda": (("32 KB", cuda(False, False)), ("32 KB, block table", cuda(False, True))),
    "triton": (("8 warps of 2048", triton(2048, 8)),),
}


def under(setting: Setting, build: Build) -> Build:
    """The same row, whose every step is taken under a setting."""

    def build_row(problem: Problem, name: str) -> Provider:
        provider = build(problem, name)
        step = provider.step

        def varied() -> None:
            with setting():
                step()

        return replace(provider, step=varied)

    return build_row


def rows(backends: Sequence[str]) -> list[Row]:
    """The variants of these backends."""
    return [
        Row(
            f"{method}, {backend}, {name}",
            "ours",
            under(setting, ours(*METHODS[method], backend=backend)),
        )
        for backend in backends
        for name, setting in VARIANTS.get(backend, ())
        for method in VARIED
    ]
