"""Whole training steps under FullyShardedDataParallel (FSDP1): what test_fsdp1.py runs on ranks.

Two ranks reduce gradients as g0 / 2 + g1 / 2, in which the order does not matter, so a plain model
that is given both batches ends with the same bits.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import fsdp_jobs
import torch
from elastic_jobs import refused
from fsdp_jobs import batch, loss, network, optimizer, train, train_alone
from runs import bits
from torch import distributed, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.functional import cross_entropy

import rbwa_fused as rf
import rbwa_fused.distributed

FSDP = FullyShardedDataParallel
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "full shard": {},
    "flat parameters": {"use_orig_params": False},
    "gathered until backward": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
    "not sharded": {"sharding_strategy": ShardingStrategy.NO_SHARD},
    "not sharded, flat": {
        "sharding_strategy": ShardingStrategy.NO_SHARD,
        "use_orig_params": False,
    },
    "bfloat16 compute": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
}


def sharded_network(model: nn.Module | None = None, **options: Any) -> nn.Module:
    options = {"use_orig_params": True, "device_id": CPU, **options}
    model = network() if model is None else model
    model[3] = FSDP(model[3], **options)  # type: ignore[index, operator]
    return FSDP(model, **options)


def plain_network(kind: str) -> nn.Module:
    """FSDP casts BatchNorm's parameters as all others, which BatchNorm does not take."""
    model = network()
    if "mixed_precision" in KINDS[kind]:
        model[1] = nn.Identity()  # type: ignore[index, operator]
    return model


def plain_names(tensors: dict[str, Any]) -> dict[str, str | None]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def weights(model: nn.Module) -> dict[str, str | None]:
    """Digests of the whole weights and of this rank's buffers, in a plain model's names."""
    whole = FSDP.summon_full_params(model, writeback=False)
    with whole if isinstance(model, FSDP) else nullcontext():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name.replace("_fsdp_wrapped_module.", ""): bits(t) for name, t in tensors.items()}


def evaluation_leaves_training_alone(kind: str) -> None:
    """A forward with averaged weights, and one with training weights right before and after."""
    ways: list[Any] = [torch.no_grad, torch.enable_grad]
    if "mixed_precision" in KINDS[kind]:
        ways.pop()  # FSDP trains no more after a forward with gradients that has no backward
    runs = []
    for evaluated in (False, True):
        model = sharded_network(plain_network(kind), **KINDS[kind])
        opt = optimizer(model)
        x, _ = batch(0, 0)
        outputs = []
        for step in range(1, 6):
            train(model, opt, step, step)
            model.eval()
            with torch.no_grad():
                outputs.append(model(x))
            for grad in ways if evaluated else ():
                with grad(), opt.averaged(model):
                    averaged = model(x).detach()
                with torch.no_grad():
                    assert not torch.equal(averaged, outputs[-1]) or step == 1
                    assert torch.equal(model(x), outputs[-1])
            model.train()
        if evaluated:
            plain = plain_network(kind).eval()
            plain.load_state_dict(opt.averaged_state_dict(model))
            if "mixed_precision" in KINDS[kind]:
                plain, x = plain.bfloat16(), x.bfloat16()
            assert torch.equal(plain(x), averaged)
        runs.append((weights(model), [bits(output) for output in outputs]))
    assert runs[0] == runs[1]


def same_bits_as_alone(kind: str, method_options: dict[str, Any]) -> None:
    model, alone = sharded_network(**KINDS[kind]), network()
    ours, theirs = optimizer(model, **method_options), optimizer(alone, **method_options)
    train(model, ours, 1, 6)
    train_alone(alone, theirs, 1, 6, distributed.get_world_size())
    assert weights(model) == weights(alone)
    with ours.averaged(model), theirs.averaged():
        assert weights(model) == weights(alone)
    assert weights(model) == weights(alone)
    averaged = theirs.averaged_state_dict(alone)
    assert plain_names(ours.averaged_state_dict(model)) == plain_names(averaged)
    assert weights(model) == weights(alone)


def memory_stays_fsdps() -> None:
    """One matrix fills its flat parameter, as a parameter does that may be moved elsewhere."""
    for use_orig_params in (False, True):
        model = FSDP(
            nn.Linear(4, 3, bias=False),
            device_id=CPU,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            use_orig_params=use_orig_params,
        )
        (p,) = model.parameters()
        before = p.data_ptr()
        rf.FusedSGD([p], lr=0.1)
        assert p.data_ptr() == before


def before_the_first_forward() -> None:
    """A loaded checkpoint, evaluated before anything has run."""
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 3)
    saved = copy.deepcopy(opt.state_dict())
    fresh = sharded_network()
    other = optimizer(fresh)
    other.load_state_dict(saved)
    with opt.averaged(model):
        expected = weights(model)
    with other.averaged(fresh):
        found = weights(fresh)
    names = [name for name, _ in network().named_parameters()]
    assert [found[name] for name in names] == [expected[name] for name in names]


def checkpoint_goes_on(use_orig_params: bool) -> None:
    """FSDP's own gathering and scattering of an optimizer's state."""
    model = sharded_network(use_orig_params=use_orig_params)
    opt = optimizer(model)
    train(model, opt, 1, 3)
    # Offloading a CPU's state is no copy: all streams would be views of one buffer (torch 2.14.1).
    whole = FullOptimStateDictConfig(offload_to_cpu=False)
    FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, None, whole)
    saved = copy.deepcopy(FSDP.optim_state_dict(model, opt))
    held = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, opt, 4, 6)
    again = sharded_network(use_orig_params=use_orig_params)
    other = optimizer(again)
    again.load_state_dict(held)
    other.load_state_dict(FSDP.optim_state_dict_to_load(again, other, saved))
    train(again, other, 4, 6)
    assert other.n_averaged == opt.n_averaged == 6
    assert weights(again) == weights(model)
    with opt.averaged(model), other.averaged(again):
        assert weights(again) == weights(model)


def scaler_skips_everywhere() -> None:
    model = sharded_network()
    opt = optimizer(model)
    scaler = ShardedGradScaler(device="cpu", init_scale=1024.0)
    skipped = []
    for step in range(1, 5):
        scaler.scale(loss(model, step, distributed.get_rank())).backward()
        if step == 3 and distributed.get_rank() == 1:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(torch.inf)
        before = weights(model)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        after = weights(model)
        skipped.append(all(after[n] == before[n] for n, _ in network().named_parameters()))
    assert skipped == [False, False, True, False], skipped
    assert opt.n_averaged == 3


def batch_norm_statistics() -> None:
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 4)
    before = weights(model)
    loader = [batch(step, distributed.get_rank()) for step in range(3)]
    plain = network()
    plain.load_state_dict(opt.averaged_state_dict(model))
    torch.optim.swa_utils.update_bn(loader, plain)
    expected = {name: bits(buffer) for name, buffer in plain.named_buffers()}
    with rf.averaged_model(opt, model, loader):
        inside = weights(model)
        assert {name: inside[name] for name in expected} == expected
    assert weights(model) == before


def exception_in_evaluation() -> None:
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 3)
    before, (x, y) = weights(model), batch(0, 0)
    try:
        with opt.averaged(model):
            cross_entropy(model.eval()(x), y)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert weights(model) == before


def one_of_two_models(kind: StateDictType) -> None:
    """An optimizer of both, as of a generator and its critic, in each form of a state dict."""
    a, b = sharded_network(), sharded_network()
    opt = rf.FusedSGD([*a.parameters(), *b.parameters()], lr=0.1, average=rf.ema(0.5))
    for step in range(1, 4):
        (loss(a, step, 0) + loss(b, step, 1)).backward()
        opt.step()
        opt.zero_grad()
    before, versions = weights(a), [p._version for p in a.parameters()]
    whole = FullStateDictConfig(rank0_only=True)
    config = whole if kind is StateDictType.FULL_STATE_DICT else None
    with FSDP.state_dict_type(a, kind, config):
        with opt.averaged(nn.ModuleList([a, b])):
            expected = copy.deepcopy({k: shards_of(v) for k, v in a.state_dict().items()})
            inside = opt.averaged_state_dict(a)
        versions = [p._version for p in a.parameters()]
        found = opt.averaged_state_dict(a)
    for averaged in (inside, found):
        assert {k: [bits(t) for t in shards_of(v)] for k, v in averaged.items()} == {
            k: [bits(t) for t in v] for k, v in expected.items()
        }
    assert weights(a) == before
    assert [p._version for p in a.parameters()] == versions  # a backward pass may need them


def shards_of(value: Any) -> list[Any]:
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value]


def summoned(inside: bool) -> list[str]:
    """`averaged()` around summon_full_params, and within it, where both would write."""
    model = sharded_network().eval()
    opt = optimizer(model)
    train(model, opt, 1, 3)
    before, averaged = weights(model), plain_names(opt.averaged_state_dict(model))
    found = []
    for writeback in (True, False):
        whole = FSDP.summon_full_params(model, writeback=writeback)
        if inside:
            with opt.averaged(model), whole:
                assert weights_of_whole(model).items() <= averaged.items()
                for p in model.parameters():
                    p.data.add_(1)
        else:
            with whole:
                found += [refused(lambda: opt.averaged(model).__enter__())]
                found += [refused(lambda: opt.averaged_state_dict(model))]
                assert weights_of_whole(model).items() <= before.items()
        assert weights(model) == before
    assert plain_names(opt.averaged_state_dict(model)) == averaged
    train(model, opt, 4, 4)
    return found


def weights_of_whole(model: nn.Module) -> dict[str, str | None]:
    """Of a model that is summoned."""
    return {n.replace("_fsdp_wrapped_module.", ""): bits(p) for n, p in model.named_parameters()}


def refusals() -> dict[str, str]:
    model = sharded_network()
    opt = optimizer(model)
    train(model, opt, 1, 2)
    before = weights(model)
    tries: dict[str, Any] = {
        "no model": lambda: opt.averaged().__enter__(),
        "another model": lambda: opt.averaged(network()).__enter__(),
        "what the root wraps": lambda: opt.averaged(model.module).__enter__(),  # type: ignore
        "in_backward": lambda: rf.FusedSGD(model.parameters(), in_backward=True),
        "pull": lambda: rf.pull_([model, sharded_network()], 0.5),
        "synchronize": lambda: rf.distributed.synchronize(opt, 0),
    }
    found = fsdp_jobs.refused(tries)
    assert weights(model) == before
    train(model, opt, 3, 3)
    return found
