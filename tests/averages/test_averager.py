"""Averages beside any optimizer: each policy against its literal loop, and what training does."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from beside import (
    FLOATING,
    OPTIMIZERS,
    POLICIES,
    STEPS,
    Net,
    Normed,
    Weights,
    adamw,
    as_bits,
    ends,
    loss,
    train,
    trainable,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import rbwa_fused as rf


@pytest.mark.parametrize("by", ["hook", "hand"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_policy_beside_every_optimizer_is_its_literal_loop(
    name: str, policy: str, by: str
) -> None:
    """Bit for bit: the optimizer and the loop compute in float64, in the same order."""
    average, literal = POLICIES[policy]
    net, plain = Net().double(), Net().double()
    optimizers, theirs = OPTIMIZERS[name](net), OPTIMIZERS[name](plain)
    hooked = None if by == "hand" else optimizers[0] if len(optimizers) == 1 else optimizers
    averager = rf.Averager(net, average, optimizer=hooked)
    a = [p.detach().clone() for p in plain.parameters()]
    n = [int(average.initial != "first_sample")]

    def behind(step: int) -> None:
        x = [p.detach() for p in plain.parameters()]
        before = [t.clone() for t in a]
        back = literal(a, x, n[0], step)
        n[0] += average.due(step)
        if not average.due(step) and step != average.start:
            assert all(map(torch.equal, a, before))
        if back:
            torch._foreach_copy_(x, a)

    train(plain, theirs, 1, STEPS, behind)
    train(net, optimizers, 1, STEPS, None if hooked else lambda step: averager.update())
    assert averager.n_averaged == n[0]
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    held = [averager.state[p]["average"] for p in net.parameters()]
    assert all(map(torch.equal, held, a))
    weights = [p.detach().clone() for p in net.parameters()]
    with averager.averaged():
        assert all(map(torch.equal, net.parameters(), a))
    assert all(map(torch.equal, net.parameters(), weights))


def test_the_optimizer_keeps_its_groups_state_and_state_dict() -> None:
    dicts = []
    for averaged in (True, False):
        net = Net()
        opt = adamw(net, fused=True)
        averager = rf.Averager(net, rf.ema(0.5), optimizer=opt) if averaged else None
        train(net, [opt], 1, 3)
        dicts.append(as_bits(opt.state_dict()))
        assert averager is None or averager.n_averaged == 3
    assert dicts[0] == dicts[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_is_killed_and_resumed_is_the_run(policy: str) -> None:
    average = POLICIES[policy][0]
    net, opt = Net(), None
    opt = adamw(net)
    averager = rf.Averager(net, average, optimizer=opt)
    train(net, [opt], 1, 7)
    file = io.BytesIO()
    saved = {"net": net.state_dict(), "opt": opt.state_dict(), "average": averager.state_dict()}
    torch.save(saved, file)
    train(net, [opt], 8, STEPS)

    again = Net()
    opt2 = adamw(again)
    resumed = rf.Averager(again, average, optimizer=opt2)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again.load_state_dict(loaded["net"])
    opt2.load_state_dict(loaded["opt"])
    resumed.load_state_dict(loaded["average"])
    train(again, [opt2], 8, STEPS)
    assert ends(again, resumed) == ends(net, averager)


def test_there_are_averages_to_load_into_before_the_first_step() -> None:
    """torch.distributed.checkpoint loads into what a state dict has."""
    net = Net()
    for optimizer in (None, adamw(net)):
        fresh = rf.Averager(net, rf.ema(0.5, start=5), optimizer=optimizer)
        assert sorted(fresh.state_dict()["state"]) == list(range(6)) and fresh.n_averaged == 0


def test_a_step_that_a_scaler_skips_samples_nothing() -> None:
    for options in ({"fused": True}, {"foreach": True}):
        net = Net()
        opt = adamw(net, **options)
        averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        a: Weights = []
        for step in range(1, 6):
            opt.zero_grad()
            scaler.scale(loss(net, step)).backward()
            if step in (1, 4):
                trainable(net)[0].grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.step(opt)
            scaler.update()
            if step not in (1, 4):
                x = [p.detach() for p in net.parameters()]
                a = [b + 0.5 * (w - b) for b, w in zip(a, x, strict=True)] if a else x
                a = [t.clone() for t in a]
        assert averager.n_averaged == 3
        held = [averager.state[p]["average"] for p in net.parameters()]
        assert all(map(torch.equal, held, a)), options


@pytest.mark.parametrize("first", ["compiled", "averaged"])
def test_it_goes_with_a_compiled_model_before_or_behind(first: str) -> None:
    results = []
    for compiled in (True, False):
        net: Any = Net()
        opt = adamw(net)
        model = torch.compile(net, backend="eager") if compiled and first == "compiled" else net
        averager = rf.Averager(model, rf.ema(0.5), optimizer=opt, exclude=["last.*"])
        if compiled and first == "averaged":
            model = torch.compile(net, backend="eager")
        for step in range(1, 4):
            opt.zero_grad()
            loss(model, step).backward()
            opt.step()
        results.append(ends(net, averager))
    assert results[0] == results[1]


@pytest.mark.filterwarnings("error:Dynamo does not know how to trace")
@pytest.mark.parametrize("hooked", [False, True])
def test_in_a_compiled_training_step_a_sample_is_a_graph_break_at_most(hooked: bool) -> None:
    results, graphs, breaks = [], [], []
    for averaged in (False, True):
        for compiled in (False, True):
            net = Net()
            opt = torch.optim.SGD(trainable(net), lr=0.05)
            behind = opt if hooked else None
            averager = rf.Averager(net, rf.mean(), optimizer=behind) if averaged else None

            def step(net: Net, opt: Any, averager: Any) -> None:
                opt.zero_grad()
                loss(net, 1).backward()
                opt.step()
                if averager is not None and not hooked:
                    averager.update()

            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            counter = CompileCounter()
            function = torch.compile(step, backend=counter) if compiled else step
            for _ in range(5):
                function(net, opt, averager)
            if compiled:
                graphs.append(counter.frame_count)
                breaks.append(len(torch._dynamo.utils.counters["graph_break"]))
            if averager is not None:
                results.append(ends(net, averager))
    assert results[0] == results[1] and graphs[0] == graphs[1] > 0
    assert breaks[1] <= breaks[0] + 1


def test_a_parameter_exchanged_under_its_name_goes_on_with_its_average() -> None:
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 3)
    old = net.last.weight
    average = averager.state[old]["average"].clone()
    net.last.weight = nn.Parameter(torch.ones(3, 7))
    opt.param_groups[0]["params"] = trainable(net)
    train(net, [opt], 4, 4)
    x = net.last.weight.detach()
    assert torch.equal(averager.state[net.last.weight]["average"], average + 0.5 * (x - average))
    assert old not in averager.state and averager.n_averaged == 4


def test_a_layer_that_comes_later_starts_as_a_copy_and_one_that_goes_is_forgotten() -> None:
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 2)
    gone = list(net.frozen.parameters())
    net.frozen = nn.Sequential(nn.Linear(7, 7))  # type: ignore[assignment]
    opt.add_param_group({"params": list(net.frozen.parameters())})
    train(net, [opt], 3, 3)
    new = net.frozen[0].weight  # type: ignore[index]
    assert torch.equal(averager.state[new]["average"], new.detach())
    assert not any(p in averager.state for p in gone)
    copied = new.detach().clone()
    train(net, [opt], 4, 4)
    expected = copied + 0.5 * (new.detach() - copied)
    assert torch.equal(averager.state[new]["average"], expected)
    assert averager.n_averaged == 4


def test_a_converted_model_is_averaged_in_its_new_dtype() -> None:
    net = Net()
    averager = rf.Averager(net, rf.ema(0.5))
    x = net.last.weight
    a = x.detach().clone()
    for dtype in (torch.float32, torch.float64, torch.float64):
        net.to(dtype)
        with torch.no_grad():
            x += 1
        averager.update()
        a = x.detach().clone() if averager.n_averaged == 1 else a + 0.5 * (x.detach() - a)
        assert averager.state[x]["average"].dtype == dtype
    assert torch.equal(averager.state[x]["average"], a)
    net.half()
    averager.update()
    assert averager.state[x]["average"].dtype == torch.float32 and averager.n_averaged == 4


def test_an_average_that_is_taken_away_starts_again_as_a_copy() -> None:
    net = Net()
    averager = rf.Averager(net, rf.ema(0.5))
    averager.update()
    p = net.last.weight
    averager.state[p] = {"mine": torch.zeros(())}
    with torch.no_grad():
        p.fill_(3.0)
    averager.update()
    assert averager.state[p]["average"].eq(3.0).all() and averager.n_averaged == 2


def test_names_that_are_excluded_have_no_average() -> None:
    net = Net()
    averager = rf.Averager(net, rf.ema(0.5), exclude=["*.bias", "frozen.*"])
    assert averager.param_groups[0]["param_names"] == ["first.weight", "last.weight"]
    named = rf.Averager(net.named_parameters(), rf.ema(0.5), exclude=["first.*"])
    assert "first.weight" not in named.param_groups[0]["param_names"]


def test_groups_have_policies_of_their_own() -> None:
    net = Net()
    first, last = list(net.first.parameters()), list(net.last.parameters())
    averager = rf.Averager(
        [
            {"params": first},
            {"params": last, "average": rf.mean()},
            {"params": net.frozen.weight, "average": None},
        ],
        rf.ema(0.5),
    )
    with torch.no_grad():
        for k in range(3):
            for p in (*first, *last):
                p.fill_(float(k))
            averager.update()
    assert averager.state[first[0]]["average"].unique().tolist() == [1.25]
    assert averager.state[last[0]]["average"].unique().tolist() == [1.0]
    assert "average" not in averager.state[net.frozen.weight]
    state = averager.averaged_state_dict(net)
    assert state["last.bias"].tolist() == [1.0] * 3 and state["first.bias"].tolist() == [1.25] * 7


def test_slow_weights_are_those_before_the_first_step_wherever_they_come_from() -> None:
    """A model is often loaded between construction and the first step."""
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.lookahead(2, 0.5), optimizer=opt)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.5)
    train(net, [opt], 1, 1)
    assert all(averager.state[p]["average"].eq(0.5).all() for p in net.parameters())


def test_an_averager_lives_as_long_as_its_optimizer_or_until_it_is_removed() -> None:
    """Nobody may keep one that fills a teacher."""
    net = Net()
    teacher = teacher_of(net)
    opt = adamw(net)
    rf.Averager(net, rf.ema(0.5), optimizer=opt, into=teacher)
    gc.collect()
    x = net.last.weight.detach().clone()
    train(net, [opt], 1, 1)
    expected = x + 0.5 * (net.last.weight.detach() - x)
    assert torch.equal(teacher.last.weight, expected)  # type: ignore[arg-type, union-attr]

    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 2, 2)
    averager.remove()
    train(net, [opt], 3, 3)
    assert averager.n_averaged == 1
    averager.update()
    assert averager.n_averaged == 2
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(averager)
    gone = weakref.ref(averager)
    del averager
    gc.collect()
    assert gone() is None
    last = weakref.ref(opt)
    del opt
    gc.collect()
    assert last() is None


def test_two_that_write_back_to_one_parameter_are_refused() -> None:
    net = Net()
    first = rf.Averager(net, rf.lookahead(2))
    rf.Averager(net, rf.ema()).update()
    with pytest.raises(ValueError, match=r"0 \('first.weight'\) is written back to by another"):
        rf.Averager(net, rf.rbwa(2))
    first.remove()
    second = rf.Averager(net, rf.rbwa(2))
    net.last.weight = nn.Parameter(torch.ones(3, 7))
    second.update()
    del second
    gc.collect()
    rf.Averager(net.last, rf.rbwa(2))


@pytest.mark.parametrize("groups", [1, 2])
def test_an_average_that_is_no_longer_the_parameter_itself_is_said_once(groups: int) -> None:
    policy = rf.rbwa(4, 1)
    members = [{"params": [nn.Parameter(torch.ones(3))]} for _ in range(groups)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        averager = rf.Averager(members, policy)
        for _ in range(6):
            averager.update()
        averager.remove()
        rf.Averager(members, rf.rswa(4, 1)).remove()
    (warning,) = caught
    assert str(warning.message).startswith("rbwa(4, 1) keeps its average in memory of its own here")
    assert warning.filename == __file__


def test_a_weight_that_cannot_be_hashed_is_one() -> None:
    """As an object of a dataclass, which compares by value."""

    @dataclass
    class Constant:
        w: float

        def __call__(self, n: int, step: int) -> float:
            return self.w

    p = torch.ones(3)
    averager = rf.Averager([p], rf.Average(Constant(0.5)))
    for value in (2.0, 4.0):
        p.fill_(value)
        averager.update()
    assert averager.state[p]["average"].tolist() == [3.0] * 3


def test_what_is_wrong_is_said_once_and_changes_nothing() -> None:
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 2)
    before = ends(net, averager)
    with averager.averaged():
        with pytest.raises(RuntimeError, match=r"step\(\) inside averaged\(\)"):
            train(net, [opt], 3, 3)
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\) inside averaged\(\)"):
            averager.load_state_dict(averager.state_dict())
    with pytest.raises(RuntimeError, match="each step of AdamW is sampled already"):
        averager.update()
    with pytest.raises(ValueError, match="the checkpoint's rule is 'sgd'"):
        averager.load_state_dict(torch.optim.SGD(net.parameters()).state_dict())
    with pytest.raises(ValueError, match=r"the checkpoint's average is Average\(Mean"):
        averager.load_state_dict(rf.Averager(net, rf.mean()).state_dict())
    opt.zero_grad()
    assert ends(net, averager) == before
    by_hand = rf.Averager(net, rf.ema(0.5))
    by_hand.update()
    with by_hand.averaged(), pytest.raises(RuntimeError, match=r"update\(\) inside averaged\(\)"):
        by_hand.update()
    del opt
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimizer of this Averager is gone"):
        averager.update()
    with averager.averaged():
        pass


WRONG: list[tuple[Callable[[Net], Any], type[Exception], str]] = [
    (
        lambda net: rf.Averager(net, rf.ema(), optimizer=torch.optim.AdamW(net.first.parameters())),
        ValueError,
        r"AdamW has not parameter 4 \('last.weight'\) and 1 more",
    ),
    (lambda net: rf.Averager(net, rf.ema(), exclude=["nothing.*"]), ValueError, "fits no name"),
    (lambda net: rf.Averager(net, rf.ema(), exclude="bias"), TypeError, "a sequence of patterns"),
    (
        lambda net: rf.Averager(net.parameters(), rf.ema(), exclude=["*"]),
        ValueError,
        "expected parameters with names",
    ),
    (lambda net: rf.Averager([], rf.ema()), ValueError, "none to average"),
    (lambda net: rf.Averager(net.last.weight, rf.ema()), TypeError, "an iterable of them"),
    (lambda net: rf.Averager([1.0], rf.ema()), TypeError, "float"),  # type: ignore[list-item]
    (lambda net: rf.Averager([net.last.bias] * 2, rf.ema()), ValueError, "named twice"),
    (lambda net: rf.Averager(net, 0.999), TypeError, "Invalid average: 0.999"),  # type: ignore[arg-type]
    (
        lambda net: rf.Averager(net, rf.ema(), optimizer=object()),  # type: ignore[arg-type]
        TypeError,
        "Invalid optimizer: object",
    ),
    (lambda net: rf.Averager(net, rf.ema(), optimizer=[]), ValueError, "an empty sequence"),
    (
        lambda net: rf.Averager([torch.zeros(2, dtype=torch.int64)], rf.ema()),
        TypeError,
        "parameter 0 has dtype torch.int64",
    ),
    (lambda net: rf.Averager(net, rf.ema(), backend="gpu"), ValueError, "Invalid backend: 'gpu'"),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_bad_arguments_are_one_clear_error(
    make: Callable[[Net], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(Net())


def test_a_frozen_layer_that_no_optimizer_has_is_averaged_as_it_is() -> None:
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 2)
    net.frozen.requires_grad_(True)
    opt.add_param_group({"params": list(net.frozen.parameters())})
    frozen = net.frozen.weight.detach().clone()
    assert torch.equal(averager.state[net.frozen.weight]["average"], frozen)
    train(net, [opt], 3, 3)
    x = net.frozen.weight.detach()
    expected = frozen + 0.5 * (x - frozen)
    assert torch.equal(averager.state[net.frozen.weight]["average"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_reference_has_the_same_bits(policy: str, dtype: torch.dtype) -> None:
    results = []
    for backend in ("cpu", "reference"):
        net = Net().to(dtype)
        opt = torch.optim.SGD(trainable(net), lr=0.05)
        averager = rf.Averager(net, POLICIES[policy][0], optimizer=opt, backend=backend)
        assert averager.backend == backend
        train(net, [opt], 1, STEPS)
        results.append(ends(net, averager))
    assert results[0] == results[1]


def test_statistics_are_estimated_anew_for_it_too() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 3)
    batches = [torch.randn(8, 5) for _ in range(2)]
    norm: Any = net[1]
    before = norm.running_mean.clone()
    with rf.averaged_model(averager, net, batches):
        expected = torch.stack([net[0](x).mean(0) for x in batches]).mean(0)
        torch.testing.assert_close(norm.running_mean, expected)
    assert torch.equal(norm.running_mean, before)


def test_it_prints_what_it_averages() -> None:
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    assert repr(averager) == "Averager(6 parameters: ema(0.5) behind AdamW)"
    assert copy.copy(averager.param_groups[0])["average"] is averager.param_groups[0]["average"]


def test_only_what_is_averaged_is_looked_at_anew_and_once() -> None:
    """A buffer that is assigned in each forward pass would otherwise cost new tables each time."""
    net = Normed()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 2)
    net.first.weight = nn.Parameter(net.first.weight.detach().clone())
    train(net, [opt], 3, 3)
    tables = averager.engine.tables
    train(net, [opt], 4, 6)
    assert averager.engine.tables is tables and averager.n_averaged == 6


def test_a_module_without_parameters_may_get_some() -> None:
    net = Net()
    net.activation = nn.Identity()
    averager = rf.Averager(net, rf.ema(0.5))
    averager.update()
    net.activation.register_parameter("scale", nn.Parameter(torch.ones(2)))
    averager.update()
    assert averager.averages()["activation.scale"].tolist() == [1.0] * 2


def test_an_optimizer_is_found_in_a_wrapper() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=Wrapper(Wrapper(opt)))  # type: ignore[arg-type]
    train(net, [opt], 1, 2)
    assert averager.n_averaged == 2


def test_a_checkpoint_is_the_way_out_where_weights_could_not_come_back() -> None:
    net = Net()
    averager = rf.Averager(net, rf.ema(0.5))
    averager.update()
    saved, weights = copy.deepcopy(averager.state_dict()), copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="could not bring back"), averager.averaged():
        net.last.weight.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"could not bring back|for training weights"):
        averager.update()
    net.last.weight.data = torch.zeros(3, 7)
    net.load_state_dict(weights)
    averager.load_state_dict(saved)
    averager.update()
    assert torch.equal(net.last.weight, weights["last.weight"])
    assert averager.n_averaged == 2


# ---- buffers -------------------------------------------------------------------------------------


def test_floating_buffers_are_averaged_with_the_parameters() -> None:
    """As AveragedModel(use_buffers=True) has them, but for its copy of the counts."""
    net = Normed()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, buffers=True)
    a: dict[str, Tensor] = {}
    for step in range(1, 6):
        opt.zero_grad()
        loss(net, step).backward()
        opt.step()
        x = {**dict(net.named_parameters()), **{n: net.get_buffer(n) for n in FLOATING}}
        for name, value in x.items():
            now = value.detach()
            a[name] = now.clone() if step == 1 else a[name] + 0.5 * (now - a[name])
    live = {name: b.clone() for name, b in net.named_buffers()}
    assert averager.param_groups[1]["param_names"] == sorted(FLOATING, key=list(live).index)
    state = averager.averaged_state_dict()
    for name, value in a.items():
        assert torch.equal(
            averager.state[
                net.get_parameter(name) if name not in FLOATING else net.get_buffer(name)
            ]["average"],
            value,
        )
        assert name == "cache" or torch.equal(state[name], value)
    assert "cache" not in state and state["norm.num_batches_tracked"] == 5
    with averager.averaged():
        assert all(torch.equal(net.get_buffer(name), a[name]) for name in FLOATING)
        assert net.norm.num_batches_tracked == 5  # type: ignore[comparison-overlap]
    assert all(torch.equal(net.get_buffer(name), value) for name, value in live.items())


def test_statistics_that_are_averaged_are_not_estimated_anew() -> None:
    net = Normed()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, buffers=True)
    train(net, [opt], 1, 3)
    with averager.averaged():
        expected = as_bits(dict(net.named_buffers()))
    with rf.averaged_model(averager, net, [torch.randn(8, 5)]):
        norm = {name: value for name, value in net.named_buffers() if name.startswith("norm")}
        assert all(as_bits(value) == expected[name] for name, value in norm.items())


@pytest.mark.parametrize("inside", ["converted", "assigned"])
def test_what_takes_the_place_of_a_tensor_inside_gets_its_training_values(inside: str) -> None:
    net = Normed()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, buffers=True)
    train(net, [opt], 1, 3)
    before, averages = as_bits(net.state_dict()), as_bits(averager.averages())
    with averager.averaged():
        if inside == "converted":
            net.double()
        else:
            net.norm.running_mean = net.norm.running_mean + 1.0  # type: ignore[operator]
            net.norm.weight = nn.Parameter(torch.zeros_like(net.norm.weight))
        assert averager.averages().keys() == averages.keys()
    assert as_bits(net.float().state_dict()) == before
    assert as_bits(averager.averages()) == averages


def test_a_resized_buffer_starts_again_as_a_copy_and_a_new_one_joins() -> None:
    net = Normed()
    averager = rf.Averager(net, rf.ema(0.5), buffers=True)
    averager.update()
    average = averager.state[net.norm.running_mean]["average"]
    net.scale = torch.full((7,), 2.0)
    net.register_buffer("later", torch.full((2,), 3.0))
    averager.update()
    later = net.get_buffer("later")
    assert averager.state[net.scale]["average"].tolist() == [2.0] * 7
    assert averager.state[later]["average"].tolist() == [3.0] * 2
    with torch.no_grad():
        later.fill_(5.0)
        net.scale.resize_(2).fill_(1.0)
    averager.update()
    assert averager.state[later]["average"].tolist() == [4.0] * 2
    assert averager.state[net.scale]["average"].tolist() == [1.0] * 2
    assert averager.state[net.norm.running_mean]["average"] is average
    del net.later
    averager.update()
    assert later not in averager.state and averager.n_averaged == 4


def test_buffers_are_in_the_checkpoint() -> None:
    net = Normed()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, buffers=True)
    train(net, [opt], 1, 3)
    file = io.BytesIO()
    torch.save([net.state_dict(), averager.state_dict()], file)
    file.seek(0)
    model, saved = torch.load(file, weights_only=True)
    again = Normed()
    again.load_state_dict(model)
    resumed = rf.Averager(again, rf.ema(0.5), buffers=True)
    resumed.load_state_dict(saved)
    assert as_bits(resumed.state_dict()) == as_bits(averager.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        rf.Averager(again, rf.ema(0.5)).load_state_dict(saved)
    with pytest.raises(TypeError, match="buffers=True needs a module"):
        rf.Averager(net.parameters(), rf.ema(0.5), buffers=True)


# ---- into another module -------------------------------------------------------------------------


def teacher_of(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False)


@pytest.mark.parametrize("tensors", [False, True])
def test_a_teacher_follows_the_student_from_where_it_stands(tensors: bool) -> None:
    """As DINO's loop: teacher = m teacher + (1 - m) student, from the very first step on."""
    net = Net()
    teacher = Net().requires_grad_(False)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(0.5)  # pretrained: a copy of the student would destroy it
    a = [p.clone() for p in teacher.parameters()]
    addresses = [p.data_ptr() for p in teacher.parameters()]
    opt = adamw(net, fused=True)
    target: Any = list(teacher.parameters()) if tensors else teacher
    averager = rf.Averager(net, rf.ema(0.75), optimizer=opt, into=target)
    assert averager.n_averaged == 1
    for step in range(1, 5):
        opt.zero_grad()
        (loss(net, step) + (loss(net, step) - loss(teacher, step)).square()).backward()
        opt.step()
        x = [p.detach() for p in net.parameters()]
        a = [b + 0.25 * (w - b) for b, w in zip(a, x, strict=True)]
        assert all(map(torch.equal, teacher.parameters(), a)), step
    assert [p.data_ptr() for p in teacher.parameters()] == addresses
    student = [p.detach().clone() for p in net.parameters()]
    with averager.averaged():
        assert all(map(torch.equal, net.parameters(), a))
        assert all(map(torch.equal, teacher.parameters(), a))
    assert all(map(torch.equal, net.parameters(), student))
    assert all(map(torch.equal, teacher.parameters(), a))


def test_autograd_sees_that_the_teacher_has_moved() -> None:
    net, teacher = Net(), Net()
    averager = rf.Averager(net, rf.ema(0.75), into=teacher)
    value = loss(teacher, 1)
    averager.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_modules_own_state_dict_is_the_checkpoint() -> None:
    net = Net()
    teacher = teacher_of(net)
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.75), optimizer=opt, into=teacher)
    train(net, [opt], 1, 3)
    saved = copy.deepcopy([m.state_dict() for m in (net, opt, averager, teacher)])  # type: ignore[attr-defined]
    assert saved[2]["state"] == {}
    train(net, [opt], 4, 6)

    again = Net()
    teacher2, opt2 = teacher_of(again), adamw(again)
    resumed = rf.Averager(again, rf.ema(0.75), optimizer=opt2, into=teacher2)
    for m, state in zip((again, opt2, teacher2), (saved[0], saved[1], saved[3]), strict=True):
        m.load_state_dict(state)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="load its state dict, too"):
        resumed.load_state_dict(saved[2])
    train(again, [opt2], 4, 6)
    assert as_bits(teacher2.state_dict()) == as_bits(teacher.state_dict())
    assert ends(again, resumed) == ends(net, averager)


def test_a_teacher_that_is_moved_or_exchanged_is_followed() -> None:
    net = Net()
    teacher = teacher_of(net)
    averager = rf.Averager(net, rf.ema(0.5), into=teacher)
    averager.update()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    teacher.last = nn.Linear(7, 3).requires_grad_(False)
    for p in teacher.parameters():
        p.data = torch.zeros_like(p)
    averager.update()
    assert all(p.eq(0.5).all() for p in teacher.parameters())
    assert averager.n_averaged == 3


def test_statistics_of_a_teacher_follow_where_buffers_are_averaged() -> None:
    net = Normed()
    teacher = teacher_of(net)
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, buffers=True, into=teacher)
    before = teacher.get_buffer("norm.running_mean").clone()
    train(net, [opt], 1, 1)
    expected = before + 0.5 * (net.norm.running_mean - before)  # type: ignore[operator]
    assert torch.equal(teacher.get_buffer("norm.running_mean"), expected)
    assert averager.averaged_state_dict()["norm.running_mean"].equal(expected)


def test_a_teacher_in_16_bits_must_be_able_to_move() -> None:
    net, teacher = Net().bfloat16(), teacher_of(Net()).bfloat16()
    for policy in (rf.ema(0.9), rf.mean()):
        with pytest.raises(ValueError, match=r"averages in torch\.bfloat16 cannot follow"):
            rf.Averager(net, policy, into=teacher)
    averager = rf.Averager(net, rf.ema(0.875), into=teacher)
    assert averager.param_groups[0]["average"].dtype == torch.bfloat16
    averager.update()
    asked = rf.Average(rf.Ema(0.999), dtype=torch.bfloat16)
    rf.Averager(net, asked, into=teacher).update()
    with pytest.raises(ValueError, match=r"float32 there \(expected torch\.bfloat16"):
        rf.Averager(net, asked, into=teacher_of(Net()))
    assert teacher.last.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def other_head() -> nn.Module:
    teacher = Net()
    teacher.last = nn.Linear(7, 4)
    return teacher


def mixed() -> nn.Module:
    teacher = Net()
    teacher.last.double()
    return teacher


def strided() -> nn.Module:
    teacher = Net()
    teacher.last.weight = nn.Parameter(torch.zeros(7, 3).t())
    return teacher


WRONG_TARGETS: list[tuple[Callable[[Net], Any], str]] = [
    (lambda net: other_head(), r"parameter 4 \('last.weight'\) has shape \(4, 7\) there"),
    (lambda net: nn.Linear(5, 7), "Linear has no first.weight, first.bias, frozen.weight"),
    (lambda net: list(net.parameters())[:3], r"3 tensors \(expected 6\)"),
    (lambda net: net, "share memory with the weights or each other"),
    (lambda net: strided(), r"'last.weight'\) has another layout there, \(1, 3\)"),
    (lambda net: Net().to("meta"), "is on meta there"),
    (lambda net: Net().double(), "Invalid dtype: torch.float64"),
    (lambda net: mixed(), r"parameter 4 \('last.weight'\) has dtype torch.float64 there"),
]


@pytest.mark.parametrize(("target", "message"), WRONG_TARGETS, ids=range(len(WRONG_TARGETS)))
def test_a_target_that_cannot_hold_the_averages_is_one_clear_error(
    target: Callable[[Net], Any], message: str
) -> None:
    net = Net()
    before = as_bits(list(net.parameters()))
    with pytest.raises(ValueError, match=message):
        rf.Averager(net, rf.ema(0.5), into=target(net))
    assert as_bits(list(net.parameters())) == before
    with pytest.raises(TypeError, match="expected a module or tensors"):
        rf.Averager(net, rf.ema(0.5), into=3)  # type: ignore[arg-type]
