"""What stands beside an optimizer in torch: parametrizations, vectors, functions, averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import FLAT, WAYS, digests, evaluated, held, network, take
from runs import bits, result
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rbwa_fused as rf

# ---- what replaces a module's parameters ------------------------------------------------------


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model[0])


def spectral_norm(model: Any) -> None:
    parametrizations.spectral_norm(model[2])


def orthogonal(model: Any) -> None:
    parametrizations.orthogonal(model[2])


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


def symmetric(model: Any) -> None:
    parametrize.register_parametrization(model[2], "weight", Symmetric())


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    prune.random_structured(model[3], "weight", amount=1, dim=1)


CHANGES: list[Callable[[Any], None]] = [weight_norm, spectral_norm, orthogonal, symmetric, pruned]


def undone(model: Any) -> None:
    """As their documentation says: the parameter gets the value that forward has used."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
            if prune.is_pruned(module):
                prune.remove(module, "weight")


def steps_and_change(change: Callable[[Any], None], when: str, options: dict[str, Any]) -> Any:
    """Changed before or after the optimizer is built, and changed back; what has become of it."""
    torch.manual_seed(1)
    model = network()
    if when == "before":
        change(model)
    opt = rf.FusedSGD(model.parameters(), **options)
    take(model, opt, 1, 3)
    if when == "after":
        change(model)
    take(model, opt, 4, 6)
    seen = [held(model), result(opt), evaluated(model, opt)]
    if when == "after" or change is pruned:  # or the parameter is one that the optimizer never had
        undone(model)
        take(model, opt, 7, 9)
        seen += [held(model), result(opt), evaluated(model, opt)]
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_parametrized_and_pruned_layers_take_the_steps_that_they_take_without_flat_memory(
    change: Callable[[Any], None], when: str, way: str
) -> None:
    assert steps_and_change(change, when, FLAT) == steps_and_change(change, when, WAYS[way])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_parametrized_and_pruned_layers_follow_torchs_sgd(change: Callable[[Any], None]) -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        torch.manual_seed(1)
        model = network().double()
        opt = make(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        for step in range(1, 9):
            if step == 4:
                change(model)
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).double()
            model(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
        ends.append(model.state_dict())
    for name, ours in ends[0].items():
        # float64; torch may contract a product and a sum, and eight steps carry that on
        torch.testing.assert_close(ours, ends[1][name], rtol=1e-11, atol=1e-11, msg=name)


def test_a_pruned_weight_stays_pruned_in_the_average() -> None:
    model = network()
    pruned(model)
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    take(model, opt, 1, 4)
    with opt.averaged():
        model(torch.ones(2, 4))
        assert model[0].weight[model[0].weight_mask == 0].count_nonzero() == 0
        assert bits(model[0].weight_orig) == bits(opt.averaged_state_dict(model)["0.weight_orig"])
    take(model, opt, 5, 6)


# ---- vectors, gradients, functions -------------------------------------------------------------


def test_parameters_become_views_of_one_vector_and_are_still_stepped() -> None:
    ends = []
    for options in (FLAT, *WAYS.values()):
        model = network()
        opt = rf.FusedSGD(model.parameters(), **options)
        take(model, opt, 1, 3)
        vector = nn.utils.parameters_to_vector(model.parameters()).detach() * 0.5
        nn.utils.vector_to_parameters(vector, model.parameters())
        take(model, opt, 4, 6)
        ends.append([held(model), result(opt), evaluated(model, opt), bits(vector)])
        now = nn.utils.parameters_to_vector(model.parameters()).detach()
        assert bits(now) == bits(vector)  # stepped where it was put
    assert ends[0] == ends[1] == ends[2]


def clip_norm(params: Any) -> None:
    nn.utils.clip_grad_norm_(params, 0.5)


def clip_value(params: Any) -> None:
    nn.utils.clip_grad_value_(params, 0.1)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipped_gradients_are_what_is_stepped(clip: Callable[[Any], None]) -> None:
    ends = []
    for make in (rf.FusedSGD, torch.optim.SGD):
        model = network()
        opt = make(model.parameters(), lr=0.5)
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(2, 4)).square().sum().backward()
        raw = [p.grad.clone() for p in model.parameters()]
        clip(model.parameters())
        assert any(not g.equal(p.grad) for g, p in zip(raw, model.parameters(), strict=True))
        for p, start in zip(model.parameters(), before, strict=True):
            start.sub_(0.5 * p.grad)  # 0.5 g is exact, so one rounding whoever computes it
        opt.step()
        for p, expected in zip(model.parameters(), before, strict=True):
            assert bits(p) == bits(expected)
        ends.append(held(model))
    assert ends[0] == ends[1]


def test_functional_calls_take_averages_without_putting_them_in_place() -> None:
    model = network()
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    take(model, opt, 1, 4)
    before, x = held(model), torch.randn(5, 4)
    averaged = opt.averaged_state_dict(model)
    outside = torch.func.functional_call(model, averaged, (x,))
    with opt.averaged():
        assert bits(outside) == bits(model(x))
    assert held(model) == before


def test_gradients_of_a_functional_call_are_stepped() -> None:
    model, plain = network(), network()
    opt, usual = (rf.FusedSGD(m.parameters(), **FLAT) for m in (model, plain))
    for step in range(1, 5):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))

        def loss(params: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return torch.func.functional_call(model, params, (x,)).square().sum()

        grads = torch.func.grad(loss)({k: p.detach() for k, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.grad = grads[name]
        opt.step()
        opt.zero_grad()
        take(plain, usual, step, step)
    assert held(model) == held(plain)
    assert result(opt) == result(usual)


# ---- averages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "average", [rf.ema(0.7), rf.mean(), rf.lookahead(2), rf.rbwa(2, 1)], ids=str
)
def test_the_average_of_a_frozen_layer_is_the_layer(average: rf.Average) -> None:
    model = network()
    for p in model[2].parameters():
        p.requires_grad_(False)
    frozen = held(model[2])
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, average=average)
    take(model, opt, 1, 7)
    assert held(model[2]) == frozen
    with opt.averaged():
        assert held(model[2]) == frozen
    assert digests(opt.averaged_state_dict(model[2])) == frozen


def test_an_averaged_model_beside_neither_disturbs_nor_is_disturbed() -> None:
    model, plain, usual = network(), network(), network()
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    alone = rf.FusedSGD(plain.parameters(), **FLAT)
    moved = rf.FusedSGD(usual.parameters(), **WAYS["where they were"])
    beside, expected = (
        AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.7)) for m in (model, usual)
    )
    for step in range(1, 7):
        for m, o in ((model, opt), (plain, alone), (usual, moved)):
            take(m, o, step, step)
        beside.update_parameters(model)
        expected.update_parameters(usual)
        with opt.averaged():
            pass
    assert result(opt) == result(alone)
    assert held(beside) == held(expected)
    for name, ours in opt.averaged_state_dict(model).items():
        # AveragedModel computes a + (1 - 0.7) (x - a) with lerp, whose product and sum are one
        # rounding where ours are two: an ULP of the larger operand for each of six samples.
        theirs = beside.module.state_dict()[name]
        torch.testing.assert_close(ours, theirs, rtol=6 * 2**-23, atol=6 * 2**-24)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_autocasts_cache_does_not_keep_the_weights_of_before(grad: Callable[[], Any]) -> None:
    model = network()
    opt = rf.FusedSGD(model.parameters(), **FLAT)
    take(model, opt, 1, 4)
    x = torch.randn(5, 4)
    with opt.averaged(), torch.autocast("cpu", torch.bfloat16):
        averaged = bits(model(x))
    with torch.autocast("cpu", torch.bfloat16), grad():
        live = bits(model(x))
        with opt.averaged():
            assert bits(model(x)) == averaged != live
        assert bits(model(x)) == live
        opt.adopt(model)
        assert bits(model(x)) == averaged
