"""Reading averages: blends, a module of one's own, the live tensors, and weights for good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import Net, adamw, as_bits, loss, train, trainable
from torch import Tensor, nn

import rbwa_fused as rf

Made = tuple[Net, Any, Any]  # the network, its optimizer, and who has the averages


def fused(dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    net = Net().to(dtype)
    opt = rf.FusedSGD(trainable(net), lr=0.05, average=rf.ema(0.5), **options)
    return net, opt, opt


def beside(dtype: torch.dtype = torch.float32) -> Made:
    net = Net().to(dtype)
    opt = adamw(net)
    return net, opt, rf.Averager(net, rf.ema(0.5), optimizer=opt)


MADE: dict[str, Callable[[], Made]] = {
    "FusedSGD": fused,
    "Averager": beside,
    "bfloat16": lambda: fused(torch.bfloat16),
    "masters": lambda: fused(torch.bfloat16, master_weights=True),
}


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest) -> Made:
    net, opt, averaging = MADE[request.param]()
    train(net, [opt], 1, 4)
    return net, opt, averaging


def average(averaging: Any, p: Tensor) -> Tensor:
    found: Tensor = averaging.state[p]["average"]
    return found


@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
def test_a_blend_lies_between_the_weights_and_their_average(made: Made, blend: float) -> None:
    net, _, averaging = made
    expected = {}
    for name, p in net.named_parameters():
        held = averaging.state.get(p, {})
        if "average" in held:
            x = held.get("master_param", p).detach().to(held["average"].dtype)
            expected[name] = (x + blend * (held["average"] - x)).to(p.dtype)
    assert len(expected) >= 4
    before = as_bits(list(net.parameters()))
    with averaging.averaged(net, blend=blend):
        inside = dict(net.named_parameters())
        for name, value in expected.items():
            torch.testing.assert_close(inside[name].detach(), value, rtol=1e-6, atol=0)
            assert blend == 1.0 or torch.equal(inside[name], value)
    assert as_bits(list(net.parameters())) == before
    state = averaging.averaged_state_dict(net, blend=blend)
    assert blend == 1.0 or all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_blend_is_a_part(made: Made) -> None:
    net, _, averaging = made
    for blend in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="Invalid blend"):
            averaging.averaged(net, blend=blend)
        with pytest.raises(ValueError, match="Invalid blend"):
            averaging.averaged_state_dict(net, blend=blend)


def test_another_module_is_given_the_averages(made: Made) -> None:
    net, _, averaging = made
    other = Net().to(net.last.weight.dtype)
    averaging.copy_to(other, net)
    assert as_bits(other.state_dict()) == as_bits(averaging.averaged_state_dict(net))
    with pytest.raises(RuntimeError, match="Missing key"):
        averaging.copy_to(nn.Linear(2, 2), net)


def test_averages_by_name_are_the_live_ones_across_loads(made: Made) -> None:
    net, opt, averaging = made
    named = averaging.averages(net)
    assert named["last.weight"] is average(averaging, net.last.weight)
    saved = copy.deepcopy(averaging.state_dict())
    before = as_bits(named)
    train(net, [opt], 5, 6)
    assert as_bits(named) != before
    averaging.load_state_dict(saved)
    assert as_bits(named) == before
    assert averaging.averages(net)["last.weight"] is named["last.weight"]
    with pytest.raises(ValueError, match="none of Linear's parameters"):
        averaging.averages(nn.Linear(2, 2))


def test_an_average_that_is_the_parameter_is_named_too() -> None:
    for options in ({}, {"master_weights": True}):
        net = Net().to(torch.bfloat16 if options else torch.float32)
        policy = rf.Average(rf.Mean(), write_back_every=1)
        opt = rf.FusedSGD(trainable(net), lr=0.05, average=policy, **options)
        assert opt.averages(net) == {}
        train(net, [opt], 1, 2)
        named = opt.averages(net)
        p = net.last.weight
        expected = opt.state[p]["master_param"] if options else p
        assert named["last.weight"].data_ptr() == expected.data_ptr()


def test_a_run_may_end_with_its_averages(made: Made) -> None:
    net, _, averaging = made
    state = averaging.averaged_state_dict(net)
    with averaging.averaged(net), pytest.raises(RuntimeError, match=r"adopt\(\) inside averaged"):
        averaging.adopt(net)
    value = loss(net, 1)
    averaging.adopt(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    assert as_bits(net.state_dict()) == as_bits(state)
    held = averaging.state[net.last.weight]
    assert torch.equal(
        held.get("master_param", net.last.weight),
        held["average"].to(held.get("master_param", net.last.weight).dtype),
    )
    assert averaging.n_averaged == 4
    kept = average(averaging, net.last.weight).clone()
    with averaging.averaged(net):
        assert torch.equal(net.last.weight, kept.to(net.last.weight.dtype))


def test_statistics_may_be_weighted_by_the_sizes_of_batches() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    opt = rf.FusedSGD(net[0].parameters(), lr=0.1, average=rf.ema(0.5))
    norm: Any = net[0]
    batches = [torch.randn(n, 3, 4) for n in (8, 8, 2)]
    means = torch.stack([b.mean((0, 2)) for b in batches])
    sizes = torch.tensor([8.0, 8.0, 2.0])
    with rf.averaged_model(opt, net, batches, weighted=True):
        expected = (means * sizes[:, None]).sum(0) / sizes.sum()
        torch.testing.assert_close(norm.running_mean, expected)
    with rf.averaged_model(opt, net, batches):
        torch.testing.assert_close(norm.running_mean, means.mean(0))


def test_a_model_may_be_evaluated_with_a_blend() -> None:
    net, opt, averager = beside()
    train(net, [opt], 1, 4)
    x = net.last.weight.detach().clone()
    expected = x + 0.5 * (average(averager, net.last.weight) - x)
    with rf.averaged_model(averager, net, [], blend=0.5):
        assert torch.equal(net.last.weight, expected)
    tensors = rf.Averager(net.parameters(), rf.ema(0.5))
    with pytest.raises(TypeError, match="needs a model here"):
        tensors.averages()


# ---- averages that start before the first step ---------------------------------------------------


@pytest.mark.parametrize("sampled", ["by the optimizer", "by a hook", "by hand"])
def test_an_average_from_now_on_is_there_before_the_first_step_and_before_start(
    sampled: str,
) -> None:
    """By its definition in float64: the initial weights, then samples behind steps 3 and 5."""
    policy = rf.ema(0.75, start=2, every=2, initial="now", offset=1)
    net = Net().double()
    first = [p.detach().clone() for p in net.parameters()]
    opt: Any
    if sampled == "by the optimizer":
        opt = averager = rf.FusedSGD(net.parameters(), lr=0.1, average=policy)
    else:
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        averager = rf.Averager(net, policy, optimizer=opt if sampled == "by a hook" else None)
    assert averager.n_averaged == 1
    with averager.averaged():
        assert all(map(torch.equal, net.parameters(), first))
    expected = [p.clone() for p in first]
    for step in range(1, 6):
        loss(net, step).backward()
        opt.step()
        opt.zero_grad()
        if sampled == "by hand":
            averager.update()
        if step in (3, 5):
            for a, p in zip(expected, net.parameters(), strict=True):
                a += 0.25 * (p.detach() - a)
        held = list(averager.averages(net).values())
        assert all(map(torch.equal, held, expected))
        assert averager.n_averaged == 1 + (step - 1) // 2
        with averager.averaged():
            assert all(map(torch.equal, net.parameters(), expected))
    fresh = rf.FusedSGD(net.parameters(), lr=0.1, average=policy)
    if sampled == "by the optimizer":
        fresh.load_state_dict(opt.state_dict())
        assert fresh.n_averaged == 3


def test_the_average_from_now_on_of_loaded_weights_is_of_those() -> None:
    """An optimizer is often made before its model's checkpoint is loaded."""
    net, other = Net(), Net()
    opt = rf.FusedSGD(net.parameters(), lr=0.1, average=rf.ema(0.75, start=5, initial="now"))
    assert not opt.state  # or torch.distributed.checkpoint takes it for one that has stepped
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    net.load_state_dict(other.state_dict())
    loss(net, 1).backward()
    opt.step()
    held = list(opt.averages(net).values())
    assert all(map(torch.equal, held, other.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_asked_for_before_the_first_step_are_those_that_are_sampled(
    dtype: torch.dtype,
) -> None:
    net = Net().to(dtype)
    policy = rf.ema(0.75, initial="now")
    opt = rf.FusedSGD(net.parameters(), lr=0.1, average=policy, master_weights=True)
    before = [p.detach().clone() for p in net.parameters()]
    held = opt.averages(net)
    assert all(torch.equal(a.to(dtype), p) for a, p in zip(held.values(), before, strict=True))
    loss(net, 1).backward()
    opt.step()
    again = opt.averages(net)
    assert all(again[name] is held[name] for name in held) and opt.n_averaged == 2
    assert any(not torch.equal(a.to(dtype), p) for a, p in zip(again.values(), before, strict=True))


def test_nothing_starts_inside_averaged_nor_without_parameters() -> None:
    """What is read inside leaves the run as it is."""
    net = Net()
    policy = rf.ema(0.75, initial="now")
    opt = rf.FusedSGD(net.parameters(), lr=0.1, average=policy)
    with opt.averaged():
        assert opt.averages(net) == {}
    assert not opt.state and opt.averages(net).keys() == dict(net.named_parameters()).keys()
    assert rf.FusedSGD([{"params": []}], lr=0.1, average=policy).n_averaged == 0
