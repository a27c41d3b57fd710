"""Evaluation: the averaged weights are live inside the context, the training weights after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runs import (
    AVERAGED,
    EPOCH,
    IN_PLACE,
    METHODS,
    STEPS,
    Model,
    bits,
    build,
    groups,
    result,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import rbwa_fused as rf
from rbwa_fused.several import policies_of
from rbwa_fused.streams import AVERAGES

DTYPES = [torch.float32, torch.bfloat16]
BUFFERED = [name for name in AVERAGED if name not in IN_PLACE]
WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "where they were": {"flatten": False},
    "reference": {"backend": "reference"},
}


def weights(model: nn.Module) -> dict[str, str | None]:
    return {name: bits(p) for name, p in model.named_parameters()}


def expected_inside(model: nn.Module, opt: Any) -> dict[str, str | None]:
    """The averages out of the state, and the live weights where there is none."""
    return {
        name: bits(opt.state[p]["average"].to(p.dtype) if "average" in opt.state[p] else p)
        for name, p in model.named_parameters()
    }


# ---- in place, and back ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("method", BUFFERED)
def test_averages_are_live_at_the_same_addresses_and_the_weights_come_back(
    method: str, dtype: torch.dtype, way: str
) -> None:
    model, opt = build(method, dtype, **WAYS[way])
    train(model, opt, 1, STEPS - 1)
    opt.step()  # so that averages and weights differ where the last step wrote back
    train(model, opt, STEPS, STEPS)
    before, averages = snapshot(opt), expected_inside(model, opt)
    assert averages != weights(model)
    with opt.averaged():
        assert weights(model) == averages
        assert [p.data_ptr() for g in opt.param_groups for p in g["params"]] == before["addresses"]
    after = snapshot(opt)
    assert after.pop("versions") != before.pop("versions")
    assert after == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_evaluated_is_the_run_that_is_not(method: str, dtype: torch.dtype) -> None:
    model, opt = build(method, dtype)
    plain, opt2 = build(method, dtype)
    for step in range(1, STEPS + 1):
        train(model, opt, step, step)
        with opt.averaged():
            inside = weights(model)
            with opt.averaged(model):
                assert weights(model) == inside
            assert weights(model) == inside
        with pytest.raises(KeyError, match="mine"), opt.averaged(), opt.averaged():
            raise KeyError("mine")
        train(plain, opt2, step, step)
        assert result(opt) == result(opt2), step


def test_after_an_evaluation_a_copy_disturbs_no_backward_pass_under_way() -> None:
    model, opt = build("ema")
    train(model, opt, 1, STEPS)
    with opt.averaged():
        pass
    loss = sum(p.square().sum() for p in model.parameters())
    copy.deepcopy(opt)
    loss.backward()


def test_parameters_that_share_memory_come_back() -> None:
    for backend in ("cpu", "reference"):
        memory = torch.randn(10)
        whole, tied, part = (nn.Parameter(torch.empty(0)) for _ in range(3))
        whole.data, tied.data, part.data = memory, memory, memory[2:]
        opt = rf.FusedSGD([whole, tied, part], lr=0.1, average=rf.ema(0.5), backend=backend)
        for step in range(3):
            for p in (whole, tied, part):
                p.grad = torch.full_like(p, step + 1.0)
            opt.step()
        before = snapshot(opt)
        with opt.averaged():
            assert whole.data_ptr() == tied.data_ptr()
        assert bits(whole) == before["weights"][0][3]
        assert result(opt) == {k: before[k] for k in result(opt)}


def test_a_parameter_that_is_not_dense_comes_back() -> None:
    memory = torch.randn(4, 8)
    p = nn.Parameter(memory[:, ::2])
    opt = rf.FusedSGD([p], lr=0.1, average=rf.ema(0.5))
    for _ in range(3):
        p.grad = torch.randn(4, 4)
        opt.step()
    before, whole = snapshot(opt), memory.clone()
    with opt.averaged():
        assert bits(p) == bits(opt.state[p]["average"]) or bits(p) != before["weights"][0][3]
        assert p.data_ptr() == memory.data_ptr()
        assert torch.equal(memory[:, 1::2], whole[:, 1::2])
    assert torch.equal(memory, whole)
    assert result(opt) == {k: before[k] for k in result(opt)}


def test_a_model_converted_inside_gets_its_training_weights_in_the_new_dtype() -> None:
    for convert in ({"dtype": torch.float64}, {"memory_format": torch.channels_last}):
        model, opt = build("mean")
        model.conv.data = model.conv.data.contiguous()
        train(model, opt, 1, STEPS)
        training = {name: p.detach().double() for name, p in model.named_parameters()}
        with opt.averaged():
            opt.zero_grad()
            model.to(**convert)
        for name, p in model.named_parameters():
            assert torch.equal(p.double(), training[name]), name
        train(model, opt, STEPS + 1, STEPS + 2)


def test_evaluation_works_under_inference_mode() -> None:
    for dtype in DTYPES:
        model, opt = build("ema", dtype)
        train(model, opt, 1, STEPS)
        before, averages = weights(model), expected_inside(model, opt)
        with torch.inference_mode(), opt.averaged():
            assert weights(model) == averages
        assert weights(model) == before
        train(model, opt, STEPS + 1, STEPS + 1)


# ---- what the context refuses, and what it tells -----------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_on_averaged_weights_by_mistake_is_refused(method: str) -> None:
    model, opt = build(method)
    train(model, opt, 1, STEPS)
    saved = copy.deepcopy(opt.state_dict())
    before = result(opt)
    extra = nn.Parameter(torch.ones(2))

    def closure() -> float:
        raise AssertionError("the closure of a refused step was called")

    with opt.averaged():
        for again in (opt.averaged(), opt.averaged()):  # also after a nested context has ended
            with again:
                pass
            for name, refused in {
                "step": lambda: opt.step(),
                "step with a closure": lambda: opt.step(closure),
                "load_state_dict": lambda: opt.load_state_dict(saved),
                "add_param_group": lambda: opt.add_param_group({"params": [extra]}),
            }.items():
                with pytest.raises(RuntimeError, match=rf"{name.split()[0]}.*averaged\(\)"):
                    refused()
    assert len(opt.param_groups) == 2
    assert result(opt) == before
    train(model, opt, STEPS + 1, STEPS + 1)
    opt.load_state_dict(saved)
    opt.add_param_group({"params": [extra]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_taken_inside_is_that_of_the_training_run(
    method: str, dtype: torch.dtype
) -> None:
    model, opt = build(method, dtype)
    train(model, opt, 1, STEPS)
    outside = copy.deepcopy(opt.state_dict())
    with opt.averaged():
        inside = copy.deepcopy(opt.state_dict())
        with opt.averaged():
            nested = copy.deepcopy(opt.state_dict())
    for saved in (inside, nested, opt.state_dict()):
        assert saved["param_groups"] == outside["param_groups"]
        assert saved["state"].keys() == outside["state"].keys()
        for key, held in outside["state"].items():
            other = saved["state"][key]
            assert {k: (v.dtype, v.stride(), bits(v)) for k, v in held.items()} == {
                k: (v.dtype, v.stride(), bits(v)) for k, v in other.items()
            }


@pytest.mark.parametrize("method", BUFFERED)
def test_the_float32_average_of_16_bit_weights_is_never_written(method: str) -> None:
    model, opt = build(method, torch.bfloat16)
    train(model, opt, 1, STEPS)
    averages = [opt.state[p]["average"] for p in opt.param_groups[0]["params"]]
    before = [(a.dtype, a.data_ptr(), a._version, bits(a)) for a in averages]
    with opt.averaged():
        assert [(a.dtype, a.data_ptr(), a._version, bits(a)) for a in averages] == before
    assert [(a.dtype, a.data_ptr(), a._version, bits(a)) for a in averages] == before


@pytest.mark.parametrize("method", [*IN_PLACE, "momentum"])
def test_nothing_moves_where_the_weights_are_their_average(method: str) -> None:
    model, opt = build(method)
    train(model, opt, 1, STEPS)
    before = snapshot(opt)
    assert not any("average" in held for held in opt.state.values())
    with opt.averaged():
        assert snapshot(opt) == before
    assert snapshot(opt) == before  # nor do version counters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", [m for m in AVERAGED if METHODS[m] is not METHODS["lookahead"]])
def test_nothing_moves_before_the_first_sample(method: str, dtype: torch.dtype) -> None:
    model, opt = build(method, dtype)
    policy = policies_of(opt.param_groups[0]["average"])[0]
    for step in range(0, policy.start + 1):
        train(model, opt, step, step) if step > 0 else None
        if opt.n_averaged > 0:
            break
        before = snapshot(opt)
        with opt.averaged():
            assert snapshot(opt) == before
            assert weights(model) == {k: bits(v) for k, v in opt.averaged_state_dict(model).items()}
        assert snapshot(opt) == before


def test_a_state_dict_taken_inside_keeps_its_averages_after_it() -> None:
    model, opt = build("ema")
    train(model, opt, 1, 8)
    params = [p for group in opt.param_groups for p in group["params"]]
    averages = {i: opt.state[p]["average"].clone() for i, p in enumerate(params[:-1])}
    with opt.averaged():
        saved = opt.state_dict()["state"]
    assert all(torch.equal(saved[i]["average"], average) for i, average in averages.items())


def test_rbwa_converted_to_float32_is_its_own_average_at_once() -> None:
    model, opt = build("rbwa", torch.bfloat16)
    train(model, opt, 1, 8)
    model.float()
    before = [p.detach().clone() for p in model.parameters()]
    with opt.averaged():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    saved = opt.averaged_state_dict(model)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())


def test_groups_keep_or_drop_the_average_each_for_itself() -> None:
    live, own, usual = (nn.Parameter(torch.randn(6)) for _ in range(3))
    members: list[dict[str, Any]] = [
        {"params": [live], "average": False},
        {"params": [own], "average": rf.mean(start=1)},
        {"params": [usual]},
    ]
    opt = rf.FusedSGD(members, lr=0.1, average=rf.ema(0.5, start=100))
    for _ in range(4):
        for p in (live, own, usual):
            p.grad = torch.randn(6)
        opt.step()
    late = nn.Parameter(torch.randn(6))
    opt.add_param_group({"params": [late], "average": rf.mean()})
    before = [bits(p) for p in (live, own, usual, late)]
    average = bits(opt.state[own]["average"])
    with opt.averaged():
        assert bits(own) == average != before[1]
        assert [bits(p) for p in (live, usual, late)] == [before[0], before[2], before[3]]
    assert [bits(p) for p in (live, own, usual, late)] == before
    assert opt.n_averaged == 3
    assert "average" not in opt.state[live]


COUNTS: dict[str, tuple[rf.Average | None, list[int]]] = {
    "none": (None, [0] * 10),
    "ema": (rf.ema(0.9, start=3, every=2), [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]),
    "mean": (rf.mean(write_back_every=3), list(range(1, 11))),
    "swa": (rf.swa(3, 3), [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]),
    "swa current": (rf.swa(3, 3, "current"), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
    "swa with an offset": (rf.swa(3, 3, offset=1), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),
    "swa of every cycle": (rf.swa(3, 3, offset=3), [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]),
    "ema now": (rf.ema(0.9, start=3, every=2, initial="now"), [1, 1, 1, 1, 2, 2, 3, 3, 4, 4]),
    "rswa": (rf.rswa(3, 1), [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]),
    "rbwa": (rf.rbwa(3, 1), [0, 0, 0, 1, 2, 3, 4, 5, 6, 7]),
    "lookahead": (rf.lookahead(4), [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    "switch_ema": (rf.switch_ema(steps_per_epoch=3), list(range(1, 11))),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_n_averaged_counts_samples(name: str, dtype: torch.dtype) -> None:
    policy, expected = COUNTS[name]
    model = Model(dtype)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=policy)
    counts = []
    for step in range(1, 11):
        train(model, opt, step, step)
        opt.zero_grad()
        opt.step()  # no gradient at all: counts nothing
        counts.append(opt.n_averaged)
    assert counts == expected
    assert type(opt.n_averaged) is int


# ---- a model that is converted or moved between steps ------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_change_of_memory_format_changes_no_bit(method: str) -> None:
    model, opt = build(method)
    plain, opt2 = build(method)
    train(model, opt, 1, 6)
    model.conv.data = model.conv.data.contiguous()
    train(model, opt, 7, 9)
    model.to(memory_format=torch.channels_last)
    train(model, opt, 10, STEPS)
    train(plain, opt2, 1, STEPS)
    assert result(opt) == result(opt2)
    with opt.averaged(), opt2.averaged():
        assert weights(model) == weights(plain)


@pytest.mark.parametrize("after", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_converted_model_keeps_its_average_its_count_and_its_momentum(
    method: str, after: torch.dtype
) -> None:
    model, opt = build(method)
    train(model, opt, 1, 9)
    names = {p: name for name, p in model.named_parameters()}
    held = {names[p]: dict(state) for p, state in opt.state.items()}
    held = {name: {k: v.clone() for k, v in state.items()} for name, state in held.items()}
    n = opt.n_averaged
    model.to(after)
    opt.zero_grad()
    with opt.averaged():
        pass
    model.matrix.grad = torch.zeros_like(model.matrix)
    for group in opt.param_groups:
        group["lr"] = 0.0  # the weights stay, so the state can be foretold
    opt.step()
    wide = torch.float32 if after == torch.bfloat16 else after
    policies = policies_of(opt.param_groups[0]["average"])
    sampled = dict(zip(AVERAGES, (policy.due(10) for policy in policies), strict=False))
    assert opt.n_averaged == n + sampled.get("average", False)
    for name, p in model.named_parameters():
        state = opt.state.get(p, {})
        for key, value in held.get(name, {}).items():
            kept = METHODS[method].rule.state_dtype(key, after)
            dtype = wide if key in AVERAGES else kept
            assert state[key].dtype == dtype, (name, key)
            if name != "matrix" and not sampled.get(key):
                assert torch.equal(state[key], value.to(dtype)), (name, key)
    train(model, opt, 11, STEPS)
    assert all(p.dtype == after and p.isfinite().all() for p in model.parameters())


def test_rbwa_goes_on_counting_when_the_model_becomes_bfloat16() -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = rf.FusedSGD([p], lr=1.0, average=rf.rbwa(steps_per_epoch=1, start_epoch=0))
    for _ in range(4):
        p.grad = torch.ones(3)
        opt.step()
    p.grad = None
    p.data = p.data.bfloat16()
    before = p.detach().float()
    p.grad = torch.ones(3, dtype=torch.bfloat16)
    opt.step()
    assert opt.n_averaged == 5
    torch.testing.assert_close(opt.state[p]["average"], before - 1.0 / 5)


# ---- averaged_state_dict -----------------------------------------------------------------------


class Net(nn.Module):
    """Tied weights, BatchNorm, a buffer that forward replaces, extra state, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        return self.outer(torch.relu(self.norm(self.inner(x))))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 2}


def batches(n: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator) for _ in range(n)]


def trained(average: rf.Average | None = None, dtype: torch.dtype = torch.float32) -> Any:
    model = Net().to(dtype)
    average = rf.ema(0.5, start=1) if average is None else average
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.5, average=average)
    for x in batches():
        model(x.to(dtype)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def held(model: nn.Module) -> dict[str, Any]:
    return {k: bits(v) if isinstance(v, Tensor) else v for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("average", "dtype"),
    [
        (rf.ema(0.5, start=1), torch.float32),
        (rf.ema(0.5, start=1), torch.bfloat16),
        (rf.lookahead(3), torch.float32),
        (rf.rbwa(2, 1), torch.float32),
        (rf.rbwa(2, 1), torch.bfloat16),
        (rf.swa(start=100), torch.float32),
    ],
    ids=str,
)
def test_an_averaged_state_dict_loads_into_a_fresh_model_and_is_what_is_evaluated(
    average: rf.Average, dtype: torch.dtype
) -> None:
    model, opt = trained(average, dtype)
    before = held(model)
    saved = opt.averaged_state_dict(model)
    assert held(model) == before
    assert list(saved) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            assert type(saved[name]) is Tensor and not saved[name].requires_grad
            assert saved[name].dtype == tensor.dtype and saved[name].stride() == tensor.stride()
            assert saved[name].data_ptr() != tensor.data_ptr()
    for name, buffer in model.named_buffers():
        assert bits(saved[name]) == bits(buffer)
    fresh: Any = Net().to(dtype)
    with torch.no_grad():
        fresh.unused.fill_(7)
    fresh.load_state_dict(saved, strict=True)
    assert fresh.outer.weight is fresh.inner.weight
    with opt.averaged():
        assert held(model) == held(fresh)
        assert {k: bits(v) for k, v in opt.averaged_state_dict(model).items() if k != EXTRA} == {
            k: bits(v) for k, v in saved.items() if k != EXTRA
        }
        x = batches(1, seed=9)[0].to(dtype)
        assert torch.equal(model.eval()(x), fresh.eval()(x))
    saved["inner.weight"].zero_()
    assert held(model) == before


EXTRA = "_extra_state"


def test_an_averaged_state_dict_keeps_what_old_modules_need_to_be_loaded() -> None:
    model, opt = trained()
    saved = opt.averaged_state_dict(model)
    assert getattr(saved, "_metadata", None) == model.state_dict()._metadata


# ---- BatchNorm ---------------------------------------------------------------------------------


def test_statistics_are_estimated_for_the_averaged_weights_and_taken_back() -> None:
    model, opt = trained()
    fresh: Any = Net()
    fresh.load_state_dict(opt.averaged_state_dict(model))
    update_bn(batches(seed=3), fresh)
    before, state = held(model), result(opt)
    addresses = [b.data_ptr() for b in model.norm.buffers()]
    with rf.averaged_model(opt, model, batches(seed=3)) as same:
        assert id(same) == id(model)
        assert weights(model) == weights(fresh)
        for (name, a), b in zip(model.norm.named_buffers(), fresh.norm.buffers(), strict=True):
            assert bits(a) == bits(b), name
            if name != "num_batches_tracked":
                assert bits(a) != before[f"norm.{name}"]
        with pytest.raises(RuntimeError, match=r"step.*averaged\(\)"):
            opt.step()
    assert [b.data_ptr() for b in model.norm.buffers()] == addresses
    assert bits(model.inner.weight) == before["inner.weight"]
    assert {k: v for k, v in held(model).items() if k != "seen"} == {
        k: v for k, v in before.items() if k != "seen"
    }
    assert result(opt) == state


def failing_loader() -> Iterator[Tensor]:
    yield batches()[0]
    raise KeyError("mine")


def leave_by_exception(opt: Any, model: nn.Module, where: str) -> None:
    loader = failing_loader() if where == "loader" else batches()
    with pytest.raises(KeyError, match="mine"), rf.averaged_model(opt, model, loader):
        raise KeyError("mine")


@pytest.mark.parametrize("where", ["loader", "body"])
def test_weights_and_statistics_come_back_after_an_exception(where: str) -> None:
    model, opt = trained()
    before, state = held(model), result(opt)
    leave_by_exception(opt, model, where)
    assert {k: v for k, v in held(model).items() if k != "seen"} == {
        k: v for k, v in before.items() if k != "seen"
    }
    assert result(opt) == state
    opt.zero_grad()
    opt.step()


@pytest.mark.parametrize("where", ["nowhere", "loader", "body"])
@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_momentum_and_training_mode_come_back(training: bool, where: str) -> None:
    model, opt = trained()
    model.train(training)
    model.norm.momentum = 0.25
    if where == "nowhere":
        with rf.averaged_model(opt, model, batches()):
            assert model.training == training
    else:
        leave_by_exception(opt, model, where)
    assert model.norm.momentum == 0.25
    assert [module.training for module in model.modules()] == [training] * 4


def test_a_frozen_layer_is_still_frozen_after_evaluation() -> None:
    model, opt = trained()
    model.train()
    model.norm.eval()
    with rf.averaged_model(opt, model, batches()):
        assert model.training
        assert not model.norm.training  # and its statistics do not move inside either
    assert model.training
    assert not model.norm.training


class FrozenNorm(Net):
    """Keeps its BatchNorm in eval mode, as fine-tuning does."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("make", [Net, FrozenNorm])
def test_statistics_of_a_frozen_layer_are_those_it_was_trained_with(
    make: type[Net], evaluating: bool
) -> None:
    model = make().train()
    model.norm.eval()
    model.norm.running_mean.fill_(0.5)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    for x in batches():
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    frozen, statistics = held(model.norm), [bits(b) for b in model.norm.buffers()]
    assert bits(model.norm.running_mean) == bits(torch.full((4,), 0.5))
    if evaluating:
        model.eval()
    with rf.averaged_model(opt, model, batches()):
        if make is FrozenNorm or not evaluating:  # a model in eval mode does not say what is frozen
            assert [bits(b) for b in model.norm.buffers()] == statistics
        else:
            assert [bits(b) for b in model.norm.buffers()] != statistics
    assert held(model.norm) == frozen


def test_statistics_behind_a_frozen_layer_are_those_of_what_it_gives_when_frozen() -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[0].eval()
    model[0].running_mean.fill_(3.0)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    with torch.no_grad():
        expected = torch.stack([model[0](x).mean(0) for x in batches()]).mean(0)
    with rf.averaged_model(opt, model, batches()):
        torch.testing.assert_close(model[1].running_mean, expected)
        assert (model[0].running_mean == 3.0).all()


class Norms(nn.Module):
    """Every kind of module with statistics, or without them; one that forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 4, 3)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.batch = nn.BatchNorm2d(4, momentum=0.3)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.untracked(self.batch(self.instance(self.conv(x).square()))).mean((2, 3))


def test_statistics_of_every_kind_are_means_of_the_batches_or_left_as_they_are() -> None:
    model = Norms()
    nn.init.constant_(model.unused.running_mean, 2.0)  # type: ignore[arg-type]
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(5, 1, 6, 6, generator=generator) for _ in range(4)]
    for x in images:
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    before = held(model)
    with rf.averaged_model(opt, model, images):
        assert model.instance.momentum == 0.1 and model.batch.momentum == 0.3
        assert bits(model.unused.running_mean) == before["unused.running_mean"]
        with torch.no_grad():
            outputs = [model.conv(x).square() for x in images]
        per_image = torch.stack([x.mean((2, 3)).mean(0) for x in outputs]).mean(0)
        torch.testing.assert_close(model.instance.running_mean, per_image)
        assert bits(model.instance.running_mean) != before["instance.running_mean"]
        assert bits(model.batch.running_var) != before["batch.running_var"]
    assert held(model) == before


@pytest.mark.parametrize("loader", ["used up", "empty"])
def test_a_loader_without_a_batch_does_not_leave_mean_0_and_variance_1(loader: str) -> None:
    model, opt = trained()
    before, state = held(model), result(opt)
    used = (x for x in (batches() if loader == "used up" else []))
    assert len(list(used)) == (5 if loader == "used up" else 0)
    with pytest.raises(ValueError, match="Invalid loader: it has no batch"):
        rf.averaged_model(opt, model, used).__enter__()
    assert held(model) == before and result(opt) == state
    plain, opt2 = build("ema")
    train(plain, opt2, 1, STEPS)
    with rf.averaged_model(opt2, plain, used):  # has no statistics
        pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_scripted_part_is_evaluated_and_its_statistics_are_not_passed_over() -> None:
    norms: list[nn.Module] = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    for scripted in (0, 1):
        parts = [torch.jit.script(nn.Linear(4, 4)), norms[0]]
        if scripted:
            parts.append(torch.jit.script(norms[1]))
        model = nn.Sequential(*parts)
        opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
        for _ in range(3):
            model(torch.randn(8, 4)).square().sum().backward()
            opt.step()
        before = held(model)
        if scripted:
            with pytest.raises(ValueError, match="Invalid model: statistics of modules that torch"):
                rf.averaged_model(opt, model, [torch.randn(8, 4)]).__enter__()
        else:
            with rf.averaged_model(opt, model, [torch.randn(8, 4)]):
                assert held(model)["1.running_mean"] != before["1.running_mean"]
        assert held(model) == before


def test_an_optimizer_without_averages_is_named() -> None:
    model = Net()
    with pytest.raises(TypeError, match="Invalid opt: SGD"):
        rf.averaged_model(torch.optim.SGD(model.parameters()), model, []).__enter__()  # type: ignore


def test_a_buffer_that_forward_replaces_comes_back() -> None:
    model, opt = trained()
    before = bits(model.seen)
    with rf.averaged_model(opt, model, batches()):
        assert bits(model.seen) != before
    assert bits(model.seen) == before


def test_a_loader_of_pairs_a_model_without_batchnorm_and_an_outer_context() -> None:
    model, opt = trained()
    before = held(model)
    pairs = [(x, torch.zeros(6)) for x in batches()]
    with opt.averaged():
        inside = bits(model.inner.weight)
        with rf.averaged_model(opt, model, pairs):
            assert bits(model.inner.weight) == inside
        assert bits(model.inner.weight) == inside
    assert {k: v for k, v in held(model).items() if k != "seen"} == {
        k: v for k, v in before.items() if k != "seen"
    }
    plain, opt2 = build("ema")
    train(plain, opt2, 1, STEPS)
    with rf.averaged_model(opt2, plain, [torch.zeros(1)]):
        assert weights(plain) == expected_outside(plain, opt2)


def expected_outside(model: nn.Module, opt: Any) -> dict[str, str | None]:
    """What is live inside, read from `averaged_state_dict`."""
    return {k: bits(v) for k, v in opt.averaged_state_dict(model).items()}


# ---- version counters --------------------------------------------------------------------------

CHANGED = "modified by an inplace operation"


def graph(p: Tensor) -> Tensor:
    return p.square().sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_backward_through_a_stepped_parameter_is_an_error_and_not_a_wrong_gradient(
    method: str, dtype: torch.dtype
) -> None:
    model, opt = build(method, dtype)
    for step in range(1, STEPS + 1):
        loss = graph(model.matrix)
        train(model, opt, step, step)
        with pytest.raises(RuntimeError, match=CHANGED):
            loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", BUFFERED)
def test_a_backward_through_exchanged_weights_is_an_error_and_not_a_wrong_gradient(
    method: str, dtype: torch.dtype
) -> None:
    model, opt = build(method, dtype)
    train(model, opt, 1, STEPS)
    before = graph(model.matrix)
    with opt.averaged():
        inside = graph(model.matrix)
        with pytest.raises(RuntimeError, match=CHANGED):
            before.backward()
    with pytest.raises(RuntimeError, match=CHANGED):
        inside.backward()
    model.matrix.grad = None
    graph(model.matrix).backward()
    assert bits(model.matrix.grad) == bits(2 * model.matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_backward_through_a_parameter_that_was_only_written_back_is_an_error(
    dtype: torch.dtype,
) -> None:
    frozen, trained = (nn.Parameter(torch.randn(4).to(dtype)) for _ in range(2))
    opt = rf.FusedSGD([frozen, trained], lr=0.1, average=rf.lookahead(2, 0.5))
    for p in (frozen, trained):
        p.grad = torch.ones_like(p)
    opt.step()
    frozen.grad = None
    before = bits(frozen)
    loss = graph(frozen)
    opt.step()  # the second: written back, with or without a gradient
    assert bits(frozen) != before
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


def test_a_parameter_without_a_gradient_can_still_be_differentiated_after_a_step() -> None:
    for average in (None, rf.ema(0.5)):
        frozen, trained = (nn.Parameter(torch.randn(4)) for _ in range(2))
        opt = rf.FusedSGD([frozen, trained], lr=0.1, average=average)
        for _ in range(2):
            loss = graph(frozen)
            trained.grad = torch.ones(4)
            opt.step()
            loss.backward()
            frozen.grad = None


def test_a_group_without_an_average_is_left_alone_by_evaluation() -> None:
    model = Model()
    opt = rf.FusedSGD(groups(model), lr=0.1, average=rf.ema(0.5))
    train(model, opt, 1, EPOCH)
    loss = graph(model.scalar)
    with opt.averaged():
        pass
    loss.backward()
    loss = graph(model.matrix)
    with opt.averaged():
        pass
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()
