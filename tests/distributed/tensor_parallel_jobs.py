"""Tensor parallel layers, alone and under FSDP2: what test_tensor_parallel.py runs on ranks."""

from __future__ import annotations

from pathlib import Path

import shards
import torch
import torch.distributed.checkpoint as dcp
from shards import optimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import rbwa_fused as rf

FEATURES = 6
STEPS = 5


class Block(nn.Module):
    """Norm, up, down: the usual plan for tensor parallel training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, 12)
        self.down = nn.Linear(12, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(self.norm(x)).relu())
        return result


def parallel(data: int, across: int) -> nn.Module:
    """A block over `across` ranks, sharded over `data` such groups if there are several."""
    mesh = shards.mesh(data, across, names=("data", "across"))
    model = Block()
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, mesh["across"], plan)
    if data > 1:
        fully_shard(model, mesh=mesh["data"])
    return model


def backward(model: nn.Module, step: int, across: int) -> None:
    """Of a sequence whose length is a multiple of the ranks', each rank bringing its part."""
    x = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(step))
    x = x.chunk(across)[torch.distributed.get_rank() % across]
    y = model(x)
    (shards.whole(y) if isinstance(y, DTensor) else y).square().mean().backward()


def same_bits_as_alone(data: int, across: int, rule: str) -> list[str]:
    """A plain block that is given the gathered gradients. Returns how parameters are laid out."""
    model, alone = parallel(data, across), Block()
    ours, theirs = (optimizer(m, rule, lr=0.01) for m in (model, alone))
    for step in range(1, STEPS + 1):
        backward(model, step, across)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None
            q.grad = shards.whole(p.grad).clone()
            assert q.grad.any()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert not shards.differences(shards.result(model, ours), shards.result(alone, theirs))
    training = [shards.bits(shards.whole(p)) for p in model.parameters()]
    with ours.averaged(model), theirs.averaged():
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(shards.whole(p), q)
        assert training != [shards.bits(shards.whole(p)) for p in model.parameters()]
    assert training == [shards.bits(shards.whole(p)) for p in model.parameters()]
    return [str(p.placements) for p in model.parameters()]  # type: ignore[union-attr]


def gradients_laid_out_otherwise() -> None:
    """A gradient that is a sum over ranks, or sharded along another dimension."""
    mesh = shards.mesh()
    rank = torch.distributed.get_rank()
    full = torch.arange(24.0).reshape(4, 6) / 7
    for placements, make in {
        (Partial(),): lambda step: full * step * (rank + 1) / 3,  # 1/3 + 2/3
        (Shard(1),): lambda step: (full * step).chunk(2, dim=1)[rank].contiguous(),
        (Replicate(),): lambda step: full * step,
    }.items():
        for own in (Shard(0), Replicate()):
            weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
            p = nn.Parameter(distribute_tensor(weight, mesh, [own]))
            q = nn.Parameter(weight.clone())
            ours, theirs = optimizer(named(p)), optimizer(named(q))
            for step in (1, 2, 3):
                p.grad = DTensor.from_local(make(step), mesh, placements)
                q.grad = p.grad.full_tensor()
                ours.step()
                theirs.step()
            assert p.placements == p.grad.placements == (own,)  # type: ignore
            assert torch.equal(shards.whole(p), q)
            assert torch.equal(shards.whole(ours.state[p]["average"]), theirs.state[q]["average"])


def gradients_under_way() -> None:
    """A gradient whose collective nobody has waited for."""
    mesh = shards.mesh()
    p = nn.Parameter(distribute_tensor(torch.ones(400_000), mesh, [Replicate()]))
    opt = rf.FusedSGD([p], lr=1.0)
    for step in (1, 2, 3):
        term = DTensor.from_local(torch.full((400_000,), step / 2), mesh, [Partial()])
        p.grad = term.redistribute(placements=[Replicate()], async_op=True)
        assert hasattr(p.grad._local_tensor, "trigger_wait")  # type: ignore[attr-defined]
        opt.step()
    assert torch.equal(shards.whole(p), torch.full((400_000,), 1.0 - 1 - 2 - 3))


def named(p: nn.Parameter) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", p)
    return module


def checkpoint(folder: str) -> None:
    """2 x 2 ranks save; the same ranks, otherwise laid out, go on with the same bits."""
    model = parallel(2, 2)
    opt = optimizer(model)
    for step in (1, 2, 3):
        backward(model, step, 2)
        opt.step()
        opt.zero_grad()
    names = ("model", "optim")
    dcp.save(dict(zip(names, get_state_dict(model, opt), strict=True)), checkpoint_id=Path(folder))
    for sizes in ((2, 2), (1, 4), (4, 1)):
        other = parallel(*sizes)
        loaded = optimizer(other)
        held = dict(zip(names, get_state_dict(other, loaded), strict=True))
        dcp.load(held, checkpoint_id=Path(folder))
        set_state_dict(
            other, loaded, model_state_dict=held["model"], optim_state_dict=held["optim"]
        )
        assert not shards.differences(shards.result(other, loaded), shards.result(model, opt))
        shards.train(other, loaded, 4, 4)
        if sizes == (2, 2):
            expected = shards.result(other, loaded)
        assert not shards.differences(shards.result(other, loaded), expected)
