"""`buffers=model`: a model's floating buffers, averaged by the fused optimizers in their launch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import FLOATING, POLICIES, Normed, as_bits
from rules import RULES
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import doors
from rbwa_fused.members import Followed

Made = tuple[Normed, Any]


def made(
    average: rf.Average | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> Made:
    net = Normed().to(dtype)
    options = {"lr": 0.05, "momentum": 0.5, **options}
    policy = rf.ema(0.5) if average is None else average
    return net, rf.FusedSGD(net.parameters(), average=policy, buffers=net, **options)


def train(net: nn.Module, opt: Any, first: int, last: int, after: Any = None) -> None:
    for step in range(first, last + 1):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        net(x.to(next(net.parameters()).dtype)).square().mean().backward()
        opt.step()
        if after is not None:
            after(step)


def floating(net: nn.Module) -> list[Tensor]:
    return [net.get_buffer(name) for name in FLOATING]


def held(net: nn.Module, opt: Any) -> list[Tensor]:
    averages = opt.averages(net)
    return [averages[name] for name in FLOATING]


def ends(net: nn.Module, opt: Any) -> Any:
    return as_bits((list(net.parameters()), floating(net), opt.state_dict()))


# ---- the averages --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "swa current"])
def test_they_are_the_literal_loop(policy: str, in_backward: bool) -> None:
    """Bit for bit in float64, written back or not; the forward pass of a step has moved them."""
    average, literal = POLICIES[policy]
    net, opt = made(average, torch.float64, in_backward=in_backward)
    a: list[Tensor] = []
    n = 0

    def behind(step: int) -> None:
        nonlocal n
        x = seen
        if not a:
            a.extend(t.clone() for t in x)  # before the first step, which moves no buffer
            n = int(average.initial != "first_sample")
        if literal(a, x, n, step):
            assert all(map(torch.equal, floating(net), a))
        else:
            assert all(map(torch.equal, floating(net), x))
        n += average.due(step)
        assert n == 0 or all(map(torch.equal, held(net, opt), a))

    for step in range(1, 14):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).double()
        loss = net(x).square().mean()
        seen = [b.clone() for b in floating(net)]
        loss.backward()
        opt.step()
        opt.zero_grad()
        behind(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_averages_them_as_an_averager_does(rule: str, dtype: torch.dtype) -> None:
    """In one launch with the parameters, which they leave as they are."""
    net, other = Normed().to(dtype), Normed().to(dtype)
    opt = RULES[rule].made(net.parameters(), average=rf.ema(0.75), buffers=net)
    theirs = RULES[rule].made(other.parameters(), average=rf.ema(0.75))
    averager = rf.Averager(other, rf.ema(0.75), optimizer=theirs, buffers=True)
    train(net, opt, 1, 4)
    train(other, theirs, 1, 4)
    assert as_bits(list(net.parameters())) == as_bits(list(other.parameters()))
    assert as_bits(held(net, opt)) == as_bits(held(other, averager))
    state = opt.state_dict()
    assert state["state"].keys() == theirs.state_dict()["state"].keys()
    assert len(opt.param_groups) == 1 and opt.state.keys() == set(net.parameters())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_they_are_in_the_launch_of_the_parameters(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, opt = made(backend=backend)
    train(net, opt, 1, 1)
    assert len(opt.engine.tables.launches) == 1
    plain = rf.FusedSGD(Normed().parameters(), lr=0.1, average=rf.ema(0.5))
    assert len(plain.engine.tables.plan.groups) + 1 == len(opt.engine.tables.plan.groups)
    calls: list[int] = []
    run = doors.in_turn
    monkeypatch.setattr(doors, "in_turn", lambda todo: (calls.append(len(todo)), run(todo))[1])
    train(net, opt, 2, 2)
    assert len(calls) <= 2  # one for the step, and one more where the scale is another tensor


def test_a_step_that_a_scaler_skips_samples_none() -> None:
    net, opt = made()
    train(net, opt, 1, 2)
    before = as_bits(held(net, opt))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(net(torch.full((8, 5), float("inf"))).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert as_bits(held(net, opt)) == before and opt.n_averaged == 2


def test_steps_without_a_gradient_sample_none() -> None:
    net, opt = made()
    train(net, opt, 1, 2)
    before = as_bits(held(net, opt))
    opt.zero_grad()
    opt.step()
    assert as_bits(held(net, opt)) == before


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_gradient_of_a_buffer_is_its_owners(in_backward: bool) -> None:
    """No hook frees it, it makes no step, and nobody unscales it."""
    net, opt = made(in_backward=in_backward)
    net.register_buffer("bias", torch.ones(4, requires_grad=True))
    net.bias.sum().backward()
    opt.step()
    assert opt.n_averaged == 0 and net.bias.grad.tolist() == [1.0] * 4
    (net(torch.randn(8, 5)).square().mean() + net.bias.sum()).backward()
    opt.step()
    assert opt.n_averaged == 1 and net.bias.grad.tolist() == [2.0] * 4
    assert opt.averages(net)["bias"].tolist() == net.bias.tolist() == [1.0] * 4


@pytest.mark.parametrize("policy", [rf.ema(0.5), rf.lookahead(1, 0.5)], ids=str)
def test_a_scaler_leaves_the_gradient_of_a_buffer_as_it_is(policy: rf.Average) -> None:
    net, opt = made(policy)
    net.register_buffer("bias", torch.ones(4, requires_grad=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2):  # another factor than that of the first step
        opt.zero_grad()
        scaler.scale(net(torch.randn(8, 5)).square().mean() + net.bias.sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.engine.steps == 2 and net.bias.grad.tolist() == [8.0] * 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_buffer_that_a_graph_hangs_on_is_averaged(in_backward: bool) -> None:
    """As a forward pass leaves one that forgets detach(): it is asked for no gradient."""
    net, opt = made(in_backward=in_backward)
    net.register_buffer("seen", torch.ones(()))
    for step in range(3):
        loss = net(torch.full((8, 5), float(step)).add(torch.eye(8, 5))).square().mean()
        net.seen = 0.5 * net.seen.detach() + loss
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert opt.n_averaged == 3 and torch.isfinite(opt.averages(net)["seen"])


# ---- followed ------------------------------------------------------------------------------------


def test_what_becomes_of_a_buffer_is_followed() -> None:
    net, opt = made()
    train(net, opt, 1, 2)
    mean = opt.averages(net)["norm.running_mean"]
    net.register_buffer("later", torch.full((2,), 3.0))
    train(net, opt, 3, 3)
    assert opt.averages(net)["later"].tolist() == [3.0] * 2
    net.later = torch.full((2,), 5.0)
    train(net, opt, 4, 4)
    assert opt.averages(net)["later"].tolist() == [4.0] * 2
    net.later = torch.full((7,), 2.0)  # another shape: a copy
    train(net, opt, 5, 5)
    assert opt.averages(net)["later"].tolist() == [2.0] * 7
    with torch.no_grad():
        net.get_buffer("later").resize_(3).fill_(1.0)
    train(net, opt, 6, 6)
    assert opt.averages(net)["later"].tolist() == [1.0] * 3
    del net.later
    train(net, opt, 7, 7)
    averages = opt.averages(net)
    assert "later" not in averages and averages["norm.running_mean"] is mean
    assert opt.engine.beside.state.keys() == set(floating(net))  # nothing is kept of what is gone
    assert opt.n_averaged == 7


def test_parameters_that_are_exchanged_are_no_news_of_buffers() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    opt = rf.FusedSGD(net.parameters(), lr=0.1, average=rf.ema(0.5), buffers=net)
    net.register_parameter("extra", nn.Parameter(torch.ones(2)))
    train(net, opt, 1, 2)
    tables = opt.engine.tables
    net.extra = nn.Parameter(torch.zeros(2))
    train(net, opt, 3, 3)
    assert opt.engine.tables is tables


def test_buffers_that_are_all_exchanged_go_on_with_the_averages_of_their_names() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    before = held(net, opt)
    for name in FLOATING:
        module, _, own = name.rpartition(".")
        setattr(net.get_submodule(module), own, net.get_buffer(name).clone())
    assert as_bits(held(net, opt)) == as_bits(before)
    train(net, opt, 4, 4)
    assert opt.state_dict()["buffers"]["n_averaged"] == 4
    assert all(a is b for a, b in zip(held(net, opt), before, strict=True))


def test_a_converted_model_keeps_its_averages() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    before = as_bits(held(net, opt))
    net.double()
    train(net, opt, 4, 4)
    after = held(net, opt)
    assert all(a.dtype == torch.float64 for a in after)
    other, theirs = made()
    train(other, theirs, 1, 3)
    assert as_bits(held(other, theirs)) == before
    moved = [
        a.double() + 0.5 * (b - a.double())
        for a, b in zip(held(other, theirs), floating(net), strict=True)
    ]
    assert all(map(torch.equal, after, moved))


def test_groups_that_come_later_are_stepped_and_named_by_their_numbers() -> None:
    net, plain = Normed(), Normed()
    opts = [
        rf.FusedSGD(net.first.parameters(), lr=0.05, average=rf.ema(0.5), buffers=net),
        rf.FusedSGD(plain.first.parameters(), lr=0.05, average=rf.ema(0.5)),
    ]
    for model, opt in zip((net, plain), opts, strict=True):
        train(model, opt, 1, 2)
        opt.add_param_group({"params": list(model.norm.parameters()), "lr": 0.1})
        train(model, opt, 3, 5)
    assert as_bits(list(net.parameters())) == as_bits(list(plain.parameters()))
    saved = opts[0].state_dict()
    assert as_bits(saved["state"]) == as_bits(opts[1].state_dict()["state"])
    assert saved["buffers"]["n_averaged"] == 5
    opts[0].state[net.norm.weight]["average"] = torch.zeros(9)
    with pytest.raises(RuntimeError, match=r"parameter 0 has shape \(4,\)"), opts[0].averaged():
        pass


def test_cleared_state_starts_their_averages_again_with_the_others() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    opt.state.clear()
    train(net, opt, 4, 4)
    assert opt.n_averaged == 1 and opt.state_dict()["buffers"]["n_averaged"] == 1
    assert as_bits(held(net, opt)) == as_bits(floating(net))


# ---- readouts ------------------------------------------------------------------------------------


def test_they_are_exchanged_with_the_weights_and_come_back() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    live, averages = as_bits(floating(net)), as_bits(held(net, opt))
    assert live != averages
    with opt.averaged():
        assert as_bits(floating(net)) == averages
        assert net.norm.num_batches_tracked == 3  # type: ignore[comparison-overlap]
    assert as_bits(floating(net)) == live
    net.scale = torch.full((3,), 8.0)  # a forward pass in between
    before = opt.averages(net)["scale"]
    with opt.averaged(blend=0.5):
        assert torch.equal(net.scale, 8.0 + 0.5 * (before - 8.0))
    assert net.scale.tolist() == [8.0] * 3
    state = opt.averaged_state_dict(net)
    for name in ("scale", "norm.running_mean", "norm.running_var"):
        assert torch.equal(state[name], opt.averages(net)[name])
    assert state["norm.num_batches_tracked"] == 3 and "cache" not in state
    other = Normed()
    opt.copy_to(other, net)
    assert as_bits(other.state_dict()) == as_bits(state)
    opt.adopt()
    assert as_bits(floating(net)) == as_bits(held(net, opt))


@pytest.mark.parametrize("inference", [False, True])
def test_the_statistics_of_a_model_that_is_converted_inside_come_back(inference: bool) -> None:
    """A module's `half()` puts other tensors in its buffers' places."""
    net, opt = made()
    other, theirs = made()
    train(net, opt, 1, 3)
    train(other, theirs, 1, 3)
    averages = opt.averages(net)
    expected = [averages[name].double() for name in FLOATING]
    with torch.inference_mode(inference), opt.averaged():
        net.double()
        assert as_bits(floating(net)) == as_bits(expected)
        net.norm.running_mean = net.norm.running_mean + 1.0  # type: ignore[operator]
        inside = opt.averages(net)
        assert all(inside[name] is averages[name] for name in FLOATING)
        state = opt.averaged_state_dict(net)["norm.running_mean"]
        assert torch.equal(state, averages["norm.running_mean"].double())
    net.float()
    assert as_bits(floating(net)) == as_bits(floating(other))
    train(net, opt, 4, 5)
    train(other, theirs, 4, 5)
    assert ends(net, opt) == ends(other, theirs)


def test_a_buffer_of_inference_mode_in_an_averages_memory_leaves_it() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    average = opt.averages(net)["norm.running_var"]
    before = as_bits([average, net.norm.running_mean])
    with torch.inference_mode(), opt.averaged():
        net.norm.running_mean = torch.empty(0).set_(average.untyped_storage(), 0, (4,))
        assert net.norm.running_mean.is_inference()
    assert as_bits([average, net.norm.running_mean]) == before


def test_a_buffer_that_has_another_shape_inside_is_another_one() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    with opt.averaged():
        net.cache = torch.full((9,), 4.0)
    assert net.cache.tolist() == [4.0] * 9
    train(net, opt, 4, 4)
    assert opt.averages(net)["cache"].tolist() == [5.0] * 9


@pytest.mark.parametrize("policy", [rf.ema(0.5), rf.lookahead(2, 0.5)], ids=str)
def test_a_buffer_that_an_evaluation_has_made_is_exchanged_as_others_are(
    policy: rf.Average,
) -> None:
    """In inference mode, as Lightning evaluates: nobody may write to it outside."""
    net, opt = made(policy)
    train(net, opt, 1, 1)
    with torch.inference_mode():
        net.register_buffer("table", torch.ones(3))
    net.table.requires_grad_(False)
    train(net, opt, 2, 3)
    with torch.inference_mode():
        net.table.add_(1.0)
    train(net, opt, 4, 4)
    live, average = net.table.tolist(), opt.averages(net)["table"].tolist()
    with opt.averaged():
        assert net.table.tolist() == average
    assert net.table.tolist() == live
    assert opt.averaged_state_dict(net)["table"].tolist() == average
    opt.adopt()
    assert net.table.tolist() == average
    train(net, opt, 5, 5)


def test_averages_asked_for_before_the_first_step_are_those_that_are_sampled() -> None:
    net, opt = made(rf.ema(0.75, initial="now"))
    averages = opt.averages(net)
    before = [a.clone() for a in held(net, opt)]
    train(net, opt, 1, 1)
    assert opt.state_dict()["buffers"]["n_averaged"] == opt.n_averaged == 2
    moved = [a + 0.25 * (b - a) for a, b in zip(before, floating(net), strict=True)]
    assert all(torch.equal(averages[name], a) for name, a in zip(FLOATING, moved, strict=True))


def test_weights_come_back_where_the_module_cannot_say_what_stands_in_its_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    before = as_bits([*net.parameters(), *floating(net)])
    context = opt.averaged()
    with context:
        monkeypatch.setattr(Followed, "heirs", lambda *given: 1 / 0)
        with pytest.raises(RuntimeError, match=r"could not bring back .*division by zero"):
            context.__exit__(None, None, None)
        monkeypatch.undo()
        assert as_bits([*net.parameters(), *floating(net)]) == before
    train(net, opt, 4, 4)


def test_statistics_that_are_averaged_are_not_estimated_anew() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    expected = as_bits(opt.averages(net)["norm.running_mean"])
    with rf.averaged_model(opt, net, [torch.randn(8, 5)]):
        assert as_bits(net.norm.running_mean) == expected


# ---- checkpoints ---------------------------------------------------------------------------------


def by_file(net: Normed, opt: Any) -> Made:
    file = io.BytesIO()
    torch.save([net.state_dict(), net.cache, opt.state_dict()], file)
    file.seek(0)
    model, cache, saved = torch.load(file, weights_only=True)
    again, resumed = made()
    again.load_state_dict(model)
    again.cache.copy_(cache)
    resumed.load_state_dict(saved)
    return again, resumed


def by_pickle(net: Normed, opt: Any) -> Made:
    return pickle.loads(pickle.dumps((net, opt)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [by_file, by_pickle, lambda *both: copy.deepcopy(both)])
def test_a_run_goes_on_bit_for_bit(way: Callable[..., Made]) -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    again, resumed = way(net, opt)
    assert resumed is not opt and again.norm is not net.norm
    train(net, opt, 4, 6)
    train(again, resumed, 4, 6)
    assert ends(again, resumed) == ends(net, opt)
    assert as_bits(held(again, resumed)) == as_bits(held(net, opt))


def test_loading_keeps_the_tensors_that_somebody_may_hold() -> None:
    net, opt = made()
    train(net, opt, 1, 2)
    saved = copy.deepcopy(opt.state_dict())
    before = opt.averages(net)
    train(net, opt, 3, 3)
    opt.load_state_dict(saved)
    after = opt.averages(net)
    assert all(after[name] is before[name] for name in FLOATING)
    assert all(torch.equal(after[n], saved["buffers"]["averages"][n]) for n in FLOATING)


def test_torch_loads_what_is_saved_and_the_other_way_round() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    sgd = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    sgd.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert sgd.param_groups[0]["lr"] == 0.05
    again, resumed = made()
    train(again, sgd, 4, 4)
    train(again, resumed, 1, 1)
    with pytest.warns(UserWarning, match="averages of buffers, which start again|starts again"):
        resumed.load_state_dict(sgd.state_dict())
    train(again, resumed, 5, 5)
    assert as_bits(held(again, resumed)) == as_bits(floating(again))


def test_torchs_own_load_of_another_step_starts_them_again_and_says_so() -> None:
    """It hands over state and groups alone."""
    net, opt = made()
    train(net, opt, 1, 3)
    again, resumed = made()
    train(again, resumed, 11, 12)
    again.load_state_dict(net.state_dict())
    with pytest.warns(UserWarning, match="averages of buffers start again.*opt.load_state_dict"):
        torch.optim.Optimizer.load_state_dict(resumed, copy.deepcopy(opt.state_dict()))
    assert resumed.n_averaged == 3 and resumed.averages(again).keys().isdisjoint(FLOATING)
    train(again, resumed, 4, 4)
    assert as_bits(held(again, resumed)) == as_bits(floating(again))


def test_a_checkpoint_without_them_starts_them_again_and_says_so() -> None:
    net = Normed()
    plain = rf.FusedSGD(net.parameters(), lr=0.05, average=rf.ema(0.5))
    train(net, plain, 1, 3)
    again, opt = made()
    with pytest.warns(UserWarning, match="no averages of buffers, which start again"):
        opt.load_state_dict(plain.state_dict())
    train(again, opt, 4, 4)
    assert opt.n_averaged == 4 and opt.state_dict()["buffers"]["n_averaged"] == 1
    assert as_bits(held(again, opt)) == as_bits(floating(again))


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "missing": (
        lambda b: b["averages"].pop("scale"),
        ValueError,
        r"lack \['scale'\] and have \[\]",
    ),
    "further": (
        lambda b: b["averages"].update(other=torch.ones(1)),
        ValueError,
        r"lack \[\] and have \['other'\]",
    ),
    "shape": (
        lambda b: b["averages"].update(scale=torch.ones(9)),
        ValueError,
        r"average of buffer scale has shape \(9,\) \(expected \(3,\)\)",
    ),
    "integers": (
        lambda b: b["averages"].update(scale=torch.ones(3, dtype=torch.int64)),
        TypeError,
        "average of buffer scale in the checkpoint: torch.int64",
    ),
    "policy": (
        lambda b: b.update(average=rf.mean().describe()),
        ValueError,
        "the checkpoint's average is .*Mean",
    ),
    "count": (lambda b: b.update(n_averaged=-1), ValueError, "Invalid n_averaged of buffers.*-1"),
    "truth": (lambda b: b.update(n_averaged=True), ValueError, "n_averaged of buffers.*True"),
    "a count too large": (
        lambda b: b.update(n_averaged=2**63),
        ValueError,
        "n_averaged of buffers",
    ),
    "no dict": (lambda b: b.update(averages=3), TypeError, "averages of buffers.*3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    edit, error, words = REFUSED[case]
    net, opt = made()
    train(net, opt, 1, 3)
    saved = copy.deepcopy(opt.state_dict())
    edit(saved["buffers"])
    train(net, opt, 4, 4)
    before = ends(net, opt)
    with pytest.raises(error, match=words):
        opt.load_state_dict(saved)
    assert ends(net, opt) == before


def test_torchs_own_load_by_the_class_keeps_them() -> None:
    net, opt = made()
    train(net, opt, 1, 3)
    before = as_bits(held(net, opt))
    torch.optim.Optimizer.load_state_dict(opt, copy.deepcopy(opt.state_dict()))
    assert as_bits(held(net, opt)) == before
    assert opt.state_dict()["buffers"]["n_averaged"] == 3


# ---- bad input -----------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    net = Normed()
    with pytest.raises(TypeError, match=r"Invalid buffers: bool \(expected a module or None\)"):
        rf.FusedSGD(net.parameters(), average=rf.ema(0.5), buffers=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Invalid buffers: average=None \(expected a policy"):
        rf.RSGDM(net.parameters(), buffers=net)
    net.scale = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="scale"):
        rf.FusedSGD(net.parameters(), average=rf.ema(0.5), buffers=net)
