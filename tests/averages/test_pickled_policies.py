"""A policy with a function of the user's: what can be pickled, and what is said where it cannot."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn

import rbwa_fused as rf


def half(n: int, step: int) -> float:
    return 0.5


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, n: int, step: int) -> float:
        return self.value


def local() -> Any:
    value = 0.5
    return lambda n, step: value


def optimizer(weight: Any) -> rf.FusedSGD:
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=0.1, average=rf.Average(weight, start=1))
    for _ in range(3):
        p.grad = torch.ones(3)
        opt.step()
    return opt


@pytest.mark.parametrize("weight", [half, Constant(0.5)])
def test_a_policy_whose_function_has_a_name_is_pickled_with_its_optimizer(weight: Any) -> None:
    opt = pickle.loads(pickle.dumps(optimizer(weight)))
    assert opt.n_averaged == 2
    assert opt.param_groups[0]["average"] == rf.Average(weight, start=1)


@pytest.mark.parametrize("save", [pickle.dumps, lambda opt: torch.save(opt, io.BytesIO())])
@pytest.mark.parametrize("weight", [local(), Constant(local())])
def test_a_function_without_a_name_is_refused_by_name_and_with_a_way_out(
    weight: Any, save: Any
) -> None:
    for what in (optimizer(local()), rf.Average(weight)):
        with pytest.raises(pickle.PicklingError, match="define the weight at the top"):
            save(what)


def test_a_function_without_a_name_goes_where_code_is_pickled() -> None:
    opt = pickle.loads(cloudpickle.dumps(optimizer(local())))
    assert opt.n_averaged == 2 and opt.param_groups[0]["average"].weight(1, 1) == 0.5


def test_a_function_without_a_name_is_copied_and_kept_out_of_state_dicts() -> None:
    opt = optimizer(local())
    other = copy.deepcopy(opt)
    other.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    assert other.n_averaged == 2
    assert copy.copy(opt.param_groups[0]["average"]) is opt.param_groups[0]["average"]


def test_a_copy_of_a_policy_has_an_object_of_its_own_for_a_weight() -> None:
    policy = rf.Average(Constant(0.5), every=2, dtype=torch.float32)
    other = copy.deepcopy(policy)
    assert other == policy and other.weight is not policy.weight


WRITTEN = [
    "ema(0.99)",
    "ema()",
    "mean(start=3, every=2, write_back_every=4)",
    "swa(10, 5, initial='current')",
    "rswa(4, start_epoch=2)",
    "rbwa(5, 1, 'algorithm2')",
    "rbwa_e(0.5, steps_per_epoch=3)",
    "lookahead(k=6, alpha=0.25)",
    "switch_ema(steps_per_epoch=7)",
    "Average(Ema(decay=0.5), start=3, dtype=torch.float32)",
    "Average(Mean())",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_policy_prints_as_it_is_written(text: str) -> None:
    policy = eval(text, {**vars(rf), "torch": torch})
    for same in (
        policy,
        copy.copy(policy),
        copy.deepcopy(policy),
        pickle.loads(pickle.dumps(policy)),
    ):
        assert repr(same) == text and same == policy
        assert same.describe() == policy.describe()


def test_a_policy_of_a_function_prints_its_place() -> None:
    policy = rf.Average(half, every=2, name="ramp")
    assert repr(policy) == f"Average(<{__name__}.half>, every=2, name='ramp')"


def test_an_optimizer_prints_its_policy_and_no_counters_that_are_kept_elsewhere() -> None:
    opt = rf.FusedSGD([torch.ones(2)], lr=0.5, average=rf.ema(0.9))
    lines = repr(opt).splitlines()
    assert lines[:3] == ["FusedSGD (", "Parameter Group 0", "    average: ema(0.9)"]
    theirs = repr(torch.optim.SGD([torch.ones(2)], lr=0.5)).splitlines()
    choices = {f"    {line}" for line in ("foreach: None", "fused: None", "differentiable: False")}
    assert set(lines[3:]) == set(theirs[2:]) - choices
    opt.param_groups[0]["step"] = "a user's own"
    assert "    step: a user's own" in repr(opt)
