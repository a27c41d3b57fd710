"""`averaged_state_dict` is what `state_dict()` says inside `averaged()`, whatever the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map

import rbwa_fused as rf


class OfData(nn.Linear):
    """Saves what is no parameter and shows the same memory."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.data
        destination[prefix + "bias"] = self.bias.data


class OfCopies(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.detach().clone()
        destination[prefix + "bias"] = self.bias.detach().double().cpu()


class OfNegated(nn.Linear):
    """The same memory, seen with a minus."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = torch._neg_view(self.weight.data)
        destination[prefix + "bias"] = self.bias


class Extra(nn.Linear):
    """What is no tensor may hold one."""

    def get_extra_state(self) -> Any:
        return {"norms": [self.weight.detach().norm()], "version": 2, "live": self.bias.detach()}

    def set_extra_state(self, state: Any) -> None: ...


def hooked(change: Callable[[dict[str, Any], nn.Linear], Any]) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer._register_state_dict_hook(
        lambda module, state, prefix, metadata: change(state, layer)  # type: ignore[func-returns-value]
    )
    return layer


def add_merged(state: dict[str, Any], layer: nn.Linear) -> None:
    state["0.merged"] = layer.weight @ layer.weight


def drop_one(state: dict[str, Any], layer: nn.Linear) -> None:
    state["0.packed"] = torch.cat([state.pop("0.weight"), state.pop("0.bias")[None]])


def rename(state: dict[str, Any], layer: nn.Linear) -> None:
    state["0.w"] = state.pop("0.weight")


def of_data_tied() -> nn.Module:
    tied = OfData(4, 4)
    other = nn.Linear(4, 4)
    other.weight = tied.weight
    return nn.Sequential(tied, other)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(4, 4),
    "data": lambda: OfData(4, 4),
    "copies": lambda: OfCopies(4, 4),
    "negated": lambda: OfNegated(4, 4),
    "extra state": lambda: Extra(4, 4),
    "a hook that adds": lambda: hooked(add_merged),
    "a hook that packs": lambda: hooked(drop_one),
    "a hook that renames": lambda: hooked(rename),
    "tied": of_data_tied,
    "parametrized": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "empty": lambda: nn.Sequential(OfData(4, 4), nn.LayerNorm(4), nn.Linear(4, 0), nn.Linear(0, 4)),
}
# The keys are the same but for this prefix.
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "alone": lambda model: model,
    "torch.compile": lambda model: torch.compile(model),  # type: ignore[return-value]
    "module.": lambda model: nn.DataParallel(model),
}
POLICIES = {
    "ema": rf.ema(0.5),
    "written back": rf.lookahead(3),
    "in place": rf.rbwa(2, 0),
    "not yet": rf.ema(0.5, start=100),
}


def trained(
    layer: Callable[[], nn.Module], average: rf.Average, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, rf.FusedSGD]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without elements
        model = nn.Sequential(layer(), nn.BatchNorm1d(4)).to(dtype)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.5, average=average)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()
    return model, opt


def held(state: Any) -> Any:
    """Bits of tensors, at any depth."""
    if isinstance(state, Tensor):
        return str(state.dtype), tuple(state.shape), bits(state.resolve_neg())
    if isinstance(state, dict):
        return {key: held(value) for key, value in state.items()}
    return [held(value) for value in state] if isinstance(state, list) else state


def inside(opt: Any, model: nn.Module) -> Any:
    with opt.averaged():
        return held(model.state_dict())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_the_state_dict_inside_averaged(layer: str, policy: str) -> None:
    model, opt = trained(LAYERS[layer], POLICIES[policy])
    training = held(model.state_dict())
    right = inside(opt, model)
    assert (right == training) == (policy in ("in place", "not yet"))
    saved = opt.averaged_state_dict(model)
    assert held(saved) == right
    assert saved._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert held(model.state_dict()) == training
    with opt.averaged():
        assert held(opt.averaged_state_dict(model)) == right
    for p in model.parameters():  # copies, at any depth
        p.data.fill_(7)
    assert held(saved) == right


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layer", ["plain", "copies"])
def test_of_a_wrapped_model_too(layer: str, wrapper: str) -> None:
    model, opt = trained(LAYERS[layer], rf.ema(0.5))
    wrapped = WRAPPERS[wrapper](model)
    assert held(opt.averaged_state_dict(wrapped)) == inside(opt, wrapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", ["plain", "data", "copies", "extra state"])
def test_in_the_weights_dtype(layer: str, dtype: torch.dtype) -> None:
    model, opt = trained(LAYERS[layer], rf.ema(0.5), dtype)
    assert held(opt.averaged_state_dict(model)) == inside(opt, model)


@pytest.mark.parametrize("layer", ["plain", "copies"])
def test_between_forward_and_backward_nothing_is_lost(layer: str) -> None:
    model, opt = trained(LAYERS[layer], rf.ema(0.5))
    expected = copy.deepcopy(model)
    x = torch.randn(6, 4)
    expected(x).square().sum().backward()
    loss = model(x).square().sum()
    versions = [p._version for p in model.parameters()]
    opt.averaged_state_dict(model)
    assert [p._version for p in model.parameters()] == versions
    opt.zero_grad()
    for p in expected.parameters():
        p.grad = None
    expected(x).square().sum().backward()
    loss.backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert bits(p.grad) == bits(q.grad)


@pytest.mark.parametrize("here", [True, False])
def test_all_ranks_ask_a_model_as_often_that_is_gathered_on_one(here: bool) -> None:
    asked = []

    def gather(state: dict[str, Any], layer: nn.Linear) -> None:
        asked.append(1)
        gathered = {key: value.detach().clone() for key, value in state.items() if here}
        state.clear()
        state.update(gathered)

    model, opt = trained(lambda: hooked(gather), rf.ema(0.5))
    opt.averaged_state_dict(model)
    assert len(asked) == 2


class Wrapper(Tensor):
    """Has no memory of its own, as a quantized weight has none."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *rest: Any) -> Wrapper:
        return Wrapper(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value.held if isinstance(value, Wrapper) else value

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        return Wrapper(result) if isinstance(result, Tensor) else result


def test_an_average_that_is_not_saved_is_no_reason_to_ask_a_model_twice() -> None:
    model, asked = nn.Linear(4, 4), []
    model.register_buffer("scratch", torch.ones(4), persistent=False)
    model._register_state_dict_hook(lambda *of: asked.append(of[0]))
    averager = rf.Averager(model, rf.ema(0.5), buffers=True)
    averager.update()
    assert averager.averages(model).keys() == {"weight", "bias", "scratch"}
    assert averager.averaged_state_dict(model).keys() == {"weight", "bias"}
    assert asked == [model]


def test_what_has_no_memory_is_not_taken_for_a_frozen_weight_that_has_none() -> None:
    def quantize(state: dict[str, Any], layer: nn.Linear) -> None:
        state["0.quantized"] = Wrapper(layer.weight.detach().clone())

    model, opt = trained(lambda: hooked(quantize), rf.ema(0.5))
    frozen = nn.Parameter(Wrapper(torch.full((4, 4), 2.0)), requires_grad=False)
    model.register_parameter("frozen", frozen)
    saved = opt.averaged_state_dict(model)
    assert bits(saved["0.quantized"].held) == bits(saved["0.weight"])
    assert bits(saved["0.weight"]) == bits(opt.state[model[0].weight]["average"])  # type: ignore[index]
    assert saved["frozen"].held.tolist() == [[2.0] * 4] * 4


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_parameters_that_share_memory_show_their_own_averages(kept: int) -> None:
    model = nn.ParameterList([torch.ones(3) for _ in range(3)])
    first, *others = model.parameters()
    for p in others:
        p.data = first.data
    policies = [False if i == kept else rf.ema(0.5) for i in range(3)]
    groups = zip(model.parameters(), policies, strict=True)
    opt = rf.FusedSGD([{"params": [p], "average": policy} for p, policy in groups], lr=0.1)
    for _ in range(3):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full((3,), float(i + 1))
        opt.step()
    saved = opt.averaged_state_dict(model)
    for i, p in enumerate(model.parameters()):
        assert torch.equal(saved[str(i)], opt.state[p].get("average", p))


def test_a_model_that_cannot_be_asked_keeps_its_training_weights() -> None:
    asked = []

    def fail(state: dict[str, Any], layer: nn.Linear) -> None:
        state["0.merged"] = layer.weight.sum()
        asked.append(1)
        if len(asked) == 2:
            raise KeyError("mine")

    model, opt = trained(lambda: hooked(fail), rf.ema(0.5))
    before = [bits(p) for p in model.parameters()]
    with pytest.raises(KeyError, match="mine"):
        opt.averaged_state_dict(model)
    assert [bits(p) for p in model.parameters()] == before
    assert all("average" in opt.state[p] for p in model.parameters())


@pytest.mark.parametrize("policy", POLICIES)
def test_another_models_training_weights_are_not_given_for_averages(policy: str) -> None:
    model, opt = trained(LAYERS["plain"], POLICIES[policy])
    for other in (copy.deepcopy(model), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"none of {type(other).__name__}'s parameters"):
            opt.averaged_state_dict(other)


def test_parts_that_others_train_or_nobody_does_are_the_models_own() -> None:
    """A frozen part, an optimizer of two models, and a model that has no parameters."""
    model, critic = nn.Sequential(OfCopies(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    model[1].requires_grad_(False)
    parameters = [*model[0].parameters(), *critic.parameters()]
    opt = rf.FusedSGD(parameters, lr=0.1, average=rf.ema(0.5))
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        opt.step()
    assert held(opt.averaged_state_dict(model)) == inside(opt, model)
    assert held(opt.averaged_state_dict(critic)) == inside(opt, critic)
    whitening = nn.BatchNorm1d(4, affine=False)
    assert held(opt.averaged_state_dict(whitening)) == held(whitening.state_dict())


def test_a_sharded_model_that_returns_copies_returns_averaged_ones(process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = nn.Sequential(OfCopies(4, 4), OfData(4, 4), nn.Linear(4, 4))
    # After forward its parameters are what was gathered, and not the optimizer's.
    fully_shard(model, reshard_after_forward=False)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    with opt.averaged(model):
        right = held(full(model.state_dict()))
    training = held(full(model.state_dict()))
    loss = model(torch.ones(2, 4)).square().sum()
    averaged = opt.averaged_state_dict(model)
    loss.backward()
    assert all(isinstance(value, DTensor) for value in averaged.values())
    assert held(full(averaged)) == right != training
    assert held(full(model.state_dict())) == training
    for p in model.parameters():  # whole, until a step lays it out as its parameter
        state = opt.state[p]
        state["average"] = state["average"].full_tensor()  # type: ignore[attr-defined]
    plain = opt.averaged_state_dict(model[2])
    again = opt.averaged_state_dict(model)
    assert all(isinstance(value, DTensor) for value in [*plain.values(), *again.values()])
    assert held(full(again)) == right


def full(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.full_tensor() for key, value in state.items()}


@pytest.mark.parametrize("layer", [OfCopies, nn.Linear])
def test_taken_in_inference_mode_it_can_be_trained_on(layer: type[nn.Linear]) -> None:
    model = layer(4, 4)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    expected = held(opt.averaged_state_dict(model))
    with torch.inference_mode():
        averaged = opt.averaged_state_dict(model)
    assert held(averaged) == expected
    for value in averaged.values():
        nn.Parameter(value).square().sum().backward()


def test_the_mean_of_replicas_reaches_what_a_model_makes_of_it() -> None:
    models = [nn.Sequential(layer) for layer in (OfCopies(4, 4), OfCopies(4, 4))]
    elastic = rf.Elastic(models, epochs=2)
    saved = elastic.averaged_state_dict(models[0])
    before = [bits(p) for p in models[1].parameters()]
    elastic.pull(0)  # to the mean
    assert held(saved) == held(models[0].state_dict())
    assert [bits(p) for p in models[1].parameters()] != before
