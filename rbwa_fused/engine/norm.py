"""The sum of squares behind clip_grad_norm_, in plain PyTorch, and memory for it.

csrc/norm.h states the order in which every backend adds, so that all of them give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 4096  # elements
LANES = 256


def chunks(grad: Tensor) -> int:
    return -(-grad.numel() // CHUNK)


def memory(grads: Sequence[Tensor]) -> Tensor:
    """Where the sum goes, and behind it each chunk's."""
    count = 1 + sum(map(chunks, grads))
    return torch.empty(count, dtype=torch.float64, device=grads[0].device)


def sum_squares_(grads: Sequence[Tensor], sums: Tensor) -> None:
    """Writes the sum of the squares of all elements to ``sums[0]``, and behind it each chunk's.

    Args:
        grads: dense tensors of streams.DTYPES on one device.
        sums: (1 + chunks,) float64 on that device, see `memory`.
    """
    at = 1
    for g in grads:
        n, own = g.numel(), chunks(g)
        squares = torch.zeros(own * CHUNK, dtype=torch.float64, device=g.device)
        wide = g.detach().as_strided((n,), (1,)).double()
        squares[:n] = wide * wide
        sums[at : at + own] = _folded(squares.view(own, CHUNK // LANES, LANES))
        at += own
    rows = -(-(at - 1) // LANES)
    of_chunks = torch.zeros(rows * LANES, dtype=torch.float64, device=sums.device)
    of_chunks[: at - 1] = sums[1:]
    sums[:1] = _folded(of_chunks.view(1, rows, LANES))


def _folded(rows: Tensor) -> Tensor:
    """The sums of (n, rows, LANES) numbers: lane by lane, then half on half."""
    lanes = torch.zeros(rows.shape[0], LANES, dtype=rows.dtype, device=rows.device)
    for row in rows.unbind(1):
        lanes = lanes + row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
