"""Checkpoints that others wrote: another class's is refused, torch.optim.SGD's says no step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules import ALGORITHMS, OF_TORCH
from runs import Model, bits, snapshot, train
from torch import nn

import rbwa_fused as rf
from rbwa_fused import distributed as rfd

OTHERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and cls not in (torch.optim.Optimizer, *(rule.torchs for rule in OF_TORCH.values()))
}
# schedulefree.SGDScheduleFree's groups and state; the nearest to SGD of what is not SGD.
SCHEDULE_FREE = {
    "lr": 1.0,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "weight_lr_power": 2.0,
}


class Unknown(torch.optim.Optimizer):
    """Somebody's own, whose groups have a learning rate and nothing else."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 7.0})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]


def matrices() -> list[nn.Parameter]:
    """Muon takes nothing else."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 5))]


def stepped(opt: Any, steps: int, parameters: list[nn.Parameter]) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad.to_sparse() if type(opt).__name__ == "SparseAdam" else grad
        opt.step(lambda: torch.zeros(())) if type(opt).__name__ == "LBFGS" else opt.step()
    return opt


def of_others(name: str, steps: int) -> dict[str, Any]:
    if name == "schedule-free":
        state = {i: {"z": torch.zeros_like(p)} for i, p in enumerate(matrices()) if steps}
        return {"state": state, "param_groups": [{**SCHEDULE_FREE, "params": [0, 1]}]}
    parameters = matrices()
    cls: Any = OTHERS.get(name, Unknown)
    return stepped(cls(parameters), steps, parameters).state_dict()


def by_the_class(opt: Any, saved: Any) -> None:
    torch.optim.Optimizer.load_state_dict(opt, saved)


def by_the_method(opt: Any, saved: Any) -> None:
    opt.load_state_dict(saved)


DOORS = [by_the_method, by_the_class]


@pytest.mark.parametrize("load", DOORS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", ALGORITHMS)
@pytest.mark.parametrize("name", [*OTHERS, "schedule-free", "Unknown"])
def test_another_optimizers_checkpoint_changes_no_hyperparameter_and_no_state(
    name: str, rule: str, steps: int, load: Any
) -> None:
    saved = of_others(name, steps)
    parameters = matrices()
    opt = stepped(ALGORITHMS[rule].made(parameters, average=rf.ema(0.5)), 3, parameters)
    before = snapshot(opt)
    lacks = "amsgrad" if ALGORITHMS[rule].torchs is torch.optim.Adam else "dampening"
    lacks = lacks if ALGORITHMS[rule].counts is None else "weight_sum"
    with pytest.raises(
        ValueError, match=rf"another optimizer's, with .*lr.* and without .*{lacks}"
    ):
        load(opt, saved)
    assert snapshot(opt) == before


def test_another_optimizers_groups_with_a_key_of_ours_are_refused_too() -> None:
    parameters = matrices()
    opt = rf.FusedSGD(parameters, lr=0.1)
    adam = torch.optim.Adam(parameters)
    adam.param_groups[0]["rule"] = "mine"
    for load in DOORS:
        with pytest.raises(ValueError, match="another optimizer's"):
            load(opt, adam.state_dict())
    opt.param_groups = adam.param_groups
    with pytest.raises(ValueError, match="another optimizer's"):
        stepped(opt, 1, parameters)


@pytest.mark.parametrize("load", DOORS)
@pytest.mark.parametrize("key", ["rule", "step", "n_averaged", "implicit_momentum"])
@pytest.mark.parametrize("value", [3, "mine"])
def test_a_users_keys_in_torchs_checkpoint_are_the_users(key: str, value: Any, load: Any) -> None:
    parameters = matrices()
    sgd = stepped(torch.optim.SGD(parameters, lr=0.5, momentum=0.9), 2, parameters)
    sgd.param_groups[0][key] = value
    opt = rf.FusedSGD(parameters, lr=0.1, average=rf.ema(0.5))
    load(opt, sgd.state_dict())
    assert opt.param_groups[0][key] == value and opt.n_averaged == 0
    saved = stepped(opt, 1, parameters).state_dict()
    assert (saved["param_groups"][0]["step"], saved["param_groups"][0]["rule"]) == (1, "sgd")
    opt.load_state_dict(saved)
    assert opt.param_groups[0][key] == value and opt.n_averaged == 1


def test_a_second_groups_class_is_looked_at_too() -> None:
    parameters = matrices()
    opt = rf.FusedSGD([{"params": [p]} for p in parameters], lr=0.1)
    saved = opt.state_dict()
    adam = torch.optim.Adam([parameters[1]]).state_dict()["param_groups"][0]
    saved["param_groups"][1] = {**adam, "params": [1]}
    with pytest.raises(ValueError, match=r"param group 1 .* another optimizer's, with lr, betas"):
        opt.load_state_dict(saved)


class Mine(torch.optim.SGD):
    """A subclass with a hyperparameter of its own, named as one of other optimizers."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["alpha"] = 0.5


OF_SGD: dict[str, Callable[[Any], Any]] = {
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.5),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9),
    "foreach": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9, foreach=True),
    "fused": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9, fused=True),
    "a subclass": lambda ps: Mine(ps, lr=0.5, momentum=0.9),
}


@pytest.mark.parametrize(
    "older", [(), ("nesterov", "maximize", "foreach", "differentiable", "fused")]
)
@pytest.mark.parametrize("name", OF_SGD)
def test_torchs_sgd_loads_with_whatever_its_groups_have_beside(
    name: str, older: tuple[str, ...]
) -> None:
    parameters = matrices()
    sgd = OF_SGD[name](parameters)
    torch.optim.lr_scheduler.StepLR(sgd, 1)  # initial_lr
    sgd.param_groups[0]["swa_lr"] = 0.05
    saved = stepped(sgd, 2, parameters).state_dict()
    for key in older:
        del saved["param_groups"][0][key]
    fresh = matrices()
    opt = rf.FusedSGD(fresh, lr=0.1, momentum=0.2)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["swa_lr"]) == (0.5, 0.5, 0.05)
    assert group["momentum"] == sgd.param_groups[0]["momentum"]
    assert group.get("alpha") == sgd.param_groups[0].get("alpha")
    for p, q in zip(fresh, parameters, strict=True):
        expected = sgd.state[q].get("momentum_buffer")
        assert bits(opt.state[p].get("momentum_buffer")) == bits(expected)


# ---- where the run stands ----------------------------------------------------------------------


def taken_over(
    average: rf.Average | None,
    load: Any = rf.FusedSGD.load_state_dict,
    before: int = 0,
    **options: Any,
) -> tuple[Any, list[str]]:
    """An optimizer that goes on with six steps of torch's, and its warnings."""
    parameters = matrices()
    saved = stepped(torch.optim.SGD(parameters, 0.1, 0.9), 6, parameters).state_dict()
    opt = stepped(rf.FusedSGD(parameters, lr=0.1, average=average), before, parameters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load(opt, saved, **options)
    assert all(w.filename == __file__ for w in seen)
    return opt, [str(w.message) for w in seen]


def weight(n: int, step: int) -> float:
    return 0.5


BY_STEP = {
    "start": rf.mean(start=8),
    "every": rf.ema(0.5, every=3),
    "written back": rf.switch_ema(0.5, steps_per_epoch=4),
    "lookahead": rf.lookahead(5),
    "algorithm 2": rf.rbwa(4, 0, "algorithm2"),
    "a function": rf.Average(weight),
}


@pytest.mark.parametrize("name", BY_STEP)
def test_a_policy_that_goes_by_steps_asks_where_torchs_run_stands(name: str) -> None:
    opt, seen = taken_over(BY_STEP[name])
    assert len(seen) == 1 and "step=..." in seen[0] and "from 0 on" in seen[0]
    assert opt.state_dict()["param_groups"][0]["step"] == 0
    opt, seen = taken_over(BY_STEP[name], step=6)
    assert seen == [] and opt.state_dict()["param_groups"][0]["step"] == 6


@pytest.mark.parametrize("before", [0, 10])
@pytest.mark.parametrize("name", BY_STEP)
def test_torchs_run_taken_over_by_the_class_is_counted_as_by_the_method(
    name: str, before: int
) -> None:
    opt, seen = taken_over(BY_STEP[name], by_the_class, before)
    assert len(seen) == 1 and "from 0 on" in seen[0]
    assert opt.n_averaged == opt.state_dict()["param_groups"][0]["step"] == 0


@pytest.mark.parametrize("average", [None, rf.ema(0.9), rf.mean(), rf.rbwa(4, 0)], ids=str)
def test_a_policy_that_does_not_go_by_steps_asks_nothing(average: rf.Average | None) -> None:
    assert taken_over(average)[1] == taken_over(average, by_the_class, 3)[1] == []


def test_averaging_starts_where_it_would_have_in_one_run() -> None:
    opt, _ = taken_over(rf.mean(start=8, every=2), step=6)
    counts = []
    for _ in range(6):
        stepped(opt, 1, opt.param_groups[0]["params"])
        counts.append(opt.n_averaged)
    assert counts == [0, 0, 0, 1, 1, 2]  # after steps 7 to 12


def test_one_warning_serves_all_groups() -> None:
    parameters = matrices()
    groups = [{"params": [p]} for p in parameters]
    saved = torch.optim.SGD(groups, 0.1).state_dict()
    opt = rf.FusedSGD(groups, lr=0.1, average=rf.mean(start=8))
    with pytest.warns(UserWarning, match="goes by them") as seen:
        opt.load_state_dict(saved)
    assert len(seen) == 1


def test_a_step_beside_our_own_checkpoints_must_be_theirs() -> None:
    parameters = matrices()
    opt = rf.FusedSGD(parameters, lr=0.1, average=rf.mean(start=2))
    saved = stepped(opt, 3, parameters).state_dict()
    stepped(opt, 1, parameters)
    before = snapshot(opt)
    for other in (0, 4):
        with pytest.raises(ValueError, match=rf"Invalid step: {other} \(.* has counted 3\)"):
            opt.load_state_dict(saved, step=other)
    assert snapshot(opt) == before
    opt.load_state_dict(saved, step=3)
    assert opt.state_dict()["param_groups"][0]["step"] == 3


def test_of_groups_put_together_from_two_runs_the_longer_one_counts() -> None:
    parameters = matrices()
    opt = rf.FusedSGD([{"params": [p]} for p in parameters], lr=0.1)
    saved = stepped(opt, 5, parameters).state_dict()
    saved["param_groups"][1]["step"] = 3
    opt.load_state_dict(saved)
    assert [group["step"] for group in opt.state_dict()["param_groups"]] == [5, 5]


@pytest.mark.parametrize("step", [-1, 1.5, "6", True])
def test_a_step_that_is_no_count_is_refused(step: Any) -> None:
    parameters = matrices()
    opt = rf.FusedSGD(parameters, lr=0.1)
    before = snapshot(opt)
    with pytest.raises((TypeError, ValueError), match=f"Invalid step: {step!r}"):
        opt.load_state_dict(torch.optim.SGD(parameters, 0.5).state_dict(), step=step)
    assert snapshot(opt) == before


def test_sharded_state_is_told_where_the_run_stands(process_group: None) -> None:
    parameters = matrices()
    opt = rfd.ZeroRedundancyOptimizer(parameters, rf.FusedSGD, lr=0.1, average=rf.mean(start=8))
    with pytest.raises(ValueError, match="another optimizer's"):
        opt.load_state_dict(torch.optim.Adam(parameters).state_dict())
    assert opt.param_groups[0]["lr"] == 0.1
    opt.load_state_dict(torch.optim.SGD(parameters, 0.5).state_dict(), step=6)
    opt.consolidate_state_dict()
    assert opt.state_dict()["param_groups"][0]["step"] == 6


# ---- ours, torch's, ours again -----------------------------------------------------------------


def through_torch(
    average: rf.Average | None, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Model, dict[str, Any]]:
    """Five steps of ours, four of torch's, with the checkpoint that torch writes then."""
    model = Model(dtype)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average, **options)
    train(model, opt, 1, 5)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    sgd.load_state_dict(opt.state_dict())
    train(model, sgd, 6, 9)
    return model, copy.deepcopy(sgd.state_dict())


@pytest.mark.parametrize(
    ("average", "dtype"),
    [
        (rf.ema(0.9), torch.float64),
        (rf.ema(0.9), torch.bfloat16),
        (rf.mean(start=2), torch.float64),
        (rf.rbwa(2, 1), torch.float64),  # whose average is the parameter
    ],
    ids=str,
)
def test_an_average_that_torch_has_left_behind_does_not_come_back_silently(
    average: rf.Average, dtype: torch.dtype
) -> None:
    model, saved = through_torch(average, dtype)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average)
    with pytest.warns(UserWarning, match=r"its average of \d samples behind") as seen:
        opt.load_state_dict(saved, step=9)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert opt.n_averaged == 0 and not any("average" in held for held in opt.state.values())
    averaged = opt.averaged_state_dict(model)
    assert {k: bits(v) for k, v in averaged.items()} == {
        k: bits(v) for k, v in model.state_dict().items()
    }
    train(model, opt, 10, 10)
    assert opt.n_averaged == 1 and opt.state_dict()["param_groups"][0]["step"] == 10


@pytest.mark.parametrize("average", [rf.ema(0.9), rf.mean(start=2), rf.rbwa(2, 1)], ids=str)
def test_an_average_that_torch_has_left_behind_does_not_come_back_by_the_class(
    average: rf.Average,
) -> None:
    model, saved = through_torch(average)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average)
    with pytest.warns(UserWarning, match=r"its average of \d samples behind") as seen:
        by_the_class(opt, saved)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert opt.n_averaged == 0 and not any("average" in held for held in opt.state.values())
    train(model, opt, 10, 10)
    assert opt.n_averaged == 1 and opt.state_dict()["param_groups"][0]["step"] == 6


def test_the_step_that_torch_did_not_count_is_asked_for() -> None:
    average = rf.mean(start=20)
    model, saved = through_torch(average)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average)
    with pytest.warns(UserWarning, match=r"counting from 5 on .*step=") as seen:
        opt.load_state_dict(saved)
    assert len(seen) == 1 and "behind" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved, step=9)


@pytest.mark.parametrize("average", [None, rf.lookahead(3)], ids=str)
def test_the_way_through_torch_opens_to_another_policy(average: rf.Average | None) -> None:
    model, saved = through_torch(rf.ema(0.9))
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average)
    with pytest.warns(UserWarning, match="5 samples behind"):
        opt.load_state_dict(saved, step=9)
    train(model, opt, 10, 12)


def test_a_run_without_averages_goes_through_torch_without_a_word() -> None:
    model, saved = through_torch(None)
    theirs = copy.deepcopy(model)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)
    sgd.load_state_dict(saved)
    train(model, opt, 10, 12)
    train(theirs, sgd, 10, 12)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["loaded", "in the group", "unpickled"])
def test_what_was_torchs_before_is_not_taken_for_torchs_after(how: str) -> None:
    """A run that began with torch's checkpoint, and options of torch's among our groups."""
    average = rf.ema(0.9)
    model = Model(torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    train(model, sgd, 1, 2)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average)
    opt.load_state_dict(sgd.state_dict())
    # torch.distributed.checkpoint looks in ours for every key of live groups
    assert opt.param_groups[0].keys() == opt.state_dict()["param_groups"][0].keys()
    if how == "in the group":
        opt.param_groups[0].update(foreach=False, differentiable=False, fused=None)
    if how == "unpickled":  # torch gives its defaults a key then
        model, opt = copy.deepcopy((model, opt))
        added = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        opt.add_param_group({"params": [added]})
        model.register_parameter("added", added)
    train(model, opt, 3, 5)
    parts = [{"params": group["params"]} for group in opt.param_groups]
    again = rf.FusedSGD(parts, lr=0.1, momentum=0.9, average=average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(opt.state_dict())
    assert again.n_averaged == 3
    assert bits(again.state[model.matrix]["average"]) == bits(opt.state[model.matrix]["average"])


@pytest.mark.parametrize("average", [None, rf.ema(0.9)], ids=["no average", "ema"])
def test_amsgrad_that_was_switched_on_before_the_checkpoint_goes_on_in_torch(average: Any) -> None:
    ours, theirs = matrices(), matrices()
    opt = stepped(rf.FusedAdam(ours, lr=0.1, average=average), 2, ours)
    opt.param_groups[0]["amsgrad"] = True
    saved = copy.deepcopy(opt.state_dict())
    assert all("max_exp_avg_sq" not in opt.state[p] for p in ours)
    there = torch.optim.Adam(theirs)
    there.load_state_dict(copy.deepcopy(saved))
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            p.copy_(q)
    stepped(there, 3, theirs)
    again = rf.FusedAdam(back := [nn.Parameter(p.detach().clone()) for p in ours], average=average)
    again.load_state_dict(saved)
    for one, own in ((opt, ours), (again, back)):
        stepped(one, 3, own)
        for p, q in zip(own, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                one.state[p]["max_exp_avg_sq"], there.state[q]["max_exp_avg_sq"], rtol=1e-5, atol=0
            )
    frozen = ours[0].requires_grad_(False)
    del opt.state[frozen]["max_exp_avg_sq"]
    assert "max_exp_avg_sq" not in opt.state_dict()["state"][0]
