"""The sum of squares behind clip_grad_norm_: csrc/norm.h mirrored, a program for each chunk.

A table has the addresses and lengths of the gradients, and where each one's sums stand; a second
one names each program's gradient and chunk. Both are copied to the device without waiting for it.
"""

# Constants are in capitals.
# ruff: noqa: N803
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rbwa_fused.engine.norm import CHUNK, LANES, chunks

from . import step

BLOCK = tl.constexpr(CHUNK)
WIDTH = tl.constexpr(LANES)
HALVINGS = tl.constexpr(LANES.bit_length() - 1)
WARPS = 4


@triton.jit
def folded(lanes):
    """Half on half, until one is left. A sum of two numbers has no order."""
    for halving in tl.static_range(HALVINGS - 1):
        lanes = tl.sum(tl.reshape(lanes, (2, WIDTH >> (halving + 1))), axis=0)
    return tl.sum(lanes, axis=0)


@triton.jit
def squares_kernel(programs, table, sums, DTYPE: tl.constexpr):
    """The sum of one chunk's squares."""
    program = programs + 2 * tl.program_id(0)
    entry = table + tl.load(program) * 3
    chunk = tl.load(program + 1)
    g = tl.load(entry).to(tl.pointer_type(DTYPE))
    length = tl.load(entry + 1)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for row in tl.static_range(BLOCK // WIDTH):
        at = chunk * BLOCK + row * WIDTH + lane
        wide = tl.load(g + at, mask=at < length, other=0).to(tl.float64)
        total += wide * wide
    tl.store(sums + tl.load(entry + 2) + chunk, folded(total))


@triton.jit(do_not_specialize=["count"])
def sums_kernel(sums, count, ROWS: tl.constexpr):
    """The sum of the chunks' sums, to the place before them."""
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float64)
    for row in range(ROWS):
        at = row * WIDTH + lane
        total += tl.load(sums + 1 + at, mask=at < count, other=0)
    tl.store(sums, folded(total))


def sum_squares(grads: Sequence[Tensor], sums: Tensor) -> None:
    """See rbwa_fused/engine/norm.py.

    Raises:
        RuntimeError: where Triton does not serve the device.
    """
    device = sums.device
    reason = step.available(device)
    if reason is not None:
        raise RuntimeError(f"backend 'triton': {reason}")
    by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    at = 1
    for g in grads:
        if g.numel() > 0:
            by_dtype.setdefault(g.dtype, []).append((at, g))
        at += chunks(g)
    with step._on(device):
        for dtype, members in by_dtype.items():
            count = sum(chunks(g) for _, g in members)
            table = [(g.data_ptr(), g.numel(), first) for first, g in members]
            pieces = [
                _programs([chunks(g) for _, g in members]),
                torch.tensor(table, device="cpu").view(-1),
            ]
            staging, (programs, entries) = step._copied(pieces, device)
            if step._capturing(device):
                _captured.append(staging)  # which the graph reads at each replay
            squares_kernel[(count,)](
                programs,
                entries,
                sums,
                DTYPE=step._triton_dtype(dtype),
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        rows = -(-(at - 1) // LANES)
        sums_kernel[(1,)](sums, at - 1, ROWS=rows, num_warps=WARPS, enable_fp_fusion=False)


_captured: list[Tensor] = []


def _programs(counts: list[int]) -> Tensor:
    """Of each program its gradient, and the chunk of it."""
    of_each = torch.tensor(counts, device="cpu")
    member = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), of_each)
    first = of_each.cumsum(0) - of_each
    chunk = torch.arange(len(member), device="cpu") - first[member]
    return torch.stack([member, chunk], dim=1).view(-1)
