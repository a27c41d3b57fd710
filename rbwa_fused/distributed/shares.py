"""Weights that each rank of a ZeroRedundancyOptimizer has for all: exchanged, and averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed import optim

from rbwa_fused.distributed.exchange import explained
from rbwa_fused.fused import FusedOptimizer

LIVE = "Weights of other ranks are their averages or their training weights on this rank."


@contextmanager
def averaged(opt: optim.ZeroRedundancyOptimizer, **options: Any) -> Iterator[None]:
    """The averaged weights are live on all ranks inside, the training weights again after it.

    As `FusedSGD.averaged`, for a ZeroRedundancyOptimizer over an optimizer of this package, torch's
    or ours: each rank puts the averages of its own parameters in place and broadcasts them, and
    brings the training weights back and broadcasts those, also after an exception. All ranks enter
    and leave it, as with any collective; an exception on one alone leaves the others waiting.

    Args:
        opt: torch.distributed.optim.ZeroRedundancyOptimizer, or the one of this module.
        **options: of the optimizer's own `averaged`, such as ``blend``; the same on all ranks.

    Raises:
        TypeError: for an optimizer that has no averages.
        RuntimeError: where a process has gone. The weights of this rank's own parameters are the
            training weights then.

    Example:
        >>> with rbwa_fused.distributed.averaged(opt):
        ...     evaluate(model)
    """
    local = getattr(opt, "optim", None)
    if not isinstance(local, FusedOptimizer):
        raise TypeError(f"Invalid opt: {type(opt).__name__} over {type(local).__name__}")
    shares = shares_of(opt, "averaged")
    own = set(params_of(local))
    others = {p: p.data_ptr() for p in params_of(opt) if p not in own}
    live = False
    try:
        with local.averaged(**options):
            broadcast(opt, shares, "averaged")
            live = True
            yield
    finally:
        if live:
            for p, address in others.items():
                if p.data_ptr() != address:  # `p.data = ...` inside, where another one may lie, too
                    p.data = torch.empty_like(p)
            broadcast(opt, shares, "averaged")


def params_of(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def shares_of(opt: optim.ZeroRedundancyOptimizer, what: str) -> list[list[Tensor]]:
    """The parameters that each rank steps."""
    params = params_of(opt)
    number = {p: i for i, p in enumerate(params)}
    everyone: list[Any] = [None] * opt.world_size
    with explained(what, "The weights of this rank are unchanged."):
        own = [number[p] for p in params_of(opt.optim)]
        dist.all_gather_object(everyone, own, group=opt.process_group)
    return [[params[i] for i in numbers] for numbers in everyone]


def broadcast(opt: optim.ZeroRedundancyOptimizer, shares: list[list[Tensor]], what: str) -> None:
    """Gives every rank the weights that their owners have."""
    with explained(what, LIVE), torch.no_grad():
        works = [
            dist.broadcast(
                p.detach(),
                src=dist.get_global_rank(opt.process_group, rank),
                group=opt.process_group,
                async_op=True,
            )
            for rank, share in enumerate(shares)
            for p in share
        ]
        for work in works:
            assert work is not None  # as it would be outside the group
            work.wait()
    increment_version([p for share in shares for p in share])
    torch.clear_autocast_cache()
