"""Schedule-free optimizers: three sequences, two modes, and the package's checkpoints."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import backends

CLASSES = [rf.SGDScheduleFree, rf.AdamWScheduleFree]
LR = {rf.SGDScheduleFree: 0.3, rf.AdamWScheduleFree: 0.02}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = (7, 5), (33,), ()
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    drawn.append(drawn[0].t().clone().t())
    return [nn.Parameter(t) for t in drawn]


def gradient(p: Tensor, i: int, k: int) -> Tensor:
    """Of a noisy quadratic."""
    generator = torch.Generator().manual_seed(100 * k + i)
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return ((1 + 0.2 * i) * p.detach().double() + 0.1 * noise).to(p.dtype)


def take(opt: Any, ps: list[nn.Parameter], steps: range) -> None:
    for k in steps:
        for i, p in enumerate(ps):
            p.grad = gradient(p, i, k)
        opt.step()


def trained(cls: Any, steps: int = 5, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    ps = params(dtype)
    opt = cls(ps, **{"lr": LR[cls], "weight_decay": 0.1, **options})
    opt.train()
    take(opt, ps, range(steps))
    return opt, ps


def values(ps: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in ps]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x.detach() - y.detach()).abs().max()) for x, y in zip(a, b, strict=True))


# ---- the sequences -------------------------------------------------------------------------------

SCHEDULES = [
    {},
    {"weight_decay": 0.1, "warmup_steps": 5},
    {"weight_decay": 0.1, "warmup_steps": 5, "r": 0.5},
    {"r": 1.0, "weight_lr_power": 1.0},
    {"weight_lr_power": 0.0, "warmup_steps": 3, "weight_decay": 0.3},
    {"r": -1.5, "weight_lr_power": 3.0},
    {"r": 1.3, "weight_lr_power": 17.0},
]


def of_paper(
    cls: Any, steps: int, beta: float, beta2: float, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """x and y of the paper's algorithms with all three sequences, as they are printed."""
    o = {"weight_decay": 0.0, "warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0, **options}
    x, y, z = (values(params()) for _ in range(3))
    v = [torch.zeros_like(t) for t in x]
    total, largest = 0.0, -1.0
    for k in range(steps):
        warm = min(1.0, (k + 1) / o["warmup_steps"]) if o["warmup_steps"] else 1.0
        eta = o["lr"] * warm
        largest = max(eta, largest)
        weight = (k + 1) ** o["r"] * largest ** o["weight_lr_power"]
        total += weight
        c = weight / total
        for i in range(len(x)):
            g = gradient(y[i], i, k)
            if cls is rf.AdamWScheduleFree:
                v[i] = beta2 * v[i] + (1 - beta2) * g * g
                g = g / ((v[i] / (1 - beta2 ** (k + 1))).sqrt() + 1e-8)
            z[i] = z[i] - eta * (g + o["weight_decay"] * y[i])
            x[i] = (1 - c) * x[i] + c * z[i]
            y[i] = (1 - beta) * z[i] + beta * x[i]
    return x, y


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_weights_are_the_papers_y_and_its_x_is_evaluated(
    cls: Any, schedule: dict[str, Any], backend: str
) -> None:
    own = {"momentum": 0.9} if cls is rf.SGDScheduleFree else {"betas": (0.9, 0.99)}
    options = {"lr": LR[cls], **schedule}
    x, y = of_paper(cls, 60, 0.9, 0.99, **options)
    ps = params()
    opt = cls(ps, backend=backend, **own, **options)
    opt.train()
    take(opt, ps, range(60))
    assert apart(values(ps), y) <= 1e-12
    with opt.averaged():
        assert apart(values(ps), x) <= 1e-12
    opt.eval()
    assert apart(values(ps), x) <= 1e-12


def test_a_learning_rate_of_0_gives_its_z_no_weight() -> None:
    for lr in (0.0, torch.tensor(0.0)):
        opt, ps = trained(rf.SGDScheduleFree, 2, lr=lr)
        assert same(values(ps), values(params()))
        assert opt.param_groups[0]["weight_sum"] == 0.0
        opt.param_groups[0]["lr"] = 0.1
        take(opt, ps, range(2, 3))
        with opt.averaged():
            assert same(values(ps), [opt.state[p]["z"] for p in ps])


def test_a_late_layer_begins_as_any_first_layer_does() -> None:
    """Its z starts at the weights of then, and v is corrected by its own count of steps."""
    ps = params()
    opt = rf.AdamWScheduleFree(ps, lr=0.01)
    opt.train()
    for k in range(1000):
        for i, p in enumerate(ps[1:], 1):
            p.grad = gradient(p, i, k)
        opt.step()
    with torch.no_grad():
        ps[0].mul_(2.0)
    before = values(ps)[0]
    take(opt, ps, range(1000, 1001))
    assert opt.state[ps[0]]["step"] == 1 and opt.state[ps[1]]["step"] == 1001
    moved = (opt.state[ps[0]]["z"] - before).abs() / 0.01
    assert torch.allclose(moved, torch.ones_like(moved), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_z_of_sixteen_bits_is_float32_and_starts_at_the_weights(
    cls: Any, dtype: torch.dtype
) -> None:
    for master_weights in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt, ps = trained(cls, 1, dtype, lr=0.0, master_weights=master_weights)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for p in ps:
            z = opt.state[p]["z"]
            assert z.dtype == wide and torch.equal(z, p.detach().to(wide))


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_in_eval_mode_is_refused_and_changes_nothing(cls: Any) -> None:
    ps = params()
    opt = cls(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"step\(\) in eval mode \(expected train\(\)"):
            opt.step()
        opt.register_step_post_hook(lambda *_: None)  # by torch's wrapper
    assert same(values(ps), values(params())) and not opt.state
    assert opt.param_groups[0]["k"] == 0
    opt.register_step_pre_hook(lambda opt, *_: opt.train())
    opt.step()
    assert opt.param_groups[0]["k"] == 1


def test_a_backward_pass_in_eval_mode_steps_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = rf.SGDScheduleFree([p], in_backward=True)
    with pytest.raises(RuntimeError, match=r"backward\(\) in eval mode"):
        p.sum().backward()
    assert p.tolist() == [1.0] * 3 and opt.param_groups[0]["train_mode"] is False


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_round_trip_through_eval_mode_gives_the_very_bits(
    cls: Any, dtype: torch.dtype, master_weights: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (opt, ps), (still, others) = (
            trained(cls, 4, dtype, master_weights=master_weights) for _ in range(2)
        )
    for k in range(4, 9):
        y = values(ps)
        opt.eval()
        opt.eval()
        assert not same(values(ps), y)
        assert all(opt.state[p]["y"].dtype == dtype for p in ps)
        opt.train()
        opt.train()
        assert same(values(ps), y)
        assert all("y" not in opt.state[p] for p in ps)
        take(opt, ps, range(k, k + 1))
        take(still, others, range(k, k + 1))
    assert same(values(ps), values(others))


def test_a_switch_of_modes_needs_no_new_tables() -> None:
    opt, ps = trained(rf.SGDScheduleFree)
    tables = opt.engine.tables
    opt.eval()
    opt.train()
    take(opt, ps, range(5, 6))
    assert opt.engine.tables is tables


def test_all_groups_have_one_mode_and_a_new_one_gets_it() -> None:
    ps = params()
    opt = rf.SGDScheduleFree([{"params": [p]} for p in ps[:2]])
    assert [group["train_mode"] for group in opt.param_groups] == [False, False]
    opt.train()
    opt.add_param_group({"params": [ps[2]]})
    assert [group["train_mode"] for group in opt.param_groups] == [True] * 3
    opt.eval()
    assert [group["train_mode"] for group in opt.param_groups] == [False] * 3
    opt.add_param_group({"params": [ps[3]], "train_mode": True})
    assert [group["train_mode"] for group in opt.param_groups] == [False] * 4


def test_a_mode_that_somebody_writes_to_a_group_is_none_of_a_copys() -> None:
    opt, _ = trained(rf.SGDScheduleFree)
    opt.eval()
    opt.param_groups[0]["train_mode"] = True
    for again in (deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert again.param_groups[0]["train_mode"] is False


@pytest.mark.parametrize("cls", CLASSES)
def test_masters_say_what_x_is_and_what_y_was(cls: Any) -> None:
    opt, ps = trained(cls, 4, torch.bfloat16, master_weights=True)
    y, z = values(ps), [opt.state[p]["z"].clone() for p in ps]
    masters = [opt.state[p]["master_param"].clone() for p in ps]

    def derived(weights: list[Tensor]) -> list[Tensor]:
        pairs = zip(weights, z, strict=True)
        return [(w + (1 - 1 / 0.9) * (own - w)).bfloat16() for w, own in pairs]

    x, of_weights = derived(masters), derived([w.float() for w in y])
    opt.eval()
    assert same(values(ps), x) and not same(x, of_weights)
    for p in ps:
        del opt.state[p]["y"]  # as older checkpoints have none
    opt.train()
    assert same(values(ps), y)
    assert same([opt.state[p]["master_param"] for p in ps], masters)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_written_in_eval_mode_is_the_x_that_training_goes_on_from(cls: Any) -> None:
    opt, ps = trained(cls)
    y = values(ps)
    opt.eval()
    x = [p.detach().clone() for p in ps]
    with torch.no_grad():
        ps[1][:5].add_(1.0)
    opt.train()
    assert same(values(ps)[2:], y[2:]) and torch.equal(ps[1][5:], y[1][5:])
    opt.eval()
    x[1][:5] += 1.0
    assert apart(values(ps), x) <= 1e-14


def test_a_model_that_is_converted_in_eval_mode_trains_on() -> None:
    opt, ps = trained(rf.AdamWScheduleFree, 5, torch.float32)
    y = values(ps)
    opt.eval()
    for p in ps:
        p.data = p.data.double()
    opt.train()
    assert apart(values(ps), y) <= 1e-6 and all(p.dtype == torch.float64 for p in ps)
    take(opt, ps, range(5, 6))
    assert all(opt.state[p]["z"].dtype == torch.float64 for p in ps)


# ---- averaged() ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_averaged_shows_x_and_gives_y_back_whatever_happens(cls: Any) -> None:
    opt, ps = trained(cls)
    y = values(ps)
    opt.eval()
    x = values(ps)
    with opt.averaged():  # which x is already
        assert same(values(ps), x)
    opt.train()

    def inside() -> None:
        assert same(values(ps), x)
        for refused in (opt.step, opt.train, opt.eval):
            with pytest.raises(RuntimeError, match=r"inside averaged\(\)"):
                refused()
        with torch.no_grad():
            ps[0].zero_()
        raise KeyError

    with opt.averaged(), pytest.raises(KeyError), opt.averaged():
        inside()
    assert same(values(ps), y)
    with pytest.raises(KeyError), opt.averaged():
        inside()
    assert same(values(ps), y)
    with opt.averaged(blend=0.25):
        expected = [b + 0.25 * (a - b) for a, b in zip(x, y, strict=True)]
        assert apart(values(ps), expected) <= 1e-15
    assert same(values(ps), y)


def test_weights_without_a_step_are_live_inside_averaged() -> None:
    ps = params()
    opt = rf.SGDScheduleFree(ps)
    opt.train()
    with opt.averaged():
        assert same(values(ps), values(params()))
    opt.eval()
    opt.train()
    assert same(values(ps), values(params()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)).relu())
        return out


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return iter([torch.randn(16, 4, generator=generator) for _ in range(6)])


def fitted(cls: Any, **options: Any) -> tuple[Net, Any]:
    net = Net()
    opt = cls(net.parameters(), lr=LR[cls], **options)
    opt.train()
    for x in batches():
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    return net, opt


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_of_x_is_the_same_in_either_mode_and_inside_averaged(cls: Any) -> None:
    net, opt = fitted(cls)
    dicts = [opt.averaged_state_dict(net)]
    with opt.averaged():
        dicts += [net.state_dict(), opt.averaged_state_dict(net)]
        dicts = deepcopy(dicts)
    opt.eval()
    dicts += [opt.averaged_state_dict(net), deepcopy(net.state_dict())]
    for other in dicts[1:]:
        assert other.keys() == dicts[0].keys()
        assert same([*other.values()], [*dicts[0].values()])
    copy = Net()
    opt.copy_to(copy, net)
    assert same([*copy.state_dict().values()], [*dicts[0].values()])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batchnorm_is_estimated_anew_for_x(mode: str) -> None:
    net, opt = fitted(rf.AdamWScheduleFree)
    statistics = net.norm.running_mean.clone()
    expected = Net()
    expected.load_state_dict(opt.averaged_state_dict(net))
    torch.optim.swa_utils.update_bn(batches(), expected)
    getattr(opt, mode)()
    before = deepcopy(net.state_dict())
    with rf.averaged_model(opt, net, batches()):
        assert same([*net.state_dict().values()], [*expected.state_dict().values()])
    assert same([*net.state_dict().values()], [*before.values()])
    assert torch.equal(net.norm.running_mean, statistics)


def test_an_average_beside_x_is_of_y_and_has_a_name_of_its_own() -> None:
    net, opt = fitted(rf.SGDScheduleFree, average=rf.mean())
    p = net.last.bias
    y = p.detach().clone()
    assert opt.n_averaged == 6
    average = opt.averages(net)["last.bias"]
    assert torch.equal(opt.averaged_state_dict(net, which="average")["last.bias"], average)
    with opt.averaged(which="average"):
        assert torch.equal(p, average)
    with opt.averaged():
        assert not torch.equal(p, average) and not torch.equal(p, y)
    assert torch.equal(p, y)
    opt.eval()
    for asked in ({"which": "average"}, {"blend": 0.5}):
        with pytest.raises(RuntimeError, match=r"in eval mode \(expected train\(\)"):
            opt.averaged(**asked)
    with pytest.raises(ValueError, match=r"Invalid which: 'y' \(expected one of"):
        opt.averaged(which="y")
    with pytest.raises(RuntimeError, match=r"expected eval\(\), which makes x the weights"):
        opt.adopt()


# ---- what a group counts -------------------------------------------------------------------------


def counts(opt: Any, group: int = 0) -> list[Any]:
    keys = ("k", "weight_sum", "lr_max", "scheduled_lr")
    return [opt.param_groups[group][key] for key in keys]


def test_a_group_counts_the_steps_that_it_takes() -> None:
    ps = params()
    opt = rf.SGDScheduleFree(
        [{"params": ps[:2]}, {"params": ps[2:], "warmup_steps": 4}], lr=0.5, weight_lr_power=1
    )
    assert counts(opt) == [0, 0.0, -1.0, 0.0]
    opt.train()
    opt.step()  # without any gradient
    assert counts(opt) == [0, 0.0, -1.0, 0.0] and opt.state_dict()["param_groups"][0]["step"] == 0
    for k in range(3):
        ps[0].grad = gradient(ps[0], 0, k)
        ps[3].grad = gradient(ps[3], 3, k) if k != 1 else None
        opt.step()
    assert counts(opt) == [3, 1.5, 0.5, 0.5]
    assert counts(opt, 1) == [2, 0.125 + 0.25, 0.25, 0.25]


def held(opt: Any) -> str:
    saved = opt.state_dict()
    return str([{i: s for i, s in saved["state"].items() if s}, saved["param_groups"]])


def test_weights_go_by_the_largest_learning_rate_so_far() -> None:
    opt, ps = trained(rf.SGDScheduleFree, 0, lr=0.5, weight_lr_power=1)
    for k, lr in enumerate((0.5, 0.25, 0.75, torch.tensor(0.25))):
        opt.param_groups[0]["lr"] = lr
        take(opt, ps, range(k, k + 1))
    assert counts(opt) == [4, 0.5 + 0.5 + 0.75 + 0.75, 0.75, 0.25]


def test_skipped_and_failed_steps_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    (opt, ps), (still, others) = (trained(rf.AdamWScheduleFree, 0) for _ in range(2))

    def fail(*_: Any) -> None:
        raise MemoryError

    for k in range(3):
        before = values(ps), counts(opt), held(opt)
        for p in ps:
            p.grad = torch.full_like(p, torch.inf)
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
        opt.step()
        del opt.grad_scale, opt.found_inf
        with monkeypatch.context() as patch:
            failing = backends.CPU._replace(call=lambda *_: (fail,))
            patch.setattr(
                opt.engine.tables, "launches", [(t, failing) for t, _ in opt.engine.tables.launches]
            )
            with pytest.raises(MemoryError):
                opt.step()
        assert same(values(ps), before[0]) and counts(opt) == before[1]
        assert held(opt) == before[2]
        if k == 0:  # z starts at the weights of the step that is taken
            with torch.no_grad():
                ps[0].add_(1.0)
                others[0].add_(1.0)
        take(opt, ps, range(k, k + 1))
        take(still, others, range(k, k + 1))
    assert same(values(ps), values(others)) and counts(opt) == counts(still)


@pytest.mark.parametrize("cls", CLASSES)
def test_stepping_in_the_backward_pass_counts_and_moves_alike(cls: Any) -> None:
    ends = []
    for in_backward in (False, True):
        net = Net()
        groups = [{"params": net.first.parameters()}, {"params": net.last.parameters()}]
        opt = cls(groups, lr=LR[cls], warmup_steps=3, in_backward=in_backward)
        opt.train()
        for k, x in enumerate(batches()):
            net.zero_grad()
            if k == 2:
                net.last.requires_grad_(False)
            net(x).square().mean().backward()
            opt.step()
            net.last.requires_grad_(True)
        opt.eval()
        ends.append((values([*net.parameters()]), counts(opt), counts(opt, 1)))
    assert same(ends[0][0], ends[1][0]) and ends[0][1:] == ends[1][1:]
    assert (ends[0][1][0], ends[0][2][0]) == (6, 5)


# ---- checkpoints ---------------------------------------------------------------------------------


def by_load(opt: Any, ps: list[nn.Parameter], cls: Any) -> Any:
    others = [nn.Parameter(p.detach().clone()) for p in ps]
    again = cls(others, lr=LR[cls], weight_decay=0.1)
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    again.load_state_dict(torch.load(saved))
    return again, others


def by_torchs_load(opt: Any, ps: list[nn.Parameter], cls: Any) -> Any:
    others = [nn.Parameter(p.detach().clone()) for p in ps]
    again = cls(others, lr=LR[cls], weight_decay=0.1)
    torch.optim.Optimizer.load_state_dict(again, deepcopy(opt.state_dict()))
    return again, others


def by_pickle(opt: Any, ps: list[nn.Parameter], cls: Any) -> Any:
    return pickle.loads(pickle.dumps((opt, ps)))


def by_deepcopy(opt: Any, ps: list[nn.Parameter], cls: Any) -> Any:
    return deepcopy((opt, ps))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("way", [by_load, by_torchs_load, by_pickle, by_deepcopy])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_run_goes_on_bit_for_bit_in_the_mode_that_it_had(
    cls: Any, way: Callable[..., Any], mode: str
) -> None:
    opt, ps = trained(cls)
    getattr(opt, mode)()
    again, others = way(opt, ps, cls)
    assert [g["train_mode"] for g in again.param_groups] == [mode == "train"]
    assert same(values(ps), values(others))
    if mode == "eval":
        with pytest.raises(RuntimeError, match="in eval mode"):
            take(again, others, range(5, 6))
    for one, own in ((opt, ps), (again, others)):
        one.train()
        take(one, own, range(5, 9))
        one.eval()
    assert same(values(ps), values(others)) and counts(opt) == counts(again)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_frozen_layer_that_is_averaged_has_no_z_in_a_checkpoint(cls: Any) -> None:
    opt, ps = trained(cls, 0, average=rf.ema(0.5))
    for k in range(2):
        for i, p in enumerate(ps[1:], 1):
            p.grad = gradient(p, i, k)
        opt.step()
    assert opt.state_dict()["state"][0].keys() == {"average"}
    others = [nn.Parameter(p.detach().clone()) for p in ps]
    again = cls(others, lr=LR[cls], weight_decay=0.1, average=rf.ema(0.5))
    again.load_state_dict(opt.state_dict())
    for one, own in ((opt, ps), (again, others)):
        take(one, own, range(2, 4))
    assert same(values(ps), values(others))


def test_beta_may_not_change_once_there_is_a_z() -> None:
    for cls, key, other in (
        (rf.SGDScheduleFree, "momentum", 0.5),
        (rf.AdamWScheduleFree, "betas", (0.5, 0.999)),
    ):
        opt, ps = trained(cls, 0)
        opt.param_groups[0][key] = other
        opt.param_groups[0][key] = opt.defaults[key]
        take(opt, ps, range(3))
        for again, own in ((opt, ps), by_load(opt, ps, cls), by_deepcopy(opt, ps, cls)):
            before = values(own)
            again.param_groups[0][key] = other
            for refused in (lambda o=again, q=own: take(o, q, range(3, 4)), again.eval):
                with pytest.raises(ValueError, match=r"0\.5 \(this group has stepped with 0\.9"):
                    refused()
            assert same(values(own), before) and counts(again)[0] == 3
            again.param_groups[0][key] = opt.defaults[key]
            take(again, own, range(3, 4))
    opt.param_groups[0]["betas"] = (0.9, 0.9)  # the decay of v may
    take(opt, ps, range(4, 5))


# ---- the package ---------------------------------------------------------------------------------


def packages(cls: Any) -> Any:
    package = pytest.importorskip("schedulefree")
    return getattr(package, cls.__name__)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_replacing_the_package_changes_nothing(cls: Any, schedule: dict[str, Any]) -> None:
    theirs_cls, ours, theirs = packages(cls), params(), params()
    options = {"lr": LR[cls], **schedule}
    opt, other = cls(ours, **options), theirs_cls(theirs, **options)
    for k in range(12):
        opt.train(), other.train()
        take(opt, ours, range(2 * k, 2 * k + 2))
        take(other, theirs, range(2 * k, 2 * k + 2))
        assert apart(ours, theirs) <= 1e-13
        opt.eval(), other.eval()
        assert apart(ours, theirs) <= 1e-13
    assert counts(opt) == pytest.approx(counts(other))
    added = {"average", "implicit_momentum", "maximize", "n_averaged", "rule", "step"}
    assert opt.param_groups[0].keys() - added == other.param_groups[0].keys() - {"foreach"}
    assert {k: v for k, v in opt.defaults.items() if k not in added} == {
        k: v for k, v in other.defaults.items() if k != "foreach"
    }


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cls", CLASSES)
def test_checkpoints_go_to_the_package_and_back(cls: Any, mode: str) -> None:
    theirs_cls = packages(cls)
    opt, ps = trained(cls)
    getattr(opt, mode)()
    theirs = [nn.Parameter(p.detach().clone()) for p in ps]
    there = theirs_cls(theirs, lr=LR[cls], weight_decay=0.1)
    there.load_state_dict(deepcopy(opt.state_dict()))
    opt.train(), there.train()
    take(opt, ps, range(5, 9))
    take(there, theirs, range(5, 9))
    assert apart(ps, theirs) <= 1e-13
    getattr(opt, mode)(), getattr(there, mode)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back, own = by_load(there, theirs, cls)
    assert [g["train_mode"] for g in back.param_groups] == [mode == "train"]
    back.train(), opt.train()
    take(back, own, range(9, 12))
    take(opt, ps, range(9, 12))
    assert apart(ps, own) <= 1e-13 and counts(back) == pytest.approx(counts(opt))
    if cls is rf.AdamWScheduleFree:  # which the package does not count
        assert [int(back.state[p]["step"]) for p in own] == [12] * len(own)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_run_of_the_packages_is_taken_over(cls: Any, mode: str) -> None:
    """A group that was added to it while it trained says that it evaluates."""
    theirs = params()
    groups: list[dict[str, Any]] = [{"params": theirs[:2]}, {"params": theirs[2:]}]
    there = packages(cls)(groups, lr=LR[cls], weight_decay=0.1)
    there.train()
    take(there, theirs, range(5))
    getattr(there, mode)()
    there.param_groups[1]["train_mode"] = False
    own = [nn.Parameter(p.detach().clone()) for p in theirs]
    opt = cls([{"params": own[:2]}, {"params": own[2:]}], lr=LR[cls], weight_decay=0.1)
    opt.load_state_dict(there.state_dict())
    assert [g["train_mode"] for g in opt.param_groups] == [mode == "train"] * 2
    there.param_groups[1]["train_mode"] = mode == "train"
    for one, ps in ((opt, own), (there, theirs)):
        one.train()
        take(one, ps, range(5, 9))
    assert apart(own, theirs) <= 1e-13
    assert counts(opt) == pytest.approx(counts(there))


def test_y_of_a_checkpoint_that_trains_is_nobodys() -> None:
    """The package carries the state that it does not know."""
    opt, ps = trained(rf.SGDScheduleFree)
    opt.eval()
    saved = deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        group["train_mode"] = True
    opt.load_state_dict(saved)
    assert all(opt.state[p].keys() == {"z"} for p in ps)


def test_the_package_leaves_the_averages_of_y_behind() -> None:
    theirs_cls = packages(rf.SGDScheduleFree)
    opt, ps = trained(rf.SGDScheduleFree, average=rf.mean())
    there = theirs_cls(ps, lr=0.3, weight_decay=0.1)
    there.load_state_dict(deepcopy(opt.state_dict()))
    again, own = (rf.SGDScheduleFree(ps, lr=0.3, average=rf.mean()), ps)
    again.load_state_dict(there.state_dict())
    assert again.n_averaged == 5  # it has not gone on
    take(there, ps, range(5, 6))
    with pytest.warns(UserWarning, match=r"schedulefree\.SGDScheduleFree went on"):
        again.load_state_dict(there.state_dict())
    assert again.n_averaged == 0 and not any("average" in again.state[p] for p in own)


def test_what_the_package_keeps_as_tensors_is_read() -> None:
    theirs_cls = packages(rf.SGDScheduleFree)
    ps = params()
    there = theirs_cls(ps, lr=torch.tensor(0.3), warmup_steps=3)
    there.train()
    take(there, ps, range(4))
    assert isinstance(there.param_groups[0]["weight_sum"], Tensor)
    again = rf.SGDScheduleFree(ps, lr=0.3)
    again.load_state_dict(there.state_dict())
    assert counts(again) == pytest.approx([float(c) for c in counts(there)])
    assert all(type(c) in (int, float) for c in counts(again))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (rf.SGDScheduleFree, {"lr": -0.1}, "Invalid learning rate: -0.1"),
        (rf.SGDScheduleFree, {"momentum": 0.0}, "Momentum must be between 0 and 1 exclusive: 0.0"),
        (rf.SGDScheduleFree, {"momentum": 1.0}, "Momentum must be between 0 and 1 exclusive: 1.0"),
        (rf.SGDScheduleFree, {"momentum": float("nan")}, "Momentum must be between 0 and 1"),
        (rf.SGDScheduleFree, {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        (rf.SGDScheduleFree, {"warmup_steps": -1}, r"Invalid warmup_steps: -1 \(expected at least"),
        (rf.SGDScheduleFree, {"weight_lr_power": -1}, "Invalid weight_lr_power: -1"),
        (rf.SGDScheduleFree, {"r": float("nan")}, "Invalid r: nan"),
        (rf.SGDScheduleFree, {"average": rf.lookahead(2)}, r"lookahead\(2\) writes back"),
        (rf.SGDScheduleFree, {"average": rf.rbwa(2)}, r"writes back to the weights"),
        (rf.AdamWScheduleFree, {"betas": (0.0, 0.9)}, r"betas\[0\] must be between 0 and 1"),
        (rf.AdamWScheduleFree, {"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        (rf.AdamWScheduleFree, {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(
    cls: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        cls(params(), **options)
    opt, ps = trained(cls, 2)
    before = values(ps), counts(opt), len(opt.param_groups)
    with pytest.raises(ValueError, match=said):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    if "average" not in options:
        opt.param_groups[0].update(options)
        with pytest.raises(ValueError, match=said):
            take(opt, ps, range(2, 3))
    assert same(values(ps), before[0]) and len(opt.param_groups) == before[2]
    assert counts(opt) == before[1]


@pytest.mark.parametrize("bad", [{"k": -1}, {"k": 1.5}, {"weight_sum": -1.0}, {"lr_max": "much"}])
def test_a_checkpoint_with_counts_that_are_none_changes_nothing(bad: dict[str, Any]) -> None:
    opt, ps = trained(rf.SGDScheduleFree)
    saved = deepcopy(opt.state_dict())
    saved["param_groups"][0].update(bad)
    before = values(ps), str(opt.state_dict())
    with pytest.raises((ValueError, TypeError), match=f"Invalid {next(iter(bad))}: "):
        opt.load_state_dict(saved)
    assert same(values(ps), before[0]) and str(opt.state_dict()) == before[1]


def test_a_y_of_another_shape_is_refused() -> None:
    opt, _ = trained(rf.SGDScheduleFree)
    opt.eval()
    saved = deepcopy(opt.state_dict())
    saved["state"][0]["y"] = torch.zeros(3)
    with pytest.raises(ValueError, match="the checkpoint's y of parameter 0 of group 0 has shape"):
        opt.load_state_dict(saved)


def test_checkpoints_of_other_algorithms_are_refused_both_ways() -> None:
    makers: list[Any] = [
        rf.SGDScheduleFree,
        rf.AdamWScheduleFree,
        rf.FusedSGD,
        rf.FusedAdamW,
        torch.optim.SGD,
        torch.optim.AdamW,
    ]
    try:
        import schedulefree

        makers += [
            schedulefree.SGDScheduleFree,
            schedulefree.AdamWScheduleFree,
            schedulefree.RAdamScheduleFree,
        ]
    except ImportError:
        pass
    taken = {
        (source.__name__.removeprefix("Fused"), into.__name__.removeprefix("Fused"))
        for source in makers
        for into in makers
        if into.__module__.startswith("rbwa_fused")
        and goes(source(params()).state_dict(), into(params()))
    }
    names = ["SGDScheduleFree", "AdamWScheduleFree", "SGD", "AdamW"]
    assert taken == {(name, name) for name in names}


def goes(saved: dict[str, Any], opt: Any) -> bool:
    before = str(opt.state_dict())
    try:
        opt.load_state_dict(saved)
    except ValueError as error:
        said = str(error)
    else:
        return True
    assert "rule is" in said or "another optimizer's" in said
    assert str(opt.state_dict()) == before
    return False


def test_who_moves_y_from_outside_is_refused_while_the_optimizer_lives() -> None:
    opt, ps = trained(rf.SGDScheduleFree)
    others = params()
    said = "weights of SGDScheduleFree among its tensors"
    with pytest.raises(ValueError, match=f"replica 0: {said}"):
        rf.pull_([ps, others], 0.5)
    with pytest.raises(ValueError, match=f"replica 1: {said}"):
        rf.Elastic([others, ps], alpha=0.5)
    del opt
    rf.pull_([ps, others], 1.0)
    assert same(values(ps), values(others))


def test_an_averager_behind_it_may_not_move_y() -> None:
    net = Net()
    opt = rf.SGDScheduleFree(net.parameters())
    with pytest.raises(
        ValueError, match=r"lookahead\(2\) writes back to weights of SGDScheduleFree"
    ):
        rf.Averager(net, rf.lookahead(2), optimizer=opt)
    averager = rf.Averager(net, rf.mean(), optimizer=opt)
    opt.train()
    for x in batches():
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    assert averager.n_averaged == 6


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("followed", [True, False])
def test_inside_an_averagers_context_modes_stay_and_x_is_that_of_the_training_weights(
    mode: str, followed: bool
) -> None:
    net, opt = fitted(rf.AdamWScheduleFree)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt if followed else None)
    for x in batches():
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
        if not followed:
            averager.update()
    getattr(opt, mode)()
    weights, x = deepcopy(net.state_dict()), opt.averaged_state_dict(net)
    other = "eval" if mode == "train" else "train"
    with averager.averaged():
        inside = values([*net.parameters()])
        with pytest.raises(RuntimeError, match=rf"{other}\(\) inside averaged\(\)"):
            getattr(opt, other)()
        getattr(opt, mode)()  # which it has
        assert same(values([*net.parameters()]), inside)
        assert same([*opt.averaged_state_dict(net).values()], [*x.values()])
    assert same([*net.state_dict().values()], [*weights.values()])
    opt.eval()
    assert same([*net.state_dict().values()], [*x.values()])
    opt.train()
    if mode == "train":
        assert same([*net.state_dict().values()], [*weights.values()])


def test_a_captured_step_would_repeat_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, ps = trained(rf.AdamWScheduleFree, 2)
    before = values(ps)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match="schedule-free optimizer while a CUDA graph is captured"
    ):
        take(opt, ps, range(2, 3))
    assert same(values(ps), before) and counts(opt)[0] == 2


def test_a_clipped_norm_is_that_of_the_gradients() -> None:
    ends = []
    for fused in (True, False):
        opt, ps = trained(rf.AdamWScheduleFree, 2)
        for k in range(2, 5):
            for i, p in enumerate(ps):
                p.grad = gradient(p, i, k)
            if fused:
                opt.clip_grad_norm_(0.5)
            else:
                torch.nn.utils.clip_grad_norm_(ps, 0.5)
            opt.step()
        ends.append(values(ps))
    assert apart(*ends) <= 1e-12


def test_sixteen_bits_without_masters_are_warned_of_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        groups = [{"params": [p]} for p in params(dtype)]
        with pytest.warns(UserWarning, match="expected master_weights=True") as caught:
            opt = rf.AdamWScheduleFree(groups)
        assert len(caught) == 1 and caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=dtype))]})
            rf.AdamWScheduleFree(params(dtype), master_weights=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_model_that_is_converted_before_eval_trains_on_from_a_checkpoint(
    cls: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ours, again = nn.Linear(40, 9, dtype=dtype), nn.Linear(40, 9).double()
    opt, other = (cls(net.parameters(), lr=0.2, master_weights=True) for net in (ours, again))
    opt.train()
    for _ in range(5):
        ours(torch.randn(4, 40, dtype=dtype)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    y = [p.detach().clone() for p in ours.double().parameters()]
    opt.eval()
    again.load_state_dict(ours.state_dict())
    other.load_state_dict(opt.state_dict())
    other.train()
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), y, strict=True))
