"""`averaged()` that cannot be entered or left, and what is written to the weights inside it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runs import STEPS, bits, build, result, train
from test_averaged import batches, held, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rbwa_fused as rf
from rbwa_fused import swap

DTYPES = [torch.float32, torch.bfloat16]


class FailingOnce(TorchDispatchMode):
    """Lets the n-th operation that torch runs fail, before it has done anything."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = n, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("out of memory")
        return func(*args, **(kwargs or {}))


def started(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    model, opt = build("ema", dtype, **options)
    train(model, opt, 1, 9)
    return model, opt


def same_as_undisturbed(model: nn.Module, opt: Any, **options: Any) -> None:
    """Trains on, and compares with the run in which nothing happened."""
    train(model, opt, 10, STEPS)
    plain, opt2 = started(model.matrix.dtype, **options)
    train(plain, opt2, 10, STEPS)
    assert result(opt) == result(opt2)


# ---- entry -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_that_fails_at_any_operation_leaves_the_training_weights(
    dtype: torch.dtype, masters: bool, error: type[BaseException]
) -> None:
    model, opt = started(dtype, master_weights=masters)
    before = result(opt)
    for n in range(1, 100):
        context = opt.averaged()
        try:
            with FailingOnce(n, error):
                context.__enter__()
        except error:
            assert result(opt) == before, n
        else:
            context.__exit__(None, None, None)
            break
    assert n > 8  # two operations at least for each of four parameters
    same_as_undisturbed(model, opt, master_weights=masters)


@pytest.mark.parametrize(
    "change",
    {
        "grown": lambda p, held: setattr(p, "data", torch.zeros(6)),
        "emptied": lambda p, held: setattr(p, "data", torch.zeros(0)),
        "expanded": lambda p, held: setattr(p, "data", torch.zeros(1).expand(4)),
        "an average that would be broadcast": lambda p, held: held.update(average=torch.ones(1)),
    }.items(),
    ids=lambda change: change[0],
)
def test_what_does_not_fit_is_named_before_any_weight_is_touched(change: Any) -> None:
    a, b = (nn.Parameter(torch.zeros(4)) for _ in "ab")
    opt = rf.FusedSGD([("a", a), ("b", b)], lr=1.0, average=rf.ema(0.5))
    for _ in range(3):
        a.grad, b.grad = torch.ones(4), torch.ones(4)
        opt.step()
    change[1](b, opt.state[b])
    before = bits(a), a._version
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"averaged\(\) left .* parameter 1 \('b'\)"):
            opt.averaged().__enter__()
        assert (bits(a), a._version) == before
    b.data, opt.state[b]["average"] = torch.zeros(4), torch.ones(4)
    with opt.averaged():
        assert a[0].item() == -2.25
    opt.step()


# ---- exit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exit_that_fails_at_any_operation_refuses_steps_until_it_is_repeated(
    dtype: torch.dtype,
) -> None:
    for n in range(1, 5):
        model, opt = started(dtype)
        before = result(opt)
        context = opt.averaged()
        context.__enter__()
        with pytest.raises(RuntimeError), FailingOnce(n, torch.OutOfMemoryError):
            context.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match=r"step\(\) with averaged weights for"):
            opt.step()
        assert result(opt)["state"] == before["state"]
        with opt.averaged():
            assert result(opt) != before
        assert result(opt) == before
        same_as_undisturbed(model, opt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exit_that_is_interrupted_at_any_operation_is_finished(dtype: torch.dtype) -> None:
    for n in range(1, 5):
        model, opt = started(dtype)
        before = result(opt)
        context = opt.averaged()
        context.__enter__()
        with pytest.raises(KeyboardInterrupt), FailingOnce(n, KeyboardInterrupt):
            context.__exit__(None, None, None)
        assert result(opt) == before
        same_as_undisturbed(model, opt)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "pruned": lambda p: p.data[:3],
    "transposed": lambda p: p.data.t().contiguous(),
    "quantised": lambda p: p.requires_grad_(False).data.to(torch.int8),
    "expanded": lambda p: p.data[:1, :1].expand(5, 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_step_is_taken_while_a_parameter_lacks_its_training_weights(change: str) -> None:
    model, opt = started()
    weights = {name: bits(p) for name, p in model.named_parameters()}
    state, address = result(opt)["state"], model.matrix.data
    average = opt.averaged_state_dict(model)["matrix"]
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: ") as raised, opt.averaged():
        model.matrix.data = CHANGES[change](model.matrix)
    assert "parameter 1" not in str(raised.value)
    for name, p in model.named_parameters():
        assert name == "matrix" or bits(p) == weights[name]

    for name, refused in {
        "step": opt.step,
        "add_param_group": lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        "pickle or deepcopy": lambda: pickle.dumps(opt),
        "pickle or deepcopy ": lambda: copy.deepcopy(opt),
    }.items():
        with pytest.raises(RuntimeError, match=rf"{name.strip()}\(\) with averaged weights for"):
            refused()
    with pytest.raises(RuntimeError, match=r"could not bring back .* parameter 0"), opt.averaged():
        pass
    assert result(opt)["state"] == state
    if change != "quantised":  # which is its dtype there, too
        assert bits(opt.averaged_state_dict(model)["matrix"]) == bits(average)

    model.matrix.data = address.zero_()
    model.matrix.requires_grad_()
    with opt.averaged():
        assert bits(model.matrix) == bits(average)
    assert {name: bits(p) for name, p in model.named_parameters()} == weights
    same_as_undisturbed(model, opt)


def test_a_checkpoint_gives_up_weights_that_could_not_come_back() -> None:
    model, opt = started()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    with pytest.raises(RuntimeError, match="could not"), opt.averaged():
        model.matrix.data = model.conv.data = torch.zeros(2)
    model.matrix.data, model.conv.data = (torch.zeros_like(p) for p in list(saved[0].values())[:2])
    train(*started(), 10, STEPS)  # another optimizer is not concerned
    model.load_state_dict(saved[0])
    with pytest.raises(ValueError, match="number of parameter groups"):
        opt.load_state_dict({"state": {}, "param_groups": []})
    opt.load_state_dict(saved[1])
    same_as_undisturbed(model, opt)


def test_a_parameter_that_left_the_optimizer_lacks_nothing() -> None:
    model, opt = started()
    with pytest.raises(RuntimeError, match="parameter 0 "), opt.averaged():
        model.matrix.data = torch.zeros(2)
    del opt.param_groups[0]["params"][0]
    with opt.averaged():
        pass
    train(model, opt, 10, STEPS)


def test_what_was_raised_inside_comes_before_what_the_exit_finds() -> None:
    model, opt = started()

    def evaluate() -> None:
        model.matrix.data = torch.zeros(2)
        try:
            raise ValueError("first")
        finally:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised, opt.averaged():
        evaluate()
    failure = raised.value.__context__
    assert "parameter 0 of group 0: it has shape (2,) (expected (5, 3))" in str(failure)
    assert failure is not None and str(failure.__context__) == "first"
    with pytest.raises(RuntimeError, match=r"step\(\) with .* parameter 0 of group 0"):
        opt.step()


def test_weights_come_back_where_fsdp_fails_but_no_step_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, opt = started()
    before = result(opt)
    monkeypatch.setattr(swap, "reshard", lambda model: 1 / 0)
    with pytest.raises(RuntimeError, match=r"FSDP could not free .* division"), opt.averaged():
        pass
    assert result(opt) == before
    with pytest.raises(RuntimeError, match=r"step\(\) with .* FSDP"):
        opt.step()
    monkeypatch.undo()
    with opt.averaged():
        pass
    same_as_undisturbed(model, opt)


def test_a_context_that_is_dropped_or_closed_brings_the_weights_back() -> None:
    model, opt = started()
    before = result(opt)
    context: Any = opt.averaged()
    context.__enter__()
    assert result(opt) != before
    del context
    assert result(opt) == before
    same_as_undisturbed(model, opt)


def test_one_context_cannot_be_entered_twice_at_a_time_but_again() -> None:
    model, opt = started()
    before, context = result(opt), opt.averaged()
    with context:
        inside = result(opt)
        with pytest.raises(RuntimeError, match="entered already"), context:
            pass
        assert result(opt) == inside != before
    assert result(opt) == before
    with context:
        assert result(opt) == inside
    same_as_undisturbed(model, opt)


# ---- what is written inside --------------------------------------------------------------------


def edits(model: Any, opt: Any) -> Iterator[Callable[[], Any]]:
    dtype = model.matrix.dtype
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    yield lambda: model.half().to(dtype)
    yield lambda: model.double()
    yield lambda: model.bfloat16().double().float()
    yield lambda: model.load_state_dict(other)
    yield lambda: model.load_state_dict(other, assign=False)
    yield lambda: [p.data.zero_() for p in model.parameters()]
    yield lambda: [p.detach().fill_(float("nan")) for p in model.parameters()]
    yield lambda: [p.detach().share_memory_().add_(1) for p in model.parameters()]
    yield lambda: nn.utils.vector_to_parameters(torch.ones(1000), model.parameters())
    yield lambda: [setattr(p, "data", torch.zeros_like(p)) for p in model.parameters()]
    yield lambda: [
        setattr(p, "data", held["average"]) for p, held in opt.state.items() if "average" in held
    ]


@pytest.mark.parametrize("edit", range(11))
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_to_the_weights_inside_never_reaches_the_average(
    dtype: torch.dtype, masters: bool, edit: int
) -> None:
    model, opt = started(dtype, master_weights=masters)
    saved = {name: bits(t) for name, t in opt.averaged_state_dict(model).items()}
    before, alone = result(opt), model.scalar.detach().clone()
    with opt.averaged():
        list(edits(model, opt))[edit]()
        assert result(opt)["state"] == before["state"]  # nor a checkpoint that is saved inside
        with opt.averaged():
            pass
    # The training weights, where they came back in another dtype or layout.
    model.to(dtype, memory_format=torch.channels_last)
    model.scalar.data.copy_(alone)  # without an average it is live inside, too
    assert result(opt)["state"] == before["state"]
    assert {name: bits(t) for name, t in opt.averaged_state_dict(model).items()} == saved
    assert result(opt) == before
    same_as_undisturbed(model, opt, master_weights=masters)


@pytest.mark.parametrize("where", ["the first", "the last", "another's average", "one new tensor"])
def test_parameters_made_to_share_memory_inside_have_their_own_weights_again(where: str) -> None:
    a, b = (nn.Parameter(torch.full((4,), value)) for value in (1.0, 2.0))
    opt = rf.FusedSGD([a, b], lr=1.0, average=rf.ema(0.5))
    for _ in range(3):
        a.grad, b.grad = torch.ones(4), torch.ones(4)
        opt.step()
    before = result(opt)
    with opt.averaged():
        old = {
            "the first": a.data,
            "the last": b.data,
            "another's average": opt.state[b]["average"],
        }
        shared = old.get(where, torch.zeros(4))
        a.data, b.data = shared, shared
    assert result(opt) == before
    assert (
        len({t.data_ptr() for t in (a, b, opt.state[a]["average"], opt.state[b]["average"])}) == 4
    )


def test_a_model_converted_under_inference_mode_inside_can_be_trained_on() -> None:
    model, opt = trained()
    before = held(model), result(opt)
    with rf.averaged_model(opt, model, batches()), torch.inference_mode():
        model.half().float()
    assert (held(model), result(opt)) == before
    model(batches()[0]).square().sum().backward()
    opt.step()


# ---- buffers -----------------------------------------------------------------------------------

BUFFERS: dict[str, Callable[[nn.Module], Any]] = {
    "resized": lambda norm: norm.running_mean.resize_(7),
    "re-pointed": lambda norm: setattr(norm.running_mean, "data", torch.zeros(9)),
    "grown": lambda norm: setattr(norm.running_mean, "data", torch.zeros(2, 4)),
    "expanded": lambda norm: setattr(norm.running_mean, "data", torch.zeros(1).expand(4)),
    "deleted": lambda norm: norm._buffers.pop("running_mean"),
    "none": lambda norm: setattr(norm, "running_mean", None),
    "replaced": lambda norm: setattr(norm, "running_mean", torch.zeros(3)),
    "without memory": lambda norm: norm.to("meta"),
}


@pytest.mark.parametrize("change", BUFFERS)
def test_all_statistics_come_back_whatever_was_done_to_one(change: str) -> None:
    model, opt = trained()
    before = held(model), result(opt)
    parameters = dict(model.norm.named_parameters())
    data = {name: p.data for name, p in parameters.items()}
    with rf.averaged_model(opt, model, batches()):
        BUFFERS[change](model.norm)
        model.norm._parameters.update(parameters)
        for name, p in parameters.items():
            p.data = data[name]
    assert (held(model), result(opt)) == before
    model(batches()[0]).square().sum().backward()
    opt.step()


def test_statistics_follow_a_model_that_was_converted_inside() -> None:
    model, opt = trained()
    before = {name: b.double() for name, b in model.norm.named_buffers()}
    with rf.averaged_model(opt, model, batches()):
        model.double()
    assert {b.dtype for b in model.norm.buffers()} == {torch.float64, torch.int64}
    for name, b in model.norm.named_buffers():
        assert torch.equal(b.double(), before[name])
    model(batches()[0].double())
