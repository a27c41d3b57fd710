"""Averages beside others' optimizers on several ranks: what test_averager_on_ranks.py runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import beside
import fsdp_jobs
import shards
import tensor_parallel_jobs
import torch
import torch.distributed.checkpoint as dcp
from ddp_jobs import Driven, batch_of
from runs import bits
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import rbwa_fused as rf

LENGTH = 9


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)


def averages(averager: rf.Averager) -> list[str | None]:
    (group,) = averager.param_groups
    return [bits(shards.whole(averager.state[p]["average"])) for p in group["params"]]


def sharded_as_alone(policy: str) -> None:
    """FSDP2, uneven shards among them, against a plain model that sees all batches."""
    average, _ = beside.POLICIES[policy]
    model, alone = fsdp_jobs.sharded_network(), fsdp_jobs.network()
    ours, theirs = adamw(model), adamw(alone)
    averager = rf.Averager(model, average, optimizer=ours)
    plain = rf.Averager(alone, average, optimizer=theirs)
    fsdp_jobs.train(model, ours, 1, LENGTH)
    fsdp_jobs.train_alone(alone, theirs, 1, LENGTH, distributed.get_world_size())
    assert all(isinstance(averager.state[p]["average"], DTensor) for p in model.parameters())
    assert averages(averager) == averages(plain)
    assert averager.n_averaged == plain.n_averaged > 0
    with averager.averaged(), plain.averaged():
        assert fsdp_jobs.weights(model) == fsdp_jobs.weights(alone)
    fsdp_jobs.train(model, ours, LENGTH + 1, LENGTH + 2)
    fsdp_jobs.train_alone(alone, theirs, LENGTH + 1, LENGTH + 2, distributed.get_world_size())
    assert averages(averager) == averages(plain)


def sharded_literally() -> None:
    """FSDP2 on any number of ranks, against the loop over this rank's own shards."""
    model = fsdp_jobs.sharded_network()
    opt = adamw(model)
    averager = rf.Averager(model, rf.ema(0.75), optimizer=opt)

    def own(tensors: Iterable[Any]) -> list[Tensor]:
        return [t.detach().to_local().clone() for t in tensors]

    literal: list[Tensor] = []
    for step in range(1, LENGTH + 1):
        fsdp_jobs.train(model, opt, step, step)
        x = own(model.parameters())
        literal = [a + 0.25 * (b - a) for a, b in zip(literal or x, x, strict=True)]
    assert averager.n_averaged == LENGTH
    # Of four ranks the last has nothing.
    assert any(shard.numel() > 0 for shard in literal) == (distributed.get_rank() < 3)
    held = own(averager.state[p]["average"] for p in model.parameters())
    assert all(map(torch.equal, held, literal))
    with averager.averaged():
        assert all(map(torch.equal, own(model.parameters()), literal))
    assert all(map(torch.equal, own(model.parameters()), x))


def teacher_as_alone() -> None:
    """A teacher that is sharded as its student, from weights of its own on."""
    model, teacher = fsdp_jobs.sharded_network(), fsdp_jobs.sharded_network()
    alone, other = fsdp_jobs.network(), fsdp_jobs.network()
    with torch.no_grad():
        for p in (*teacher.parameters(), *other.parameters()):
            p.mul_(0.5)
    ours, theirs = adamw(model), adamw(alone)
    rf.Averager(model, rf.ema(0.75), optimizer=ours, into=teacher)
    rf.Averager(alone, rf.ema(0.75), optimizer=theirs, into=other)
    for step in range(1, 4):
        fsdp_jobs.train(model, ours, step, step)
        fsdp_jobs.train_alone(alone, theirs, step, step, distributed.get_world_size())
        x, _ = fsdp_jobs.batch(0, 0)
        with torch.no_grad():  # which gathers the teacher's weights, as training does
            assert torch.equal(teacher.eval()(x), other.eval()(x)), step
    for p, q in zip(teacher.parameters(), other.parameters(), strict=True):
        assert bits(shards.whole(p)) == bits(q)


def teacher_sharded_otherwise() -> str:
    try:
        rf.Averager(fsdp_jobs.sharded_network(), rf.ema(0.75), into=fsdp_jobs.network())
    except ValueError as error:
        return str(error)
    return ""


def evaluated_before_a_sample() -> None:
    """A forward pass alone leaves gathered weights behind, in the places of the shards."""
    model, alone = fsdp_jobs.sharded_network(), fsdp_jobs.network()
    averager, plain = rf.Averager(model, rf.ema(0.5)), rf.Averager(alone, rf.ema(0.5))
    x, _ = fsdp_jobs.batch(0, 0)
    for _ in range(2):
        for module, by_hand in ((model, averager), (alone, plain)):
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1.5)
                module(x)
            by_hand.update()
    assert averager.n_averaged == 2 and averages(averager) == averages(plain)
    with torch.no_grad():
        model(x)
    named = averager.averages()
    assert named.keys() == plain.averages().keys()
    assert all(isinstance(a, DTensor) for a in named.values())
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    with torch.no_grad():
        model(x)
    assert opt.averages(model).keys() == named.keys()


def no_collective_in_a_sample() -> None:
    model = fsdp_jobs.sharded_network()
    averager = rf.Averager(model, rf.ema(0.5))
    with CommDebugMode() as communication:
        averager.update()
        averager.update()
    assert communication.get_total_counts() == 0


def tensor_parallel_as_alone(data: int, across: int) -> None:
    model, alone = tensor_parallel_jobs.parallel(data, across), tensor_parallel_jobs.Block()
    averager, plain = rf.Averager(model, rf.ema(0.5)), rf.Averager(alone, rf.ema(0.5))
    for step in range(3):
        with torch.no_grad():
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                p.mul_(1.5 + step)
                q.mul_(1.5 + step)
        averager.update()
        plain.update()
    assert averages(averager) == averages(plain)


def replicated(zero: bool) -> list[str | None]:
    """DistributedDataParallel, with ZeRO-1 or without. Returns the averages, equal on all ranks."""
    model = Driven()
    params = [p for p in model.parameters() if p.numel() > 0]
    ddp = DistributedDataParallel(model)
    options: dict[str, Any] = {"lr": 0.01, "foreach": True}
    opt: Any = (
        ZeroRedundancyOptimizer(params, torch.optim.AdamW, **options)
        if zero
        else torch.optim.AdamW(params, **options)
    )
    averager = rf.Averager(params, rf.ema(0.5), optimizer=opt)
    expected: list[Tensor] = []
    for step in range(1, 5):
        ddp.zero_grad()
        ddp(batch_of(distributed.get_rank(), step)).backward()
        opt.step()
        x = [p.detach() for p in params]
        pairs = zip(expected or x, x, strict=True)
        expected = [(a + 0.5 * (b - a)).clone() for a, b in pairs]
    found = [averager.state[p]["average"] for p in params]
    assert averager.n_averaged == 4
    assert all(map(torch.equal, found, expected))
    return [bits(t) for t in found]


def saved(folder: Path) -> None:
    model = fsdp_jobs.sharded_network()
    opt = adamw(model)
    averager = rf.Averager(model, rf.ema(0.5), optimizer=opt)
    fsdp_jobs.train(model, opt, 1, 3)
    dcp.save({"average": averager}, checkpoint_id=folder)


def loaded(folder: Path) -> tuple[list[str | None], int]:
    """On another number of ranks."""
    model = fsdp_jobs.sharded_network()
    averager = rf.Averager(model, rf.ema(0.5))
    dcp.load({"average": averager}, checkpoint_id=folder)
    return averages(averager), averager.n_averaged


def saved_averages() -> tuple[list[str | None], int]:
    """Of the run that `saved` saves."""
    model = fsdp_jobs.sharded_network()
    opt = adamw(model)
    averager = rf.Averager(model, rf.ema(0.5), optimizer=opt)
    fsdp_jobs.train(model, opt, 1, 3)
    return averages(averager), averager.n_averaged
