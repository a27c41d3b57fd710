"""Data-parallel training for test_ddp.py and test_zero.py: jobs of tests/ranks.py.

The network of runs.py with a loss whose gradients are other on each rank and at each batch, so that
`alone` can say in one process what DistributedDataParallel must come to.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from elastic_jobs import refused
from runs import METHODS, STEPS, Model, groups, result
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rbwa_fused as rf
from rbwa_fused.distributed import Joined, synchronize


class Driven(Model):
    """The loss of one batch, whose number is the input."""

    def forward(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        loss = torch.zeros(())
        for p in self.parameters():
            noise = torch.randn(p.shape, generator=generator)
            loss = loss + (noise * p.float()).sum() + 0.1 * p.float().square().sum()
        return loss


def batch_of(rank: int, step: int) -> int:
    return 100 * (rank + 1) + step


def build(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Driven, Any]:
    model = Driven(dtype)
    return model, METHODS[method](groups(model), **options)


def alone(
    method: str,
    world: int,
    batches: int = 1,
    counts: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    resumed: dict[str, Any] | None = None,
    first: int = 1,
    **options: Any,
) -> tuple[Driven, Any]:
    """What one process comes to that computes every rank's gradient and adds their shares.

    Args:
        batches: accumulated for a step.
        counts: steps of each rank; one that has no more adds nothing.
        resumed: a checkpoint to go on from, at the step `first`.
    """
    model, opt = build(method, dtype, **options)
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        opt.load_state_dict(resumed["optimizer"])
    params = list(model.parameters())
    counts = counts or [STEPS] * world
    for step in range(first, max(counts) + 1):
        total = [torch.zeros_like(p) for p in params]
        for rank in range(world):
            if step <= counts[rank]:
                model.zero_grad()
                for micro in range(batches):
                    model(batch_of(rank, step + 50 * micro)).backward()
                for sum_, p in zip(total, params, strict=True):
                    sum_ += p.grad / world
        for sum_, p in zip(total, params, strict=True):
            p.grad = sum_
        opt.step()
    return model, opt


def tensors_of(model: nn.Module, opt: Any) -> list[list[float]]:
    """Weights, state and averaged weights, as numbers."""
    state = [t for p in model.parameters() for _, t in sorted(opt.state[p].items())]
    averages = opt.averaged_state_dict(model).values()
    every = [*model.parameters(), *state, *averages]
    return [t.detach().double().reshape(-1).tolist() for t in every]


# ---- DistributedDataParallel ---------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "bucket view, static graph": {"gradient_as_bucket_view": True, "static_graph": True},
}


def wrapped(
    method: str, before: bool, way: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Driven, Any, Any]:
    """The optimizer built before or after the wrap; other ranks' weights must not matter."""
    model = Driven(dtype)
    if dist.get_rank() > 0:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(dist.get_rank())
    if before:
        opt = METHODS[method](groups(model), **options)
        ddp = DistributedDataParallel(model, **WAYS[way])
    else:
        ddp = DistributedDataParallel(model, **WAYS[way])
        opt = METHODS[method](groups(model), **options)
    return model, ddp, opt


def data_parallel(
    method: str, ways: list[str], dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """What comes of each way of wrapping."""
    answers = {}
    for way in ways:
        for before in (False, True):
            model, ddp, opt = wrapped(method, before, way, dtype, **options)
            for step in range(1, STEPS + 1):
                ddp(batch_of(dist.get_rank(), step)).backward()
                opt.step()
                opt.zero_grad()
            answers[f"{way}, {'before' if before else 'after'}"] = {
                "result": result(opt),
                "tensors": tensors_of(model, opt),
            }
    return answers


def without_synchronization(method: str) -> dict[str, Any]:
    model, opt = build(method)
    for step in range(1, STEPS + 1):
        model(batch_of(dist.get_rank(), step)).backward()
        opt.step()
        opt.zero_grad()
    return result(opt)


def accumulated(method: str) -> list[dict[str, Any]]:
    """Two batches a step, the first under no_sync."""
    answers = []
    for way in ("plain", "bucket view"):
        _, ddp, opt = wrapped(method, True, way)
        for step in range(1, STEPS + 1):
            with ddp.no_sync():
                ddp(batch_of(dist.get_rank(), step)).backward()
            ddp(batch_of(dist.get_rank(), step + 50)).backward()
            opt.step()
            opt.zero_grad()
        answers.append(result(opt))
    return answers


def go_on_from(method: str, saved: bytes | None, stop: int) -> tuple[bytes | None, dict[str, Any]]:
    """Trains from a checkpoint's step, or from none to `stop` and saves there on rank 0."""
    model, ddp, opt = wrapped(method, True, "bucket view")
    first, last = 1, stop
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        first, last = stop + 1, STEPS
    for step in range(first, last + 1):
        ddp(batch_of(dist.get_rank(), step)).backward()
        opt.step()
        opt.zero_grad()
    file = io.BytesIO()
    if saved is None and dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, file)
    return file.getvalue() or None, result(opt)


# ---- buffers -------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def images(rank: int, step: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(batch_of(rank, step)))


def ema_of(model: nn.Module) -> rf.FusedSGD:
    return rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.7, start=2))


def buffers(model: nn.Module) -> list[list[float]]:
    return [b.double().reshape(-1).tolist() for b in model.buffers()]


def with_batchnorm() -> dict[str, Any]:
    model = normed()
    ddp, opt = DistributedDataParallel(model), ema_of(model)
    for step in range(1, STEPS + 1):
        ddp(images(dist.get_rank(), step)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    own = buffers(model)
    with rf.averaged_model(opt, model, [images(9, step) for step in range(3)]):
        model.eval()
        evaluated = model(images(8, 0)).tolist()
        estimated = buffers(model)
        model.train()
    return {
        "result": result(opt),
        "buffers": own,
        "estimated": estimated,
        "evaluated": evaluated,
        "again": buffers(model) == own,
    }


# ---- uneven inputs and taken-over state ----------------------------------------------------------


def uneven(method: str, counts: list[int], joined: bool) -> dict[str, Any]:
    """Ranks with other numbers of batches, then two batches for all."""
    _, ddp, opt = wrapped(method, True, "bucket view")
    rank = dist.get_rank()
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
    joinables = [ddp, Joined(opt, schedule)] if joined else [ddp]
    with Join(joinables):
        for step in range(1, counts[rank] + 1):
            ddp(batch_of(rank, step)).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
    at_the_end = result(opt), schedule.last_epoch
    for step in (40, 41):
        ddp(batch_of(rank, step)).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    return {"joined": at_the_end, "later": result(opt)}


def joined_first() -> str:
    model, opt = build("ema")
    ddp = DistributedDataParallel(model)
    try:
        Join([Joined(opt), ddp])
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def taken_over(method: str, steps: list[int], source: int) -> dict[str, Any]:
    """Each rank takes steps of its own number before all follow one; weights stay."""
    model, opt = build(method)
    opt.param_groups[0]["lr"] = 0.01 * (1 + dist.get_rank())
    for step in range(1, steps[dist.get_rank()] + 1):
        model.zero_grad()
        model(batch_of(dist.get_rank(), step)).backward()
        opt.step()
    before = result(opt)
    weights = [p.tolist() for p in model.parameters()]
    synchronize(opt, source)
    after = result(opt)
    kept = weights == [p.tolist() for p in model.parameters()]
    return {"before": before, "after": after, "weights kept": kept}


def taken_over_elsewhere() -> dict[str, Any]:
    """A bfloat16 model with masters, torch's Adam, a tensor lr, a scheduler; in a group."""
    group = dist.new_group([0, 1])
    rank = dist.get_rank()
    answers: dict[str, Any] = {}
    builders: dict[str, Callable[[Any], Any]] = {
        "masters": lambda ps: rf.FusedSGD(
            ps, lr=torch.tensor(0.1 + rank), momentum=0.9, average=rf.ema(0.5), master_weights=True
        ),
        "adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
    }
    for name, builder in builders.items():
        model = Driven(torch.bfloat16)
        opt = builder(model.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
        for step in range(1, 4 + rank):
            model(batch_of(rank, step)).backward()
            opt.step()
            schedule.step()
        for follower in (opt, schedule):
            synchronize(follower, 1, group)
        state = [t.tolist() for held in opt.state.values() for _, t in sorted(held.items())]
        answers[name] = (state, float(opt.param_groups[0]["lr"]), schedule.last_epoch)
    return answers


def milestones_taken_over() -> list[Any]:
    """A scheduler's state that is no plain dict, and what it does with it in closed form."""
    opt = rf.FusedSGD(Driven().parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, milestones=[2, 5, 5], gamma=0.5)
    synchronize(schedule, 0)
    return [schedule.milestones, schedule._get_closed_form_lr()]


def refused_to_take_over() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards = rf.FusedSGD([nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))])
    plain = rf.FusedSGD([nn.Parameter(torch.ones(4))])
    group = dist.new_group([0])
    return {
        "shards": refused(lambda: synchronize(shards, 0)),
        "joined shards": refused(lambda: Joined(shards)),
        "outside": refused(lambda: synchronize(plain, 0, group)),
    }
