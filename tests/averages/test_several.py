"""Several averages in one pass: the bits of separate ones, their names, their checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, STEPS, gradients, params, products
from rules import RULES
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import several
from rbwa_fused.engine import backends

SEPARATE = (
    rf.ema(0.7, start=1, every=2),
    rf.swa(start=2, every=2, initial="current"),
    rf.ema(0.6, start=3, every=2, initial="now", offset=1),
    rf.Average(lambda n, step: 0.5 / n + step / 100, start=2),
)
KEYS = ("average", "average_1", "average_2", "average_3")
SETS = [s for s in ("avx512", "avx2", "baseline") if backends._C is not None]


@pytest.fixture(params=[*SETS, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's three loops, and plain torch."""
    if request.param == "reference":
        yield "reference"
        return
    before = backends._C.cpu_capability()
    if not backends._C.set_cpu_capability(request.param):
        pytest.skip(f"no {request.param} here")
    yield "cpu"
    backends._C.set_cpu_capability(before)


def run(opt: Any, ps: list[nn.Parameter]) -> None:
    for step in range(STEPS):
        for i, (p, g) in enumerate(zip(ps, gradients(ps, step), strict=True)):
            p.grad = None if step > 0 and i % STEPS == step else g
        if step == 3:  # somebody else writes, which a master follows
            for p in ps[::2]:
                p.detach().mul_(0.7)
        opt.step()


@pytest.mark.parametrize(("dtype", "rule", "_"), products(DTYPES, RULES, ["none"]), ids=str)
def test_each_average_has_the_bits_that_it_has_alone(
    dtype: torch.dtype, rule: str, _: str, backend: str
) -> None:
    together = params(dtype)
    opt = RULES[rule].made(together, average=list(SEPARATE), backend=backend)
    run(opt, together)
    for number, policy in enumerate(SEPARATE):
        alone = params(dtype)
        other = RULES[rule].made(alone, average=policy, backend=backend)
        run(other, alone)
        assert opt.n_averaged(number) == other.n_averaged > 1
        for p, q in zip(together, alone, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(opt.state[p][KEYS[number]], other.state[q]["average"]), number


def test_a_further_average_samples_what_a_write_back_leaves() -> None:
    ps = [nn.Parameter(torch.ones(2000))]
    opt = rf.FusedSGD(ps, lr=0.5, average=[rf.lookahead(2, 0.5), rf.Average(rf.Ema(0.0))])
    for _ in range(4):
        ps[0].grad = torch.ones(2000)
        opt.step()
        assert torch.equal(opt.state[ps[0]]["average_1"], ps[0].detach())
    assert torch.equal(ps[0].detach(), torch.full((2000,), 0.0))  # 1 - 2 (2 lr) / 2


# ---- names and numbers ---------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x)))
        return result


def train(net: nn.Module, opt: Any, first: int, last: int, averager: Any = None) -> None:
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        opt.zero_grad()
        net(torch.randn(5, 3, generator=generator)).square().mean().backward()
        opt.step()
        if averager is not None:
            averager.update()


def trained(average: Any, steps: int = 6, **options: Any) -> tuple[Net, Any]:
    net = Net()
    opt = rf.FusedSGD(net.parameters(), 0.1, 0.9, average=average, **options)
    train(net, opt, 1, steps)
    return net, opt


def bits(tensors: Any) -> list[Any]:
    values = tensors.values() if isinstance(tensors, dict) else tensors
    return [t.detach().reshape(-1).view(torch.uint8).tolist() for t in values]


NAMED = {"long": rf.ema(0.9), "short": rf.ema(0.5), "late": rf.mean(start=4)}


def test_one_in_a_list_is_that_average_alone() -> None:
    net, opt = trained([rf.ema(0.9)])
    other, alone = trained(rf.ema(0.9))
    assert isinstance(opt.param_groups[0]["average"], rf.Average)
    assert opt.param_groups[0].keys() == alone.param_groups[0].keys()
    mine, theirs = opt.state_dict(), alone.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert [held.keys() for held in mine["state"].values()] == [
        held.keys() for held in theirs["state"].values()
    ]
    assert bits(net.parameters()) == bits(other.parameters())


def test_a_number_or_a_name_says_which_average_is_read() -> None:
    net, opt = trained(NAMED)
    before = bits(net.state_dict())
    p = net.first.weight
    for number, name in enumerate(NAMED):
        _, alone = trained(NAMED[name])
        expected = alone.state[alone.param_groups[0]["params"][0]]["average"]
        for which in (number, name):
            assert torch.equal(opt.averages(net, which=which)["first.weight"], expected)
            assert opt.averages(net, which=which)["first.weight"] is opt.state[p][KEYS[number]]
            with opt.averaged(which=which):
                assert torch.equal(p, expected)
            assert bits(net.state_dict()) == before
            state = opt.averaged_state_dict(net, which=which)
            assert torch.equal(state["first.weight"], expected)
            half = opt.averaged_state_dict(net, which=which, blend=0.5)["first.weight"]
            torch.testing.assert_close(half, (p + expected) / 2)
            other = Net()
            opt.copy_to(other, net, which=which)
            assert torch.equal(other.first.weight, expected)
            with rf.averaged_model(opt, net, [torch.randn(8, 3)], which=which):
                assert torch.equal(p, expected)
    assert [opt.n_averaged(which) for which in NAMED] == [6, 6, 2]
    assert opt.n_averaged == 6
    opt.adopt(which="short")
    assert torch.equal(p, opt.state[p]["average_1"])


def test_a_count_of_samples_is_a_number_that_may_be_kept() -> None:
    _, opt = trained(NAMED)
    file = io.BytesIO()
    torch.save({"samples": opt.n_averaged}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"samples": 6}
    for n in (pickle.loads(pickle.dumps(opt.n_averaged)), copy.deepcopy(opt.n_averaged)):
        assert type(n) is int and n == opt.n_averaged == 6


def test_what_is_no_average_is_refused_with_those_there_are() -> None:
    net, opt = trained(NAMED)
    for which in (3, -1, "none", "0"):
        for call in (opt.averaged, opt.adopt, opt.n_averaged):
            with pytest.raises(ValueError, match=r"Invalid which: .*0, 1, 2, 'long', 'short'"):
                call(which=which)
        with pytest.raises(ValueError, match="Invalid which"):
            opt.averaged_state_dict(net, which=which)
        with pytest.raises(ValueError, match="Invalid which"):
            opt.averages(net, which=which)
    for kind in (True, 1.0, None):
        with pytest.raises(TypeError, match="Invalid which"):
            opt.averaged(which=kind)


def test_groups_may_have_different_averages() -> None:
    net = Net()
    groups: list[dict[str, Any]] = [
        {"params": net.first.parameters()},
        {"params": net.norm.parameters(), "average": False},
        {"params": net.last.parameters(), "average": {"short": rf.ema(0.5)}},
    ]
    opt = rf.FusedSGD(groups, lr=0.1, average={"long": rf.ema(0.9), "short": rf.ema(0.5)})
    train(net, opt, 1, 5)
    assert (
        opt.averages(net, which="short").keys()
        == dict([*net.first.named_parameters("first"), *net.last.named_parameters("last")]).keys()
    )
    assert opt.averages(net, which="long").keys() == {"first.weight", "first.bias"}
    assert set(opt.state[net.last.weight]) == {"average"}
    weight = net.last.weight.detach().clone()
    with opt.averaged(which="long"):
        assert torch.equal(net.last.weight, weight)  # it has no such average


def test_what_cannot_be_averaged_together_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    written = rf.lookahead(2, 0.5)
    for average, error, words in (
        ([rf.ema(), written], ValueError, "at place 1 .*first of several"),
        ({"a": rf.ema(), "b": rf.rbwa(2)}, ValueError, "at place 1"),
        ([], ValueError, "0 policies"),
        ([rf.ema()] * 17, ValueError, "17 policies"),
        ([rf.ema(), None], TypeError, "None among several"),
        ([rf.ema(), [rf.ema()]], TypeError, "among several"),
        ({1: rf.ema()}, TypeError, "the name 1"),
        ({"": rf.ema()}, TypeError, "the name ''"),
        ("ema", TypeError, "Invalid average: 'ema'"),
        (0.999, TypeError, "Invalid average: 0.999"),
    ):
        for make in (
            lambda average: rf.FusedSGD([p], average=average),
            lambda average: rf.FusedSGD([{"params": [p], "average": average}]),
            lambda average: rf.Averager([p], average),
        ):
            with pytest.raises(error, match=words):
                make(average)
    q = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="expected one dtype"):
        rf.FusedSGD([q], average=[rf.ema(), rf.Average(rf.Ema(0.9), dtype=torch.bfloat16)])
    custom = rf.Average(lambda n, step: 0.5)
    with pytest.raises(ValueError, match="capturable=True"):
        rf.FusedSGD([p], average=[rf.ema(), custom], capturable=True)
    with pytest.raises(ValueError, match="the name 'x'"):
        rf.SGDScheduleFree([p], average={"x": rf.ema()})
    with pytest.raises(ValueError, match="writes back"):
        rf.SGDScheduleFree([p], average=[written, rf.ema()])
    with pytest.raises(ValueError, match="Invalid into: averages"):
        rf.Averager([p], [rf.ema(), rf.ema(0.9)], into=[torch.ones(3)])
    opt = rf.FusedSGD([p], average=[rf.ema(), rf.ema(0.9)])
    opt.param_groups[0]["average"] = [rf.ema(), rf.ema(0.8)]
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="was assigned to a group"):
        opt.step()


def test_it_prints_as_it_was_given() -> None:
    _, opt = trained(NAMED)
    assert f"average: {NAMED!r}" in repr(opt)
    assert "n_averaged" not in repr(opt)
    assert repr(several.averaging([rf.ema(0.9), rf.ema(0.5)])) == "[ema(0.9), ema(0.5)]"


def test_schedule_free_reads_x_and_each_average_of_y() -> None:
    net = Net()
    opt = rf.SGDScheduleFree(net.parameters(), lr=0.1, average=NAMED)
    opt.train()
    train(net, opt, 1, 6)
    p = net.first.weight
    x = opt.averaged_state_dict(net)["first.weight"]
    with opt.averaged():
        assert torch.equal(p, x)
    for which, key in (("average", 0), (0, 0), (1, 1), ("short", 1), ("late", 2)):
        with opt.averaged(which=which):
            assert torch.equal(p, opt.state[p][KEYS[key]])
            assert not torch.equal(p, x)
        state = opt.averaged_state_dict(net, which=which)
        assert torch.equal(state["first.weight"], opt.state[p][KEYS[key]])
    other = Net()
    opt.copy_to(other, net)
    assert torch.equal(other.first.weight, x)
    with pytest.raises(ValueError, match=r"'x', 'average', 'long', 'short', 'late'"):
        opt.averaged(which="none")
    opt.eval()
    with pytest.raises(RuntimeError, match="in eval mode"):
        opt.averaged(which="short")


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["replaced", "strided", "removed", "none", "written"])
def test_an_average_that_somebody_edits_is_the_one_that_goes_on(edit: str) -> None:
    ends = []
    for together in (True, False):
        policy = rf.ema(0.5, every=2)
        net, opt = trained([rf.ema(0.9), policy] if together else policy)
        key = "average_1" if together else "average"
        held = opt.state[net.first.weight]
        value = torch.linspace(0, 1, 12).reshape(4, 3)
        if edit == "replaced":
            held[key] = value.clone()
        elif edit == "strided":
            held[key] = value.t().contiguous().t()
        elif edit == "removed":
            del held[key]
        elif edit == "none":
            held[key] = None
        else:
            held[key].copy_(value)
        train(net, opt, 7, 10)
        ends.append([net.first.weight, held[key]])
    assert bits(ends[0]) == bits(ends[1])


def test_a_cleared_state_starts_all_averages_again() -> None:
    net, opt = trained(NAMED)
    opt.state.clear()
    train(net, opt, 7, 8)
    assert [opt.n_averaged(which) for which in NAMED] == [2, 2, 2]


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_goes_on_with_every_average(how: str) -> None:
    net, opt = trained(NAMED, buffers=None)
    pair = (net, opt)
    other, copied = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    train(net, opt, 7, 9)
    train(other, copied, 7, 9)
    for which in NAMED:
        assert copied.n_averaged(which) == opt.n_averaged(which)
        assert bits(copied.averages(other, which=which)) == bits(opt.averages(net, which=which))


# ---- checkpoints ---------------------------------------------------------------------------------


def through_bytes(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(average: Any, net: Net, saved: Any) -> tuple[Net, Any, str]:
    """Another optimizer with that checkpoint, and its warning."""
    other = Net()
    other.load_state_dict(net.state_dict())
    opt = rf.FusedSGD(other.parameters(), 0.1, 0.9, average=average)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    return other, opt, "".join(str(w.message) for w in caught)


A, B, C = rf.ema(0.9), rf.ema(0.5), rf.mean(start=2)


@pytest.mark.parametrize(
    ("before", "after", "kept", "notes"),
    [
        ([A, B, C], [A, B, C], {0: 0, 1: 1, 2: 2}, []),
        ([A, B, C], [C, A, B], {0: 2, 1: 0, 2: 1}, []),
        ([A, B], [B], {0: 1}, ["average, .*0.9.* is left out"]),
        ([A, B, C], [A, C], {0: 0, 1: 2}, ["average_1, .* is left out"]),
        (A, [A, B], {0: 0}, ["has no average_1, .* starts at its next sample"]),
        (A, [B, A], {1: 0}, ["has no average, .* starts at its next sample"]),
        ([A, B], [A, rf.ema(0.6)], {0: 0, 1: 1}, ["was .*0.5.*going on with .*0.6"]),
        ([A, B], {"a": A, "b": B}, {0: 0, 1: 1}, []),
        ({"a": A, "b": B}, {"b": B, "a": A}, {0: 1, 1: 0}, []),
        ({"a": A, "b": B}, {"c": A, "b": B}, {0: 0, 1: 1}, []),
        (
            {"a": A, "b": B},
            {"b": rf.ema(0.7)},
            {0: 1},
            ["'a', .* is left out", "was .*0.5.*going on with .*0.7"],
        ),
        ({"a": A}, {"b": B}, {}, ["has no 'b'", "'a', .* is left out"]),
    ],
)
def test_each_average_goes_on_as_itself(
    before: Any, after: Any, kept: dict[int, int], notes: list[str]
) -> None:
    net, opt = trained(before)
    saved = through_bytes(opt.state_dict())
    other, new, said = loaded(after, net, saved)
    assert bool(said) == bool(notes)
    for note in notes:
        assert re.search(note, said), note
    count = len(several.policies_of(new.param_groups[0]["average"]))

    def samples(one: Any, which: int) -> int:
        return int(one.n_averaged if type(one.n_averaged) is int else one.n_averaged(which=which))

    for number in range(count):
        if number in kept:
            old = kept[number]
            assert samples(new, number) == samples(opt, old)
            mine = new.averages(other, which=number)
            assert bits(mine) == bits(opt.averages(net, which=old))
        else:
            assert samples(new, number) == 0
    train(other, new, 7, 7)
    for number in set(range(count)) - kept.keys():  # a copy of the weights, as every first sample
        assert samples(new, number) == 1
        assert bits(new.averages(other, which=number)) == bits(other.parameters())
    if len(kept) == count and not notes:
        train(net, opt, 7, 7)
        for number, old in kept.items():
            mine = new.averages(other, which=number)
            assert bits(mine) == bits(opt.averages(net, which=old))


def test_what_cannot_go_on_is_refused_and_may_be_dropped() -> None:
    _, opt = trained([A, B])
    saved = through_bytes(opt.state_dict())
    plain = rf.FusedSGD(Net().parameters(), 0.1, 0.9)
    with pytest.raises(ValueError, match="the checkpoint's average is"):
        plain.load_state_dict(saved)
    plain.load_state_dict(saved, averages="drop")
    other = Net()
    named = rf.FusedSGD(other.parameters(), 0.1, 0.9, average={"a": A})
    _, saving = trained({"a": C, "b": A})
    with pytest.raises(ValueError, match=r"the checkpoint's average is .*Mean"):
        named.load_state_dict(saving.state_dict())
    del saved["state"][0]["average_1"]
    both = rf.FusedSGD(other.parameters(), 0.1, 0.9, average=[A, B])
    with pytest.raises(ValueError, match="has no average_1"):
        both.load_state_dict(saved)
    saved["param_groups"][0]["n_averaged_1"] = -1
    with pytest.raises(ValueError, match="Invalid n_averaged_1"):
        both.load_state_dict(saved)


def test_torchs_own_loading_takes_all_averages() -> None:
    net, opt = trained(NAMED)
    other, new = trained(NAMED, steps=2)
    other.load_state_dict(net.state_dict())
    torch.optim.Optimizer.load_state_dict(new, through_bytes(opt.state_dict()))
    train(net, opt, 7, 9)
    train(other, new, 7, 9)
    for which in NAMED:
        assert new.n_averaged(which) == opt.n_averaged(which)
        assert bits(new.averages(other, which=which)) == bits(opt.averages(net, which=which))


# ---- beside parameters, and behind other optimizers ----------------------------------------------


def test_buffers_have_every_average_and_keep_them_in_checkpoints() -> None:
    def made(average: Any, steps: int) -> tuple[Net, Any]:
        net = Net()
        opt = rf.FusedSGD(net.parameters(), 0.1, average=average, buffers=net)
        train(net, opt, 1, steps)
        return net, opt

    net, opt = made([A, B], 6)
    for number, policy in enumerate((A, B)):
        own, alone = made(policy, 6)
        found = opt.averages(net, which=number)
        assert "norm.running_mean" in found
        assert bits(found) == bits(alone.averages(own))
    other, new = made([B, A], 2)
    other.load_state_dict(net.state_dict())
    new.load_state_dict(through_bytes(opt.state_dict()))
    train(net, opt, 7, 8)
    train(other, new, 7, 8)
    for number in (0, 1):
        mine = new.averages(other, which=number)
        assert bits(mine) == bits(opt.averages(net, which=1 - number))
    again, copied = copy.deepcopy((net, opt))
    train(net, opt, 9, 9)
    train(again, copied, 9, 9)
    assert bits(copied.averages(again, which=1)) == bits(opt.averages(net, which=1))


@pytest.mark.parametrize("hooked", [True, False])
def test_an_averager_has_the_bits_of_separate_ones(hooked: bool) -> None:
    def made(average: Any, steps: int) -> tuple[Net, Any, rf.Averager]:
        net = Net()
        opt = torch.optim.Adam(net.parameters(), lr=0.05)
        averager = rf.Averager(net, average, buffers=True, optimizer=opt if hooked else None)
        train(net, opt, 1, steps, None if hooked else averager)
        return net, opt, averager

    first = rf.lookahead(2, 0.5)
    policies = {"slow": rf.swa(2, 2), "current": rf.mean(start=2, initial="current"), "now": B}
    net, opt, averager = made(policies, 7)
    for name, policy in policies.items():
        _, _, alone = made(policy, 7)
        assert averager.n_averaged(name) == alone.n_averaged
        assert bits(averager.averages(which=name)) == bits(alone.averages())
    before = bits(net.state_dict())
    with averager.averaged(which="now"):
        assert torch.equal(net.first.weight, averager.averages(which="now")["first.weight"])
    assert bits(net.state_dict()) == before

    other, stepper, new = made(policies, 3)
    other.load_state_dict(net.state_dict())
    stepper.load_state_dict(through_bytes(opt.state_dict()))
    new.load_state_dict(through_bytes(averager.state_dict()))
    train(net, opt, 8, 10, None if hooked else averager)
    train(other, stepper, 8, 10, None if hooked else new)
    for name in policies:
        assert bits(new.averages(which=name)) == bits(averager.averages(which=name))

    net, _, averager = made([first, rf.Average(rf.Ema(0.0))], 4)  # the second is the weights
    assert bits(averager.averages(which=1).values())[:2] == bits(net.first.parameters())
