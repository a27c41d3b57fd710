"""The norm of all gradients together, of whatever layout and on whatever devices and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rbwa_fused.engine import backends, norm
from rbwa_fused.engine.memory import is_dense, is_plain
from rbwa_fused.engine.sharded import SummedOver, summed_over
from rbwa_fused.streams import DTYPES


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0, backend: str = "auto") -> Tensor:
    """The norm of all gradients together: 0-dim, float64 where one of them is, else float32.

    Raises:
        ValueError: for a DTensor whose shards are terms of a sum.
        RuntimeError, TypeError: for a sparse gradient, or one without plain memory.
    """
    if not grads:
        return torch.tensor(0.0)
    wide = not {torch.float64, torch.complex128}.isdisjoint({g.dtype for g in grads})
    dtype = torch.float64 if wide else torch.float32
    if norm_type != 2.0:
        norms = [
            _norms(where, shards, norm_type).to(grads[0].device)
            for where, shards in summed_over(grads).items()
        ]
        return torch.linalg.vector_norm(torch.cat(norms), norm_type).to(dtype)
    total: Tensor | None = None
    for where, shards in summed_over(grads).items():
        own = where.total(_sum_squares(shards, backend))
        total = own if total is None else total + own.to(total.device)
    assert total is not None
    return total.sqrt().to(grads[0].device, dtype)


def _sum_squares(grads: list[Tensor], backend: str) -> Tensor:
    """The sum of the squares of this process's shards, float64."""
    device = grads[0].device
    chosen = backends.choose(backend, device)
    if chosen.checks and set(map(type, grads)) == {Tensor}:
        sums = norm.memory(grads)
        try:
            chosen.sum_squares(grads, sums)
        except RuntimeError:  # it says nothing of a gradient that it can read
            pass
        else:
            return sums[0]
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        by_device.setdefault(g.device, []).append(_readable(g))
    total: Tensor | None = None
    for device, here in by_device.items():
        sums = norm.memory(here)
        backends.choose(backend, device).sum_squares(here, sums)
        total = sums[0] if total is None else total + sums[0].to(total.device)
    assert total is not None
    return total


def _readable(grad: Tensor) -> Tensor:
    """A gradient as the kernels can read it: itself, or a copy."""
    if grad.layout != torch.strided:
        raise RuntimeError("rbwa_fused does not support sparse gradients: clip_grad_norm_ got one")
    if is_traceable_wrapper_subclass(grad):
        raise TypeError(f"a gradient is a {type(grad).__name__}, which has no plain memory")
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    if grad.dtype not in DTYPES:
        return grad.float().contiguous()
    if (grad.is_contiguous() or is_dense(grad)) and is_plain(grad):
        return grad
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


def _norms(where: SummedOver, shards: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of each gradient, float64."""
    nothing = math.inf if p < 0 else 0.0  # the norm of an empty shard
    each = [
        torch.linalg.vector_norm(g.abs() if g.is_complex() else g, p, dtype=torch.float64)
        if g.numel() > 0
        else torch.tensor(nothing, dtype=torch.float64, device=g.device)
        for g in shards
    ]
    norms = torch.stack([own.to(shards[0].device) for own in each])
    if not where.dims:
        return norms
    if math.isinf(p):
        return where.total(norms, "max" if p > 0 else "min")
    return where.total(norms) if p == 0 else where.total(norms**p) ** (1 / p)
