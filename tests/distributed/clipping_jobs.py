"""Clipping on several ranks: what test_clipped_ranks.py runs. The norm is that of whole gradients,
each element once, and the step is that of torch's clipping in place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import fsdp1_jobs
import fsdp_jobs
import pytest
import shards
import tensor_parallel_jobs
import torch
import torch.distributed as dist
from ddp_jobs import WAYS, Driven, batch_of
from runs import bits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import rbwa_fused as rf
from rbwa_fused.distributed import ZeroRedundancyOptimizer

STEPS, LIMIT = 6, 0.5
OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "average": rf.ema(0.5)}
CHANGED = "gradients were changed after clip_grad_norm_"


def norm_of(params: Iterable[Tensor]) -> float:
    """Of whole gradients, in float64."""
    grads = [shards.whole(p.grad).double().flatten() for p in params if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.cat(grads)))


def near(a: Tensor, b: Tensor) -> bool:
    """A few steps of float32 with another coefficient's last bit, momentum adding up."""
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def data_parallel(way: str) -> tuple[list[float], list[str | None]]:
    """Beside a twin that torch clips. Returns norms and weights."""
    twins = [DistributedDataParallel(Driven(torch.float32), **WAYS[way]) for _ in range(2)]
    ours = rf.FusedSGD(twins[0].parameters(), **OPTIONS)
    theirs = torch.optim.SGD(twins[1].parameters(), lr=0.05, momentum=0.9)
    norms = []

    def clip(step: int) -> None:
        for twin in twins:
            twin(batch_of(dist.get_rank(), step)).backward()
        norms.append(ours.clip_grad_norm_(LIMIT).item())
        expected = nn.utils.clip_grad_norm_(twins[1].parameters(), LIMIT).item()
        assert math.isclose(norms[-1], expected, rel_tol=1e-6) and expected > 2 * LIMIT

    for step in range(STEPS):
        clip(step)
        ours.step()
        theirs.step()
        for opt in (ours, theirs):
            opt.zero_grad(set_to_none=step % 2 == 0)
    assert all(near(p, q) for p, q in zip(*(t.parameters() for t in twins), strict=True))
    weights = [bits(p) for p in twins[0].parameters()]
    # The views of DDP's buckets are the same tensors with other values, also after a step that was
    # left out.
    for leave_out in (ours.zero_grad, twins[0].zero_grad):
        clip(1)
        leave_out()
        theirs.zero_grad()
        for twin in twins:
            twin(batch_of(dist.get_rank(), 2)).backward()
        if leave_out != ours.zero_grad and "bucket" in way:
            with pytest.raises(RuntimeError, match=CHANGED):
                ours.step()
            break
        ours.step()
        theirs.step()
        assert all(near(p, q) for p, q in zip(*(t.parameters() for t in twins), strict=True))
        for opt in (ours, theirs):
            opt.zero_grad()
    return norms, weights


def zero(view: bool) -> None:
    """Beside one optimizer for all parameters that is given the same gradients."""
    model, alone = Driven(torch.float32), Driven(torch.float32)
    ddp = DistributedDataParallel(model)
    opt = ZeroRedundancyOptimizer(
        model.parameters(), rf.FusedSGD, parameters_as_bucket_view=view, **OPTIONS
    )
    whole = rf.FusedSGD(alone.parameters(), **OPTIONS)
    norms = []
    for step in range(STEPS):
        ddp(batch_of(dist.get_rank(), step)).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        with CommDebugMode() as seen:
            norms.append(opt.clip_grad_norm_(LIMIT))
        assert seen.get_total_counts() == 0
        assert torch.equal(norms[-1], whole.clip_grad_norm_(LIMIT)) and norms[-1] > 2 * LIMIT
        opt.step()
        whole.step()
        opt.zero_grad()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(p, q)
    # The last parameter is another rank's to step, for one of them: all raise, and none writes.
    for changed in (0, -1):
        ddp(batch_of(dist.get_rank(), 0)).backward()
        rf.clip_grad_norm_([opt], LIMIT)
        list(model.parameters())[changed].grad.add_(1)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=CHANGED):
            opt.step()
        opt.zero_grad(set_to_none=False)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


def laid_out(kind: str) -> tuple[nn.Module, nn.Module, Any]:
    """A sharded model, the plain one, and what its backward pass is."""
    if kind.startswith("parallel"):
        data, across = (int(n) for n in kind.split()[1:])
        model: nn.Module = tensor_parallel_jobs.parallel(data, across)
        plain: nn.Module = tensor_parallel_jobs.Block()
        return model, plain, lambda step: tensor_parallel_jobs.backward(model, step, across)
    if kind == "hybrid":
        model = fsdp_jobs.network()
        mesh = shards.mesh(2, 2, names=("replicas", "shards"))
        fully_shard(model, mesh=mesh)
    else:
        model = fsdp_jobs.sharded_network()
    rank = dist.get_rank()
    return model, fsdp_jobs.network(), lambda step: fsdp_jobs.loss(model, step, rank).backward()


def of_shards(kind: str, reductions: int) -> list[str]:
    """Returns how gradients are laid out."""
    model, plain, backward = laid_out(kind)
    ours = rf.FusedSGD(model.parameters(), **OPTIONS)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        backward(step)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None
            q.grad = shards.whole(p.grad).clone()
        expected = norm_of(plain.parameters())
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5 * expected)
        with CommDebugMode() as seen:
            norm = ours.clip_grad_norm_(0.5 * expected)
        assert type(norm) is Tensor and math.isclose(norm.item(), expected, rel_tol=1e-6)
        assert seen.get_total_counts() == reductions, seen.get_comm_counts()
        ours.step()
        theirs.step()
        ours.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert near(shards.whole(p), q)
    layouts = []
    backward(0)
    grads = [shards.whole(p.grad) for p in model.parameters() if p.grad is not None]
    for order in (0.0, 0.5, 1.0, 3.0, math.inf, -math.inf):
        found = ours.clip_grad_norm_(1.0, order).item()
        expected = nn.utils.get_total_norm(grads, order).item()
        assert math.isclose(found, expected, rel_tol=1e-5), order
    before = norm_of(model.parameters())
    ours.clip_grad_norm_(0.25 * before, in_place=True)
    assert math.isclose(norm_of(model.parameters()), 0.25 * before, rel_tol=1e-5)
    ours.clip_grad_norm_(0.1)
    for p in model.parameters():
        assert p.grad is not None
        layouts.append(str(p.grad.placements))  # type: ignore[attr-defined]
    list(model.parameters())[-1].grad.mul_(2)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=CHANGED):
        ours.step()
    return layouts


def accumulated_shards() -> None:
    """FSDP2 adds a second backward pass to the shards in the gradients, not to the gradients."""
    model, _, backward = laid_out("sharded")
    opt = rf.FusedSGD(model.parameters(), lr=0.1)
    backward(0)
    opt.clip_grad_norm_(1.0)
    backward(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        opt.step()


def refused() -> None:
    mesh = shards.mesh()
    p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ValueError, match="terms of a sum"):
        rf.clip_grad_norm_(torch.optim.SGD([p], lr=0.1), 1.0)
    model = fsdp1_jobs.sharded_network()
    opt = rf.FusedSGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"expected model.clip_grad_norm_\(max_norm\)"):
        opt.clip_grad_norm_(1.0)
