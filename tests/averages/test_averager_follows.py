"""What becomes of averages where a program exchanges what is averaged: none, some or all of it."""

from __future__ import annotations

import copy

import pytest
import torch
from beside import Net, adamw, as_bits, train, trainable
from torch import Tensor, nn

import rbwa_fused as rf


class Two(nn.Module):
    """Two layers of one shape, and one buffer that each step assigns anew."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.register_buffer("seen", torch.zeros(2))
        self.fill(0.0, 0.0)

    def fill(self, a: float, b: float) -> None:
        with torch.no_grad():
            self.a.weight.fill_(a)
            self.b.weight.fill_(b)


def values(averager: rf.Averager) -> dict[str, float]:
    return {name: a.unique().item() for name, a in averager.averages().items()}


def test_weights_that_are_loaded_with_assign_go_on_with_their_averages() -> None:
    """All parameters are others then; a restart of the mean would forget its samples."""
    net = Two()
    averager = rf.Averager(net, rf.mean())
    for value in (0.0, 3.0):
        net.fill(value, value)
        averager.update()
    state = {name: torch.full_like(value, 6.0) for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    saved = averager.state_dict()
    assert saved["param_groups"][0]["n_averaged"] == 2 and len(saved["state"]) == 2
    assert values(averager) == {"a.weight": 1.5, "b.weight": 1.5}
    averager.update()
    assert values(averager) == {"a.weight": 3.0, "b.weight": 3.0} and averager.n_averaged == 3


@pytest.mark.parametrize("into", [False, True])
def test_behind_an_optimizer_too_and_into_a_teacher(into: bool) -> None:
    nets = []
    for assigned in (True, False):
        net = Net()
        opt = adamw(net)
        teacher = copy.deepcopy(net).requires_grad_(False) if into else None
        averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, into=teacher)
        train(net, [opt], 1, 3)
        if assigned:
            before = trainable(net)
            net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
            net.frozen.requires_grad_(False)
            opt.param_groups[0]["params"] = trainable(net)
            for old, new in zip(before, trainable(net), strict=True):
                opt.state[new] = opt.state.pop(old)
        train(net, [opt], 4, 6)
        nets.append(as_bits((list(net.parameters()), averager.averages(), averager.n_averaged)))
    assert nets[0] == nets[1]


def test_a_module_whose_only_buffer_is_assigned_in_each_step_has_its_average() -> None:
    net = Two()
    averager = rf.Averager(net, rf.ema(0.5), buffers=True)
    for value in (0.0, 1.0, 2.0):
        net.seen = torch.full((2,), value)
        averager.update()
    assert values(averager)["seen"] == 1.25
    assert [group["n_averaged"] for group in averager.state_dict()["param_groups"]] == [3, 3]


def test_layers_that_change_places_take_their_averages_along() -> None:
    net = Two()
    averager = rf.Averager(net, rf.ema(0.5))
    averager.update()
    net.fill(1.0, 10.0)
    net.a, net.b = net.b, net.a
    averager.update()
    assert values(averager) == {"a.weight": 5.0, "b.weight": 0.5}
    net.c = net.a
    del net.a
    averager.update()
    assert values(averager) == {"b.weight": 0.75, "c.weight": 7.5}


def test_a_layer_that_is_put_in_between_leaves_the_others_their_averages() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    averager = rf.Averager(net, rf.ema(0.5))
    for value in (0.0, 4.0):
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.fill_((i + 1) * value)
        averager.update()
    between = nn.Linear(2, 2, bias=False)
    net.insert(1, between)
    averager.update()
    a = [averager.state[p]["average"] for p in net.parameters()]
    assert a[0].eq(3.0).all() and a[2].eq(6.0).all() and torch.equal(a[1], between.weight)


@pytest.mark.parametrize("policy", [rf.ema(0.5), rf.lookahead(2, 0.5)], ids=repr)
def test_a_checkpoint_of_before_the_first_step_is_no_obstacle(policy: rf.Average) -> None:
    """Its averages have no sample, and may be those of another shape and dtype by then."""
    results = []
    for loaded in (True, False):
        net = Net()
        averager = rf.Averager(net, policy)
        if loaded:
            averager.load_state_dict(copy.deepcopy(averager.state_dict()))
        net.last.weight = nn.Parameter(torch.ones(3, 7))
        net.double()
        for value in (1.0, 2.0):
            with torch.no_grad():
                net.last.weight.fill_(value)
            averager.update()
        results.append(as_bits((averager.averages(), averager.n_averaged)))
    assert results[0] == results[1]


def test_what_was_given_before_the_first_step_goes_with_its_parameter() -> None:
    net = Two()
    averager = rf.Averager(net, rf.ema(0.5))
    old = net.a.weight
    net.a.weight = nn.Parameter(torch.ones(3, 3))
    averager.update()
    assert old not in averager.state and len(averager.state) == 2
