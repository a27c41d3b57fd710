"""Whole training steps under FSDP2, forward and backward included: what test_fsdp.py runs on ranks.

Two ranks reduce gradients as (g0 + g1) / 2, in which the order does not matter, so a plain model
that is given both batches ends with the same bits.
"""

from __future__ import annotations

from typing import Any

import shards
import torch
from runs import bits
from shards import optimizer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy

import rbwa_fused as rf
from rbwa_fused.several import policies_of

FEATURES, CLASSES, BATCH = 6, 3, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 9), nn.Linear(9, CLASSES)
    )


def sharded_network(**options: Any) -> nn.Module:
    model = network()
    for layer in (model[3], model):  # type: ignore[index]
        fully_shard(layer, mesh=shards.mesh(), **options)
    return model


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def loss(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank)
    return cross_entropy(model(x).float(), y)


def train(model: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        loss(model, step, distributed.get_rank()).backward()
        opt.step()
        opt.zero_grad()


def train_alone(model: nn.Module, opt: Any, first: int, last: int, world: int) -> None:
    """The same steps of a plain model that sees the batch of every rank."""
    params = list(model.parameters())
    for step in range(first, last + 1):
        grads = []
        for rank in range(world):
            kept = [buffer.clone() for buffer in model.buffers()]
            grads.append(torch.autograd.grad(loss(model, step, rank), params))
            if rank != distributed.get_rank():  # BatchNorm sees what this rank has
                for buffer, value in zip(model.buffers(), kept, strict=True):
                    buffer.copy_(value)
        for p, *terms in zip(params, *grads, strict=True):
            p.grad = torch.stack(terms).sum(0) / world
        opt.step()


def weights(model: nn.Module) -> dict[str, str | None]:
    """Digests of the whole weights and of this rank's buffers, in a model's names."""
    found = {name: bits(shards.whole(p)) for name, p in model.named_parameters()}
    return found | {name: bits(b) for name, b in model.named_buffers()}


def same_bits_as_alone(method_options: dict[str, Any]) -> None:
    model, alone = sharded_network(), network()
    ours, theirs = optimizer(model, **method_options), optimizer(alone, **method_options)
    train(model, ours, 1, 6)
    assert weights(model) != weights(alone)
    train_alone(alone, theirs, 1, 6, distributed.get_world_size())
    assert weights(model) == weights(alone)
    for which in range(max(1, len(policies_of(ours.param_groups[0]["average"])))):
        with ours.averaged(model, which=which), theirs.averaged(which=which):
            assert weights(model) == weights(alone)
            x, _ = batch(0, 0)
            assert torch.equal(model.eval()(x), alone.eval()(x))


def no_collective_in_a_step() -> None:
    model = sharded_network()
    opt = optimizer(model, average=rf.ema(0.5))
    train(model, opt, 1, 1)
    assert len(opt.engine.tables.launches) == 1  # of one call of the kernel
    for step in (2, 3):
        loss(model, step, distributed.get_rank()).backward()
        places = [p._local_tensor.data_ptr() for p in model.parameters()]  # type: ignore
        before = [p._local_tensor.clone() for p in model.parameters()]  # type: ignore
        with CommDebugMode() as seen:
            opt.step()
        assert seen.get_total_counts() == 0
        with CommDebugMode() as seen, opt.averaged(model):
            pass
        assert seen.get_total_counts() == 0
        after = [p._local_tensor for p in model.parameters()]  # type: ignore
        assert places == [p.data_ptr() for p in after]  # FSDP's memory, stepped where it lies
        pairs = zip(before, after, strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.numel() > 0)
        opt.zero_grad()
    for p in model.parameters():
        for value in opt.state[p].values():
            assert type(value) is type(p) and value.placements == p.placements  # type: ignore
            assert value.shape == p.shape and value.device_mesh == p.device_mesh  # type: ignore


def evaluation_leaves_training_alone(reshard_after_forward: bool) -> None:
    """A forward with averaged weights, and one with training weights right before and after."""
    runs = []
    for evaluated in (False, True):
        model = sharded_network(reshard_after_forward=reshard_after_forward)
        opt = optimizer(model)
        x, _ = batch(0, 0)
        outputs = []
        for step in range(1, 6):
            train(model, opt, step, step)
            model.eval()
            with torch.no_grad():
                outputs.append(model(x))
                if evaluated:
                    for _ in range(2):
                        with opt.averaged(model):
                            averaged = model(x)
                    assert not torch.equal(averaged, outputs[-1]) or step == 1
                    assert torch.equal(model(x), outputs[-1])
            model.train()
        plain = network().eval()
        plain.load_state_dict(full(opt.averaged_state_dict(model)))
        if evaluated:
            assert torch.equal(plain(x), averaged)
        runs.append((weights(model), [bits(output) for output in outputs]))
    assert runs[0] == runs[1]


def gathered_ahead(async_op: bool) -> None:
    """unshard() just before the averages come, and before they go: a forward sees what is live."""
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 3)
    model.eval()
    x, _ = batch(0, 0)

    def gather() -> None:
        for module in (model[3], model):  # type: ignore[index]
            module.reshard()
            module.unshard(async_op=async_op)

    with torch.no_grad():
        trained = model(x)
        with opt.averaged(model):
            averaged = model(x)
        assert not torch.equal(averaged, trained)
        gather()
        with opt.averaged(model):
            assert torch.equal(model(x), averaged)
            gather()
        assert torch.equal(model(x), trained)


def full(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: shards.whole(value) for name, value in state_dict.items()}


def exception_in_evaluation() -> None:
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 3)
    before = weights(model)

    def state() -> list[Any]:
        kept = opt.state_dict()["state"].values()
        return [{key: bits(shards.whole(value)) for key, value in each.items()} for each in kept]

    held = state()
    try:
        with opt.averaged(model):
            assert weights(model) != before
            assert state() == held
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert weights(model) == before


def batch_norm_statistics() -> None:
    """averaged_model() re-estimates them with FSDP's forward, and brings all back."""
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 4)
    before = weights(model)
    loader = [batch(step, distributed.get_rank()) for step in range(3)]
    plain = network()
    plain.load_state_dict(full(opt.averaged_state_dict(model)))
    torch.optim.swa_utils.update_bn(loader, plain)
    with rf.averaged_model(opt, model, loader):
        inside = {name: bits(buffer) for name, buffer in model.named_buffers()}
        assert inside == {name: bits(buffer) for name, buffer in plain.named_buffers()}
    assert weights(model) == before


def follow(model: nn.Module, ours: Any, alone: nn.Module, theirs: Any, norm: float) -> None:
    """Steps of the sharded model, and of a plain one given the same gradients, gathered."""
    for step in (1, 2, 3, 4):
        loss(model, step, distributed.get_rank()).backward()
        assert shards.whole(nn.utils.clip_grad_norm_(model.parameters(), norm)) > 0.1
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None and p.grad.dtype == p.dtype
            q.grad = shards.whole(p.grad).clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert not shards.differences(shards.result(model, ours), shards.result(alone, theirs))


def clipping() -> None:
    model, alone = sharded_network(), network()
    follow(model, optimizer(model), alone, optimizer(alone), norm=0.1)


def mixed_precision(dtype: torch.dtype) -> None:
    """bfloat16 compute; shards, and so averages, in float32 or bfloat16."""

    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, CLASSES)).to(dtype)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, alone = layers(), layers()
    fully_shard(model, mesh=shards.mesh(), mp_policy=policy)
    opt = optimizer(model, average=rf.ema(0.9))
    seen = []
    model.register_forward_hook(lambda module, given, returned: seen.append(returned.dtype))
    follow(model, opt, alone, optimizer(alone, average=rf.ema(0.9)), norm=1e3)
    assert set(seen) == {torch.bfloat16}
    for p in model.parameters():
        assert p.dtype == dtype and opt.state[p]["average"].dtype == torch.float32


def scaler_skips_everywhere() -> None:
    model = sharded_network()
    opt = optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped = []
    for step in range(1, 5):
        value = scaler.scale(loss(model, step, distributed.get_rank()))
        if step == 3 and distributed.get_rank() == 1:
            value = value * torch.inf
        before = weights(model)
        value.backward()
        if step == 3:  # an inf in one rank's shards alone
            for i, p in enumerate(model.parameters()):
                assert p.grad is not None
                clean = torch.full_like(p.grad, 1.0)
                if distributed.get_rank() == 1 and i == 0:
                    clean._local_tensor.fill_(torch.inf)  # type: ignore[attr-defined]
                p.grad = clean
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        changed = [n for n, _ in model.named_parameters() if weights(model)[n] != before[n]]
        skipped.append(not changed)
    assert skipped == [False, False, True, False], skipped
    assert opt.n_averaged == 3


def another_shard() -> None:
    """FSDP replaces a shard, as it does when a model is converted or a checkpoint assigned."""
    model, opt = shards.build("ema", shards.sharded)
    alone, other = shards.build("ema", shards.plain)
    for step in range(1, 6):
        if step == 3:
            stale = [p._local_tensor for p in model.parameters() if p is not model.scalar]
            for p in model.parameters():
                if p is not model.scalar:
                    p._local_tensor = p._local_tensor.clone()
            kept = [shard.clone() for shard in stale]
        shards.train(model, opt, step, step)
        shards.train(alone, other, step, step)
    assert all(map(torch.equal, stale, kept))
    assert not shards.differences(shards.result(model, opt), shards.result(alone, other))


def refusals() -> dict[str, str]:
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 2)
    before = weights(model)
    mesh = shards.mesh()
    terms = torch.distributed.tensor.DTensor.from_local(
        torch.ones(3), mesh, [torch.distributed.tensor.Partial()]
    )
    tries: dict[str, Any] = {
        "no model": lambda: opt.averaged().__enter__(),
        "another model": lambda: opt.averaged(network()).__enter__(),
        "a part": lambda: opt.averaged(model[3]).__enter__(),  # type: ignore[index]
        "a sum": lambda: rf.FusedSGD([nn.Parameter(terms)]),
        "in_backward": lambda: rf.FusedSGD(model.parameters(), in_backward=True),
        "pull": lambda: rf.pull_([model, sharded_network()], 0.5),
    }
    found = refused(tries)
    assert weights(model) == before
    train(model, opt, 3, 3)
    return found


def refused(tries: dict[str, Any]) -> dict[str, str]:
    """What each of the attempts raises."""
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "nothing raised"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
