"""Bad input ends in an error that names argument and value, and costs nothing but the call.

After each refusal weights, state, counters and averages are what they were, bit for bit, and the
run goes on as one that never met the bad input.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rules import OF_TORCH, Rule
from runs import EPOCH, METHODS, STEPS, Model, bits, build, feed, groups, result, snapshot, train
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import backends

NAN = float("nan")
INF = float("inf")
Call = Callable[[], Any]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.arange(math.prod(shape)).to(dtype).reshape(shape))


# ---- arguments ---------------------------------------------------------------------------------

NESTEROV = "Nesterov momentum requires a momentum and zero dampening"
TWO = torch.ones(2)

# (constructor, arguments, error, what it must say); the first rows are torch.optim.SGD's own words
OPTIONS: list[tuple[Any, dict[str, Any], Any, str]] = [
    (rf.FusedSGD, {"lr": -1}, ValueError, "^Invalid learning rate: -1$"),
    (rf.FusedSGD, {"momentum": -0.5}, ValueError, "^Invalid momentum value: -0.5$"),
    (rf.FusedSGD, {"weight_decay": -1}, ValueError, "^Invalid weight_decay value: -1$"),
    (rf.FusedSGD, {"lr": TWO}, ValueError, "^Tensor lr must be 1-element$"),
    (rf.FusedSGD, {"nesterov": True}, ValueError, f"^{NESTEROV}$"),
    (
        rf.FusedSGD,
        {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
        ValueError,
        f"^{NESTEROV}$",
    ),
    (rf.FusedSGD, {"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: .*-1"),
    (rf.FusedSGD, {"lr": NAN}, ValueError, "Invalid learning rate: nan"),
    (rf.FusedSGD, {"momentum": NAN}, ValueError, "Invalid momentum value: nan"),
    (rf.FusedSGD, {"weight_decay": NAN}, ValueError, "Invalid weight_decay value: nan"),
    (rf.FusedSGD, {"momentum": 0.9, "dampening": NAN}, ValueError, "dampening.*nan"),
    (rf.FusedSGD, {"lr": "0.1"}, TypeError, "lr.*'0.1'"),
    (rf.FusedSGD, {"lr": None}, TypeError, "lr.*None"),
    (rf.FusedSGD, {"lr": 1j}, TypeError, "lr.*1j"),
    (rf.FusedSGD, {"lr": [0.1]}, TypeError, r"lr.*\[0.1\]"),
    (rf.FusedSGD, {"momentum": "0.9"}, TypeError, "momentum.*'0.9'"),
    (rf.FusedSGD, {"momentum": "0.9", "nesterov": True}, TypeError, "momentum.*'0.9'"),
    (rf.FusedSGD, {"momentum": TWO}, TypeError, "momentum.*tensor"),
    (rf.FusedSGD, {"dampening": None}, TypeError, "dampening.*None"),
    (rf.FusedSGD, {"dampening": "0"}, TypeError, "dampening.*'0'"),
    (rf.FusedSGD, {"weight_decay": "0"}, TypeError, "weight_decay.*'0'"),
    (rf.FusedSGD, {"lr": 10**400}, TypeError, "lr.*1000"),
    (rf.FusedSGD, {"momentum": 0.9, "nesterov": "no"}, ValueError, "nesterov.*'no'"),
    (rf.FusedSGD, {"momentum": 0.9, "nesterov": TWO}, ValueError, "nesterov.*tensor"),
    (rf.FusedSGD, {"maximize": NAN}, ValueError, "maximize.*nan"),
    (rf.FusedSGD, {"maximize": "no"}, ValueError, "maximize.*'no'"),
    (rf.FusedSGD, {"foreach": "no"}, ValueError, "foreach.*'no'"),
    (rf.FusedSGD, {"fused": "no"}, ValueError, "fused.*'no'"),
    (rf.FusedSGD, {"differentiable": True}, ValueError, "differentiable: True.*False"),
    (
        rf.FusedSGD,
        {"fused": True, "foreach": True},
        RuntimeError,
        "^`fused` and `foreach` cannot be `True` together.$",
    ),
    (
        rf.FusedSGD,
        {"fused": True, "differentiable": True},
        RuntimeError,
        "^`fused` does not support `differentiable`$",
    ),
    (rf.FusedSGD, {"average": "ema"}, TypeError, "average.*'ema'"),
    (rf.FusedSGD, {"average": rf.ema}, TypeError, "average.*function ema"),
    (rf.FusedSGD, {"average": rf.Mean()}, TypeError, r"average.*Mean\(\)"),
    (rf.FusedSGD, {"average": True}, TypeError, "average.*True"),
    (rf.FusedSGD, {"average": 0.999}, TypeError, "average.*0.999"),
    (
        rf.FusedSGD,
        {"average": rf.Average(lambda n, step: 0.5), "capturable": True},
        ValueError,
        "average.*lambda.*capturable=True",
    ),
    (
        rf.FusedSGD,
        {"average": rf.Average(rf.Mean(), dtype=torch.float16)},
        ValueError,
        "dtype.*float16.*float32 parameter",
    ),
    (
        rf.FusedSGD,
        {"average": rf.Average(rf.Mean(), dtype=torch.float64)},
        ValueError,
        "dtype.*float64.*float32 parameter",
    ),
    (rf.FusedSGD, {"backend": "nonsense"}, ValueError, "backend.*'nonsense'"),
    (rf.FusedSGD, {"backend": None}, ValueError, "backend.*None"),
    (rf.FusedSGD, {"backend": "cuda"}, (ValueError, RuntimeError), "backend.*'cuda'"),
    (rf.RSGDM, {"lr": -1}, ValueError, "^Invalid learning rate: -1$"),
    (rf.RSGDM, {"lr": "0.1"}, TypeError, "lr.*'0.1'"),
    (rf.RSGDM, {"momentum": -0.5}, ValueError, "^Invalid momentum value: -0.5$"),
    (rf.RSGDM, {"momentum": 1.0}, ValueError, "momentum value: 1.0"),
    (rf.RSGDM, {"momentum": INF}, ValueError, "momentum value: inf"),
    (rf.RSGDM, {"momentum": NAN}, ValueError, "momentum value: nan"),
    (rf.RSGDM, {"momentum": 1.0, "difference": None}, ValueError, "momentum value: 1.0"),
    (rf.RSGDM, {"weight_decay": -1}, ValueError, "^Invalid weight_decay value: -1$"),
    (rf.RSGDM, {"difference": "both"}, ValueError, "difference.*'both'"),
    (rf.RSGDM, {"difference": True}, ValueError, "difference.*True"),
    (rf.RSGDM, {"average": "ema"}, TypeError, "average.*'ema'"),
    (rf.RSGDM, {"backend": "nonsense"}, ValueError, "backend.*'nonsense'"),
]


OF_THE_OPTIMIZER = {"capturable", "backend", "difference"}
OF_GROUPS = [row for row in OPTIONS if OF_THE_OPTIMIZER.isdisjoint(row[1])]


@pytest.mark.parametrize(
    ("where", "cls", "options", "error", "words"),
    [("default", *row) for row in OPTIONS] + [("group", *row) for row in OF_GROUPS],
)
def test_a_bad_hyperparameter_names_itself(
    where: str, cls: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    p = parameter(3)
    address = p.data_ptr()
    params: Any = [p] if where == "default" else [{"params": [p], **options}]
    more = options if where == "default" else {}
    with pytest.raises(error, match=words):
        cls(params, **more)
    assert p.tolist() == [0.0, 1.0, 2.0]
    assert p.data_ptr() == address  # not moved for an optimizer that there is not
    opt = cls([p], lr=0.5, momentum=0.0)
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [-0.5, 0.5, 1.5]


# (what is made, error, what it must say)
POLICIES: dict[str, tuple[Call, type[Exception], str]] = {
    "a decay and a half-life": (
        lambda: rf.ema(0.9, half_life=5),
        TypeError,
        "half_life.*5.*decay=0.9",
    ),
    "a half-life of 0": (lambda: rf.ema(half_life=0), ValueError, "half_life.*0"),
    "a half-life of nan": (lambda: rf.ema(half_life=NAN), ValueError, "half_life.*nan"),
    "an endless half-life": (
        lambda: rf.ema(half_life=float("inf")),
        ValueError,
        "half_life.*inf",
    ),
    "a half-life by name": (lambda: rf.ema(half_life="long"), TypeError, "half_life.*'long'"),  # type: ignore[arg-type]
    "a ramp by name": (lambda: rf.ema(ramp="count"), TypeError, "ramp.*'count'"),  # type: ignore[arg-type]
    "a ramp of nothing": (lambda: rf.ramp.inverse(0), ValueError, "gamma.*0"),
    "a ramp that does not fall": (lambda: rf.ramp.inverse(power=-1), ValueError, "power.*-1"),
    "a ramp with a floor of 1": (lambda: rf.ramp.count(floor=1), ValueError, "floor.*1"),
    "a ramp without a time": (lambda: rf.ramp.exponential(-2), ValueError, "tau.*-2"),
    "a length of 0": (lambda: rf.power_ema(0), ValueError, "sigma_rel.*0"),
    "a length below 0": (lambda: rf.power_ema(-0.1), ValueError, "sigma_rel.*-0.1"),
    "a length beyond the mean's": (lambda: rf.power_ema(0.289), ValueError, "sigma_rel.*0.289"),
    "a length of nan": (lambda: rf.power_ema(NAN), ValueError, "sigma_rel.*nan"),
    "a length and a power": (lambda: rf.power_ema(0.1, gamma=7), TypeError, "gamma.*7.*0.1"),
    "a power of -1": (lambda: rf.power_ema(gamma=-1), ValueError, "gamma.*-1"),
    "a window without samples": (lambda: rf.merge(5, 7, every=3), ValueError, "stop.*7.*8"),
    "a window that ends before it begins": (lambda: rf.merge(5, 4), ValueError, "stop.*4"),
    "a cosine window without an end": (
        lambda: rf.merge(5, None, "cosine"),
        TypeError,
        "stop.*None",
    ),
    "a window of another shape": (lambda: rf.merge(5, 9, "step"), ValueError, "decay.*'step'"),  # type: ignore[arg-type]
    "a window of too few weights": (
        lambda: rf.merge(5, 9, [1, 2, 3]),
        ValueError,
        "decay.*3 weights.*4.*stop=9",
    ),
    "a window of negative weights": (
        lambda: rf.merge(0, 2, [1, -1]),
        ValueError,
        r"weights\[1\].*-1",
    ),
    "a window of no weight": (lambda: rf.merge(0, 2, [0, 0]), ValueError, "weights.*positive"),
    "a table without weights": (lambda: rf.table([]), ValueError, "weights"),
    "a table of a number": (lambda: rf.table(0.5), TypeError, "weights.*0.5"),  # type: ignore[arg-type]
    "a table of what is read once": (lambda: rf.table(iter([0.5])), TypeError, "weights.*sequence"),  # type: ignore[arg-type]
    "a table of a text": (lambda: rf.table("0.5"), TypeError, "weights.*'0.5'"),  # type: ignore[arg-type]
    "a table beyond 1": (lambda: rf.table([0.5, 1.5]), ValueError, r"weights\[1\].*1.5"),
    "a table of nan": (lambda: rf.table([NAN]), ValueError, r"weights\[0\].*nan"),
    "a stop before the first sample": (
        lambda: rf.Average(rf.Mean(), start=5, every=2, stop=6),
        ValueError,
        "stop.*6.*7",
    ),
    "a stop where it is written back": (
        lambda: rf.Average(rf.Mean(), write_back_every=1, stop=6),
        ValueError,
        "stop.*6.*written back",
    ),
    "a stop that is no integer": (lambda: rf.Average(rf.Mean(), stop=6.5), TypeError, "stop.*6.5"),  # type: ignore[arg-type]
    "weight is a number": (lambda: rf.Average(0.5), TypeError, "weight.*0.5"),  # type: ignore[arg-type]
    "weight is a name": (lambda: rf.Average("ema"), TypeError, "weight.*'ema'"),  # type: ignore[arg-type]
    "weight is a class": (lambda: rf.Average(rf.Ema), TypeError, "weight.*Ema"),  # type: ignore[arg-type]
    "weight is a policy": (lambda: rf.Average(rf.ema()), TypeError, r"weight.*ema\(\)"),  # type: ignore[arg-type]
    "Ema above 1": (lambda: rf.Average(rf.Ema(1.5)), ValueError, "decay.*1.5"),
    "Ema below 0": (lambda: rf.Average(rf.Ema(-0.1)), ValueError, "decay.*-0.1"),
    "Ema of nan": (lambda: rf.Average(rf.Ema(NAN)), ValueError, "decay.*nan"),
    "Ema of a name": (lambda: rf.Average(rf.Ema("x")), TypeError, "decay.*'x'"),  # type: ignore[arg-type]
    "Algorithm2 without steps": (
        lambda: rf.Average(rf.Algorithm2(0, 0)),
        ValueError,
        "steps_per_epoch.*0",
    ),
    "Algorithm2 before its epoch": (
        lambda: rf.Average(rf.Algorithm2(5, -1)),
        ValueError,
        "start_epoch.*-1",
    ),
    "Algorithm2 of a float": (
        lambda: rf.Average(rf.Algorithm2(2.5, 1)),  # type: ignore[arg-type]
        TypeError,
        "steps_per_epoch.*2.5",
    ),
    "start below 0": (lambda: rf.Average(rf.Mean(), start=-1), ValueError, "start.*-1"),
    "start is a float": (lambda: rf.Average(rf.Mean(), start=1.5), TypeError, "start.*1.5"),  # type: ignore[arg-type]
    "start is a flag": (lambda: rf.Average(rf.Mean(), start=True), TypeError, "start.*True"),
    "start is a name": (lambda: rf.Average(rf.Mean(), start="3"), TypeError, "start.*'3'"),  # type: ignore[arg-type]
    "every 0": (lambda: rf.Average(rf.Mean(), every=0), ValueError, "every.*0"),
    "every None": (lambda: rf.Average(rf.Mean(), every=None), TypeError, "every.*None"),  # type: ignore[arg-type]
    "write_back_every below 0": (
        lambda: rf.Average(rf.Mean(), write_back_every=-2),
        ValueError,
        "write_back_every.*-2",
    ),
    "an offset beyond a cycle": (
        lambda: rf.Average(rf.Mean(), every=2, offset=3),
        ValueError,
        "offset.*3.*every=2",
    ),
    "an offset below 0": (lambda: rf.ema(0.5, offset=-1), ValueError, "offset.*-1"),
    "another initial": (
        lambda: rf.ema(0.5, initial="later"),
        ValueError,
        "initial.*later.*first_sample.*current.*now",
    ),
    "an average that is the parameter, from now on": (
        lambda: rf.mean(start=2, write_back_every=1, initial="now"),
        ValueError,
        "initial.*now.*current",
    ),
    "write_back_every between samples": (
        lambda: rf.Average(rf.Mean(), every=2, write_back_every=3),
        ValueError,
        "write_back_every.*3.*every=2",
    ),
    "write_back_every is a flag": (
        lambda: rf.Average(rf.Mean(), write_back_every=True),
        TypeError,
        "write_back_every.*True",
    ),
    "initial": (
        lambda: rf.Average(rf.Mean(), initial="last"),  # type: ignore[arg-type]
        ValueError,
        "initial.*'last'",
    ),
    "initial is a flag": (
        lambda: rf.Average(rf.Mean(), initial=True),  # type: ignore[arg-type]
        ValueError,
        "initial.*True",
    ),
    "dtype is an integer": (
        lambda: rf.Average(rf.Mean(), dtype=torch.int32),
        ValueError,
        "dtype.*int32",
    ),
    "dtype is a name": (
        lambda: rf.Average(rf.Mean(), dtype="float32"),  # type: ignore[arg-type]
        TypeError,
        "dtype.*'float32'",
    ),
    "mean start": (lambda: rf.mean(start=-1), ValueError, "start.*-1"),
    "mean every": (lambda: rf.mean(every=-1), ValueError, "every.*-1"),
    "mean write_back_every": (
        lambda: rf.mean(every=2, write_back_every=1),
        ValueError,
        "write_back_every.*1",
    ),
    "ema decay 1": (lambda: rf.ema(1.0), ValueError, "decay.*1.0"),
    "ema decay below 0": (lambda: rf.ema(-0.5), ValueError, "decay.*-0.5"),
    "ema decay nan": (lambda: rf.ema(NAN), ValueError, "decay.*nan"),
    "ema decay None": (lambda: rf.ema(None), TypeError, "decay.*None"),  # type: ignore[arg-type]
    "ema decay a name": (lambda: rf.ema("0.9"), TypeError, "decay.*'0.9'"),  # type: ignore[arg-type]
    "ema start": (lambda: rf.ema(start=0.5), TypeError, "start.*0.5"),  # type: ignore[arg-type]
    "ema every": (lambda: rf.ema(every=0), ValueError, "every.*0"),
    "swa start": (lambda: rf.swa(start=-5), ValueError, "start.*-5"),
    "swa every": (lambda: rf.swa(every=0), ValueError, "every.*0"),
    "swa initial": (lambda: rf.swa(initial="later"), ValueError, "initial.*'later'"),  # type: ignore[arg-type]
    "rswa steps_per_epoch": (lambda: rf.rswa(0), ValueError, "steps_per_epoch.*0"),
    "rswa steps_per_epoch a float": (lambda: rf.rswa(10.0), TypeError, "steps_per_epoch.*10.0"),  # type: ignore[arg-type]
    "rswa start_epoch": (lambda: rf.rswa(10, -1), ValueError, "start_epoch.*-1"),
    "rswa start_epoch a float": (lambda: rf.rswa(10, 1.5), TypeError, "start_epoch.*1.5"),  # type: ignore[arg-type]
    "rbwa steps_per_epoch": (lambda: rf.rbwa(-3), ValueError, "steps_per_epoch.*-3"),
    "rbwa start_epoch": (lambda: rf.rbwa(10, -1), ValueError, "start_epoch.*-1"),
    "rbwa start_epoch None": (lambda: rf.rbwa(10, None), TypeError, "start_epoch.*None"),  # type: ignore[arg-type]
    "rbwa count": (lambda: rf.rbwa(10, count="eq1"), ValueError, "count.*'eq1'"),  # type: ignore[arg-type]
    "rbwa_e beta": (lambda: rf.rbwa_e(1.0, steps_per_epoch=5), ValueError, "beta.*1.0"),
    "rbwa_e beta a name": (
        lambda: rf.rbwa_e("x", steps_per_epoch=5),  # type: ignore[arg-type]
        TypeError,
        "beta.*'x'",
    ),
    "rbwa_e steps_per_epoch": (
        lambda: rf.rbwa_e(steps_per_epoch=0),
        ValueError,
        "steps_per_epoch.*0",
    ),
    "rbwa_e start_epoch": (
        lambda: rf.rbwa_e(steps_per_epoch=5, start_epoch=-2),
        ValueError,
        "start_epoch.*-2",
    ),
    "lookahead k": (lambda: rf.lookahead(0), ValueError, "k.*0"),
    "lookahead k a float": (lambda: rf.lookahead(2.5), TypeError, "k.*2.5"),  # type: ignore[arg-type]
    "lookahead alpha 0": (lambda: rf.lookahead(5, 0.0), ValueError, "alpha.*0.0"),
    "lookahead alpha above 1": (lambda: rf.lookahead(5, 1.5), ValueError, "alpha.*1.5"),
    "lookahead alpha nan": (lambda: rf.lookahead(5, NAN), ValueError, "alpha.*nan"),
    "lookahead alpha a name": (lambda: rf.lookahead(5, "x"), TypeError, "alpha.*'x'"),  # type: ignore[arg-type]
    "switch_ema decay": (lambda: rf.switch_ema(1.0, steps_per_epoch=5), ValueError, "decay.*1.0"),
    "switch_ema steps_per_epoch": (
        lambda: rf.switch_ema(steps_per_epoch=0),
        ValueError,
        "steps_per_epoch.*0",
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_bad_policy_names_its_argument(name: str) -> None:
    make, error, words = POLICIES[name]
    with pytest.raises(error, match=f"Invalid {words}"):
        make()


def train_alone(p: nn.Parameter, average: rf.Average) -> None:
    opt = rf.FusedSGD([p], lr=0.1, average=average)
    for _ in range(4):
        p.grad = torch.ones_like(p)
        opt.step()


def test_algorithm2_never_pushes_the_average_away() -> None:
    # k = (e - c) j is negative before epoch c, and 1/(k+1) then no weight of an average
    p = parameter(3)
    with pytest.raises(ValueError, match="start"):
        train_alone(p, rf.Average(rf.Algorithm2(5, 3)))


# ---- parameters --------------------------------------------------------------------------------

P = parameter(3)
PARAMETERS: dict[str, tuple[Call, type[Exception] | tuple[type[Exception], ...], str]] = {
    "none at all": (lambda: [], ValueError, "^optimizer got an empty parameter list$"),
    "a lone tensor": (lambda: parameter(3), TypeError, "should be an iterable"),
    "non-leaf": (lambda: [parameter(3) * 2], ValueError, "^can't optimize a non-leaf Tensor$"),
    "twice in a group": (lambda: [P, P], ValueError, "duplicate parameters"),
    "twice by name": (lambda: [("a", P), ("b", P)], ValueError, "duplicate parameters"),
    "in two groups": (
        lambda: [{"params": [P]}, {"params": [P]}],
        ValueError,
        "^some parameters appear in more than one parameter group$",
    ),
    "half of them named": (lambda: [("a", parameter(3)), parameter(3)], ValueError, "names"),
    "not a tensor": (lambda: ["weight"], TypeError, "can only optimize Tensors"),
    "a module": (lambda: [nn.Linear(2, 2)], TypeError, "can only optimize Tensors"),
    "integer": (lambda: [torch.ones(3, dtype=torch.int64)], TypeError, "parameter 0.*int64"),
    "complex": (
        lambda: [parameter(3), parameter(3, dtype=torch.complex64)],
        TypeError,
        "parameter 1.*complex64",
    ),
    "8-bit": (
        lambda: [nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))],
        TypeError,
        "parameter 0.*float8_e4m3fn",
    ),
    "named and complex": (
        lambda: [("weight", parameter(3, dtype=torch.complex64))],
        TypeError,
        "parameter 0.*'weight'.*complex64",
    ),
    "sparse": (lambda: [nn.Parameter(torch.eye(3).to_sparse())], TypeError, "parameter 0.*sparse"),
    "meta": (
        lambda: [nn.Parameter(torch.ones(3, device="meta"))],
        ValueError,
        "parameter 0.*meta",
    ),
    "expanded": (
        lambda: [nn.Parameter(torch.ones(1).expand(3))],
        ValueError,
        "parameter 0.*expanded",
    ),
    "uninitialized": (
        lambda: [nn.UninitializedParameter()],
        (ValueError, TypeError),
        "parameter 0.*ninitialized",
    ),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_bad_parameter_is_refused_before_anything_moves(kind: str) -> None:
    make, error, words = PARAMETERS[kind]
    address = P.data_ptr()
    with pytest.raises(error, match=words):
        rf.FusedSGD(make(), lr=0.1)
    assert (P.data_ptr(), P.tolist()) == (address, [0.0, 1.0, 2.0])


# Those that `add_param_group` can meet too; an empty group is fine, as in torch.
OF_ALL = ("none at all", "a lone tensor", "in two groups", "named and complex")
OF_A_GROUP = [kind for kind in PARAMETERS if kind not in OF_ALL]


@pytest.mark.parametrize("kind", [*OF_A_GROUP, "known already"])
def test_a_bad_parameter_of_a_new_group_is_refused_and_forgotten(kind: str) -> None:
    model, opt = build("lookahead")
    twin, opt2 = build("lookahead")
    for m, o in ((model, opt), (twin, opt2)):
        train(m, o, 1, 6)
    make, error, words = PARAMETERS["in two groups" if kind == "known already" else kind]
    members = {"params": [model.matrix] if kind == "known already" else make()}
    before = snapshot(opt)
    with pytest.raises(error, match=words):
        opt.add_param_group(members)
    assert snapshot(opt) == before
    for m, o in ((model, opt), (twin, opt2)):
        train(m, o, 7, STEPS)
    assert result(opt) == result(opt2)


NEW_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr": ({"lr": -1}, ValueError, "^Invalid learning rate: -1$"),
    "lr of a wrong type": ({"lr": "0.1"}, TypeError, "lr.*'0.1'"),
    "momentum": ({"momentum": -1}, ValueError, "^Invalid momentum value: -1$"),
    "nesterov": ({"momentum": 0.9, "nesterov": True, "dampening": 0.5}, ValueError, NESTEROV),
    "average": ({"average": "ema"}, TypeError, "average.*'ema'"),
    "average's dtype": (
        {"average": rf.Average(rf.Mean(), dtype=torch.bfloat16)},
        ValueError,
        "dtype.*bfloat16",
    ),
}


@pytest.mark.parametrize("name", NEW_GROUPS)
def test_a_group_that_is_refused_does_not_stay(name: str) -> None:
    options, error, words = NEW_GROUPS[name]
    model, opt = build("ema")
    twin, opt2 = build("ema")
    for m, o in ((model, opt), (twin, opt2)):
        train(m, o, 1, 6)
    extra = parameter(4)
    before, address = snapshot(opt), extra.data_ptr()
    with pytest.raises(error, match=words):
        opt.add_param_group({"params": [extra], **options})
    assert snapshot(opt) == before
    assert extra.data_ptr() == address
    opt.add_param_group({"params": [extra]})
    opt2.add_param_group({"params": [parameter(4)]})
    for m, o in ((model, opt), (twin, opt2)):
        train(m, o, 7, STEPS)
    assert result(opt) == result(opt2)


def test_an_empty_group_is_torchs_empty_group() -> None:
    opt = rf.FusedSGD([{"params": []}], lr=0.1, momentum=0.9, average=rf.ema())
    opt.step()
    opt.zero_grad()
    assert (opt.n_averaged, opt.backend) == (0, "cpu" if backends._C is not None else "reference")
    with opt.averaged():
        pass
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    p = parameter(3)
    opt.add_param_group({"params": [p]})
    p.grad = torch.ones(3)
    opt.step()
    assert opt.n_averaged == 1


# ---- backends ----------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "CPU_MISSING", "not built here, run `pip install`")


@pytest.mark.usefixtures("unbuilt")
def test_a_backend_that_is_not_built_says_how_to_build_it() -> None:
    p = parameter(3)
    address = p.data_ptr()
    with pytest.raises(RuntimeError, match=r"backend 'cpu'.*pip install"):
        rf.FusedSGD([p], backend="cpu")
    assert p.data_ptr() == address


@pytest.mark.usefixtures("unbuilt")
def test_auto_says_once_that_it_runs_the_slow_reference() -> None:
    p = parameter(3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt = rf.FusedSGD([p], lr=1.0)
        for _ in range(3):
            p.grad = torch.ones(3)
            opt.step()
        p.data = p.data.clone()
        opt.step()
    assert opt.backend == "reference"
    assert p.tolist() == [-4.0, -3.0, -2.0]
    messages = [str(w.message) for w in seen]
    assert len(messages) == 1 and "reference" in messages[0] and "pip install" in messages[0]
    assert seen[0].filename == __file__


# ---- steps -------------------------------------------------------------------------------------


class Spoiled:
    """A run in the middle of training, with what somebody needs to spoil it."""

    def __init__(self, model: Model, opt: Any) -> None:
        self.model = model
        self.opt = opt
        self.group = opt.param_groups[0]
        self.p = model.conv


def wrong_dtype(dtype: torch.dtype) -> Callable[[Spoiled], None]:
    def spoil(run: Spoiled) -> None:
        run.p.grad_dtype = None  # anything goes
        run.p.grad = torch.ones(run.p.shape).to(dtype)

    return spoil


def sparse(run: Spoiled) -> None:
    run.p.grad = torch.ones(run.p.shape).to(run.p.dtype).to_sparse()


def gradient(run: Spoiled) -> Tensor:
    assert run.p.grad is not None
    return run.p.grad


def longer(run: Spoiled) -> None:
    gradient(run).data = torch.ones(3).to(run.p.dtype)


def resized(run: Spoiled) -> None:
    gradient(run).resize_(run.p.numel(), 2)


GRADIENTS: dict[str, tuple[Callable[[Spoiled], None], type[Exception], str]] = {
    "sparse": (sparse, RuntimeError, "sparse gradients.*parameter 1"),
    "double": (wrong_dtype(torch.float64), TypeError, "parameter 1.*dtype.*float64"),
    "half": (wrong_dtype(torch.float16), TypeError, "parameter 1.*dtype.*float16"),
    "complex": (wrong_dtype(torch.complex64), TypeError, "parameter 1.*dtype.*complex64"),
    "integer": (wrong_dtype(torch.int64), TypeError, "parameter 1.*dtype.*int64"),
    "another shape": (longer, ValueError, r"parameter 1.*shape.*\(3,\)"),
    "resized": (resized, ValueError, r"parameter 1.*shape.*\(24, 2\)"),
}
# a few that differ in what a step does: no average, a shadow, a first sample that is the current
# weights, a write-back, the average in the weights themselves, three buffers
RUNS = ["momentum", "ema", "swa current", "lookahead", "rbwa", "rsgdm explicit"]
WHEN = (1, 2, EPOCH + 1, 6)  # the first step; the next; the first that averages; mid epoch


def refused(
    method: str,
    spoil: Callable[[Spoiled], Any],
    error: Any,
    words: str,
    whens: tuple[int, ...] = WHEN,
    **options: Any,
) -> None:
    """Spoils a run before a step and mends it; it must go on as one that never was."""
    twin, opt2 = build(method, **options)
    train(twin, opt2, 1, STEPS)
    for when in whens:
        model, opt = build(method, **options)
        train(model, opt, 1, when - 1)
        feed(model, when)
        kept = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
        mend = spoil(Spoiled(model, opt))
        before = snapshot(opt)
        for _ in range(2):
            with pytest.raises(error, match=words):
                opt.step()
            assert snapshot(opt) == before, (method, when)
        if mend is not None:
            mend()
        for group, values in zip(opt.param_groups, kept, strict=True):
            group.update(values)
        model.zero_grad()
        train(model, opt, when, STEPS)
        assert result(opt) == result(opt2), (method, when)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_bad_gradient_is_refused_before_anything_changes(
    kind: str, method: str, backend: str
) -> None:
    spoil, error, words = GRADIENTS[kind]
    refused(method, spoil, error, words, backend=backend)


class Elsewhere(nn.Parameter):
    """A parameter whose gradient is on another device, as a wrapper of its own may have it."""

    @property
    def grad(self) -> Tensor:  # type: ignore[override]
        return torch.ones(self.shape, device="meta")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_on_another_device_is_refused(backend: str) -> None:
    first, other = parameter(3), Elsewhere(torch.ones(3))
    opt = rf.FusedSGD([first, other], lr=0.1, momentum=0.9, average=rf.ema(), backend=backend)
    first.grad = torch.ones(3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter 1.*meta.*cpu"):
            opt.step()
        assert first.tolist() == [0.0, 1.0, 2.0]
        assert other.tolist() == [1.0, 1.0, 1.0]
        assert opt.n_averaged == 0 and not any(opt.state.values())


def test_the_parameter_with_a_bad_gradient_is_named() -> None:
    model = Model()
    opt = rf.FusedSGD(model.named_parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.late.grad = torch.ones(7).to_sparse()
    with pytest.raises(RuntimeError, match="'late'"):
        opt.step()


def setting(**values: Any) -> Callable[[Spoiled], None]:
    return lambda run: run.group.update(values)


def setting_second(**values: Any) -> Callable[[Spoiled], None]:
    return lambda run: run.opt.param_groups[1].update(values)


HYPERPARAMETERS: dict[str, tuple[Callable[[Spoiled], None], type[Exception], str]] = {
    "lr": (setting(lr=-1), ValueError, "^Invalid learning rate: -1$"),
    "lr nan": (setting(lr=NAN), ValueError, "Invalid learning rate: nan"),
    "lr of two": (setting(lr=TWO), ValueError, "Tensor lr must be 1-element"),
    "lr a negative tensor": (setting(lr=torch.tensor(-1.0)), ValueError, "learning rate: .*-1"),
    "lr a name": (setting(lr="0.1"), TypeError, "lr.*'0.1'"),
    "lr None": (setting(lr=None), TypeError, "lr.*None"),
    "momentum": (setting(momentum=-1), ValueError, "^Invalid momentum value: -1$"),
    "momentum None": (setting(momentum=None), TypeError, "momentum.*None"),
    "weight_decay": (setting(weight_decay=-1), ValueError, "^Invalid weight_decay value: -1$"),
    "weight_decay a name": (setting(weight_decay="1"), TypeError, "weight_decay.*'1'"),
    "lr of the second group": (setting_second(lr=-1), ValueError, "^Invalid learning rate: -1$"),
    "average": (setting(average="ema"), ValueError, "average.*'ema'"),
}
OF_SGD: dict[str, tuple[Callable[[Spoiled], None], type[Exception], str]] = {
    "dampening": (setting(dampening=NAN), ValueError, "dampening.*nan"),
    "nesterov": (setting(nesterov=True, dampening=0.5), ValueError, NESTEROV),
    "nesterov of the second group": (
        setting_second(nesterov=True, momentum=0.0),
        ValueError,
        NESTEROV,
    ),
}


@pytest.mark.parametrize("kind", [*HYPERPARAMETERS, *OF_SGD])
def test_a_hyperparameter_gone_bad_is_refused_before_anything_changes(kind: str) -> None:
    spoil, error, words = {**HYPERPARAMETERS, **OF_SGD}[kind]
    for method in RUNS:
        if kind not in OF_SGD or method != "rsgdm explicit":
            refused(method, spoil, error, words)


@pytest.mark.parametrize("momentum", [0.5, 0.0, 0.8 + 1e-9])
@pytest.mark.parametrize("method", ["rsgdm implicit", "rsgdm ema"])
def test_implicit_rsgdm_refuses_another_momentum_and_names_explicit(
    method: str, momentum: float
) -> None:
    words = f"momentum value: {momentum} .*0.8.*explicit"
    refused(method, setting(momentum=momentum), ValueError, words, (2, 6))
    refused(method, setting_second(momentum=momentum), ValueError, words, (2, 6))


def test_momentum_may_change_before_implicit_rsgdms_first_step_and_under_the_others() -> None:
    for method, when in (("rsgdm implicit", 0), ("rsgdm explicit", 3), ("sgdm", 3)):
        model, opt = build(method)
        train(model, opt, 1, when)
        opt.param_groups[0]["momentum"] = 0.5
        train(model, opt, when + 1, 6)


def test_a_policy_assigned_to_a_group_is_never_silently_ignored() -> None:
    p = parameter(3)
    opt = rf.FusedSGD([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    opt.param_groups[0]["average"] = rf.ema(0.5)
    with contextlib.suppress(ValueError, RuntimeError):  # refused, or followed
        opt.step()
        assert opt.n_averaged == 1


class Weight:
    """A custom weight that can be made to misbehave."""

    def __init__(self) -> None:
        self.value: Any = 0.5

    def __call__(self, n: int, step: int) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


WEIGHTS: dict[str, tuple[Any, type[Exception], str]] = {
    "above 1": (1.5, ValueError, r"weight\(n=.*1\.5"),
    "below 0": (-0.1, ValueError, r"weight\(n=.*-0\.1"),
    "nan": (NAN, ValueError, r"weight\(n=.*nan"),
    "None": (None, TypeError, r"weight\(n=.*None"),
    "a name": ("x", TypeError, r"weight\(n=.*'x'"),
    "two numbers": (TWO, TypeError, r"weight\(n=.*tensor"),
    "raises": (KeyError("mine"), KeyError, "mine"),
}


@pytest.mark.parametrize("write_back", [0, 1, 2])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_custom_weight_gone_bad_costs_no_sample(kind: str, write_back: int) -> None:
    value, error, words = WEIGHTS[kind]
    ends = []
    for bad in (True, False):
        weight = Weight()
        model = Model()
        opt = rf.FusedSGD(
            groups(model),
            lr=0.1,
            momentum=0.9,
            average=rf.Average(weight, write_back_every=write_back),
        )
        train(model, opt, 1, 3)
        if bad:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            weight.value = value
            before = snapshot(opt)
            for _ in range(2):
                with pytest.raises(error, match=words):
                    opt.step()
                assert snapshot(opt) == before
            weight.value = 0.5
        train(model, opt, 4, 8)
        ends.append(result(opt))
    assert ends[0] == ends[1]
    assert ends[0]["n_averaged"] == 8


@pytest.mark.parametrize("method", ["sgd", "rsgdm explicit", "lookahead"])
@pytest.mark.parametrize("bad", ["gradient", "second group"])
def test_a_momentum_switched_on_in_a_refused_step_is_on_in_the_next(method: str, bad: str) -> None:
    ends = []
    for meets_it in (True, False):
        model, opt = build(method)
        first, second = opt.param_groups
        first["momentum"] = second["momentum"] = 0.0
        train(model, opt, 1, 3)
        first["momentum"] = 0.5
        if meets_it:
            feed(model, 4)
            if bad == "gradient":
                sparse(Spoiled(model, opt))
            else:
                second["lr"] = -1
            before = snapshot(opt)
            for _ in range(2):
                with pytest.raises((RuntimeError, ValueError), match=r"sparse|learning rate"):
                    opt.step()
                assert snapshot(opt) == before
            second["lr"] = first["lr"]
            model.zero_grad()
        train(model, opt, 4, STEPS)
        ends.append(result(opt))
    assert ends[0] == ends[1]


def test_a_closure_that_raises_costs_no_step() -> None:
    def closure() -> float:
        raise KeyError("mine")

    model, opt = build("lookahead")
    train(model, opt, 1, 6)
    before = snapshot(opt)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(KeyError, match="mine"):
                opt.step(closure)
            assert torch.is_grad_enabled() == grad
    assert snapshot(opt) == before


# ---- parameters that were re-pointed badly -----------------------------------------------------


def repointed(make: Callable[[Tensor], Tensor]) -> Callable[[Spoiled], Call]:
    """Points a parameter elsewhere, with a gradient to match; calling what it returns mends it."""

    def spoil(run: Spoiled) -> Call:
        p, old = run.p, run.p.data

        def point(data: Tensor) -> None:
            p.grad = None
            p.grad_dtype = data.dtype
            p.data = data
            p.grad = torch.ones_like(p)

        point(make(old))
        return lambda: point(old)

    return spoil


REPOINTED: dict[str, tuple[Callable[[Spoiled], Call], str]] = {
    "complex": (repointed(lambda t: t.to(torch.complex64)), "parameter 1.*complex64"),
    "8-bit": (repointed(lambda t: t.to(torch.float8_e4m3fn)), "parameter 1.*float8"),
    "expanded": (
        repointed(lambda t: torch.ones(1, 1, 1, 1).expand(t.shape)),
        "parameter 1.*expand",
    ),
    "another shape": (repointed(lambda t: torch.ones(5)), r"parameter 1.*\(5,\)"),
}


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("kind", REPOINTED)
def test_a_parameter_that_became_unfit_is_named_and_can_come_back(kind: str, method: str) -> None:
    spoil, words = REPOINTED[kind]
    refused(method, spoil, (ValueError, TypeError, RuntimeError), words, (2, 6))


def test_a_conversion_that_the_policy_forbids_can_be_undone() -> None:
    ends = []
    for bad in (True, False):
        model = Model()
        policy = rf.Average(rf.Ema(0.5), dtype=torch.float32)
        members = groups(model)
        members[1]["average"] = policy
        opt = rf.FusedSGD(members[::-1], lr=0.1, momentum=0.9, average=policy)
        train(model, opt, 1, 4)
        opt.zero_grad()
        if bad:
            model.matrix.data = model.matrix.data.double()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            before = snapshot(opt)
            for _ in range(2):
                with pytest.raises(ValueError, match=r"dtype.*float32.*float64 parameter"):
                    opt.step()
                assert snapshot(opt) == before
            opt.zero_grad()
            model.matrix.data = model.matrix.data.float()
        train(model, opt, 5, 8)
        ends.append(result(opt))
    assert ends[0] == ends[1]


# ---- numbers that are not finite ---------------------------------------------------------------

SPREAD: dict[str, Rule] = {
    # An infinite weight less its decay is infinite in torch, which multiplies it by one number less
    # than 1, and NaN here; so it is in SGDW.
    **{
        name: replace(rule, options={**rule.options, "weight_decay": 0.0})
        if rule.cls is rf.FusedAdamW
        else rule
        for name, rule in OF_TORCH.items()
    },
    "all of it damped": replace(OF_TORCH["momentum"], options={"momentum": 0.9, "dampening": 1.0}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BAD = {1: INF, 2: -INF, 7: NAN, 18: INF, 1030: NAN, 1036: -INF}


def kinds(tensor: Tensor) -> list[int]:
    """0 for a finite element, 1 for inf, -1 for -inf, 2 for nan."""
    x = tensor.detach().double()
    return (torch.isposinf(x).int() - torch.isneginf(x).int() + 2 * x.isnan().int()).tolist()


@pytest.mark.parametrize("lr", [0.1, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", SPREAD.values(), ids=SPREAD)
def test_infinities_and_nans_spread_as_far_as_in_torch(
    rule: Rule, dtype: torch.dtype, lr: float
) -> None:
    assert rule.torchs is not None
    runs = []
    for cls, more in ((rule.cls, {}), (rule.torchs, {"foreach": False})):
        p = nn.Parameter(torch.linspace(-1, 1, 1037).to(dtype))
        with torch.no_grad():
            p[20], p[21] = INF, NAN
        opt = cls([p], **{**rule.options, "lr": lr, **more})
        states = []
        for step in range(4):
            p.grad = torch.linspace(1, -1, 1037).to(dtype)
            if step == 1:
                for i, value in BAD.items():
                    p.grad[i] = value
            if step == 2:
                p.grad[7], p.grad[18] = 1.0, -INF  # finite again; the other infinity
            opt.step()
            held = {k: v for k, v in opt.state[p].items() if v is not None}
            if "exp_avg" in held:  # torch's lerp of an infinity is NaN, ours infinite
                held["exp_avg"] = torch.where(held["exp_avg"].isfinite(), 0.0, NAN)
            states.append((kinds(p), [kinds(v) for v in held.values()]))
        runs.append(states)
    assert runs[0] == runs[1]
    assert 2 in runs[0][1][0] and 2 in runs[0][-1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_one_infinite_gradient_harms_its_own_element_only(method: str, dtype: torch.dtype) -> None:
    runs = []
    for bad in (True, False):
        model = nn.Module()
        model.p = nn.Parameter(torch.linspace(-1, 1, 1037).to(dtype))
        opt = METHODS[method](model.parameters())
        for step in range(1, STEPS + 1):
            model.p.grad = torch.linspace(1, -1, 1037).mul(step).to(dtype)
            if bad and step == 6:
                model.p.grad[18] = INF
            opt.step()
        held = opt.state.get(model.p, {}).items()
        runs.append([model.p.detach(), *(value for key, value in held if key != "step")])
    for harmed, whole in zip(*runs, strict=True):
        assert not harmed[18].isfinite()
        rest = torch.arange(1037) != 18
        assert bits(harmed[rest]) == bits(whole[rest])
        assert whole.isfinite().all()


# ---- a policy that never samples ---------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        rf.mean(start=10**12),
        rf.ema(every=10**12),
        rf.swa(start=10**12, initial="current"),
        rf.rbwa(10**9, 10**6),
        rf.rbwa(10**9, 10**6, "algorithm2"),
        rf.switch_ema(steps_per_epoch=2**62),
    ],
    ids=str,
)
def test_a_policy_that_never_samples_is_no_policy(policy: rf.Average) -> None:
    ends = []
    for average in (policy, None):
        model = Model()
        opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=average)
        train(model, opt, 1, 5)
        with opt.averaged():
            pass
        ends.append([bits(p) for p in model.parameters()])
        never = policy.every > 1 or policy.start > 0
        assert opt.n_averaged == (0 if never or average is None else 5)
        averaged = [bits(v) for v in opt.averaged_state_dict(model).values()]
        assert averaged == ends[-1] or not never
        again = Model()
        opt2 = rf.FusedSGD(again.parameters(), lr=0.1, momentum=0.9, average=average)
        opt2.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert ends[0] == ends[1]


# ---- checkpoints that do not fit ---------------------------------------------------------------

Saved = dict[str, Any]


def simple(average: rf.Average | None = None, cls: Any = rf.FusedSGD, **options: Any) -> Any:
    options = {"lr": 0.1, "momentum": 0.9, **options}
    shapes = options.pop("shapes", [(4,), (2, 3)])
    dtype = options.pop("dtype", torch.float32)
    split = options.pop("split", False)
    params: list[Any] = [parameter(*shape, dtype=dtype) for shape in shapes]
    members = [{"params": [p]} for p in params] if split else params
    opt = cls(members, average=average, **options)
    for step in range(3):
        for p in params:
            p.grad = torch.full_like(p, step + 1.0)
        opt.step()
    return opt


def edited(change: Callable[[Saved], Any], average: rf.Average | None = None) -> Call:
    def make() -> Saved:
        saved = copy.deepcopy(simple(rf.ema(0.5) if average is None else average).state_dict())
        change(saved)
        return saved

    return make


def saved_by(*args: Any, **options: Any) -> Call:
    return lambda: simple(*args, **options).state_dict()


def first(key: str, value: Any) -> Callable[[Saved], Any]:
    return lambda saved: saved["state"][0].update({key: value})


def group(key: str, value: Any) -> Callable[[Saved], Any]:
    return lambda saved: saved["param_groups"][0].update({key: value})


def put(*path: Any, value: Any) -> Call:
    """A checkpoint with another value in it."""

    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return edited(change)


def without(*path: Any) -> Call:
    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return edited(change)


def renamed(key: Any) -> Call:
    """The first parameter's state under another key."""
    return edited(lambda saved: saved["state"].update({key: saved["state"].pop(0)}))


def this(value: Any) -> Call:
    return lambda: value


EMA = rf.ema(0.5)
GROUP = ("param_groups", 0)
# what is loaded in place of a state dict, and what the error must say
FOREIGN: dict[str, tuple[Call, str]] = {
    "nothing": (this({}), r"state_dict: no 'state'.* \[\]"),
    "None": (this(None), "state_dict: None"),
    "a list": (this([1, 2]), r"state_dict: \[1, 2\]"),
    "a path": (this("last.pt"), "state_dict: 'last.pt'"),
    "a tensor": (this(torch.ones(2)), "state_dict: tensor"),
    "state alone": (this({"state": {}}), "no 'param_groups'.*'state'"),
    "groups alone": (this({"param_groups": []}), "no 'state'.*'param_groups'"),
    "of no group": (this({"state": {}, "param_groups": []}), "number of parameter groups"),
    "of a model": (lambda: nn.Linear(2, 2).state_dict(), "no 'state'.*'weight', 'bias'"),
    "the whole file": (lambda: {"model": {}, "opt": saved_by(EMA)()}, "no 'state'.*'model', 'opt'"),
    "groups None": (put("param_groups", value=None), "param_groups.*None"),
    "groups by number": (put("param_groups", value={0: {}}), "param_groups.*{0: {}}"),
    "a group None": (put(*GROUP, value=None), "param group 0.*None"),
    "a group of pairs": (put(*GROUP, value=[("params", [0, 1])]), "param group 0.*'params'"),
    "without params": (without(*GROUP, "params"), "param group 0.*no 'params'.*'lr'"),
    "params None": (put(*GROUP, "params", value=None), "params of param group 0.*None"),
    "params a number": (put(*GROUP, "params", value=2), "params of param group 0.*2"),
    "params a text": (put(*GROUP, "params", value="ab"), "params of param group 0.*'ab'"),
    "params unordered": (put(*GROUP, "params", value={0, 1}), "params of param group 0.*{0, 1}"),
    "params lists": (put(*GROUP, "params", value=[[0], [1]]), r"params of param group 0.*\[0\]"),
    "params tensors": (
        put(*GROUP, "params", value=[torch.ones(4), torch.ones(2, 3)]),
        "params of param group 0.*tensor",
    ),
    "a parameter twice": (put(*GROUP, "params", value=[0, 0]), "params.*0 is named twice"),
    "other numbers": (put(*GROUP, "params", value=[5, 6]), r"state.*of 0,.*\[5, 6\]"),
    "names a number": (put(*GROUP, "param_names", value=1), "param_names.*1"),
    "names too few": (put(*GROUP, "param_names", value=["w"]), r"param_names.*\['w'\].*2"),
    "names that are none": (put(*GROUP, "param_names", value=[0, 1]), r"param_names.*\[0, 1\]"),
    "state None": (put("state", value=None), "state.*None"),
    "state a list": (put("state", value=[{}, {}]), r"state.*\[{}, {}\]"),
    "state of one None": (put("state", 0, value=None), "state of parameter 0.*None"),
    "state of one a tensor": (put("state", 0, value=torch.ones(4)), "state of parameter 0.*tensor"),
    "state of one a list": (put("state", 0, value=[1.0]), r"state of parameter 0.*\[1.0\]"),
    "state by name": (renamed("weight"), r"state.*'weight'.*\[0, 1\]"),
    "state by text, as JSON has it": (renamed("0"), r"state.*'0'.*\[0, 1\]"),
    "state by tensor": (renamed(torch.ones(1)), r"state.*tensor.*\[0, 1\]"),
    "state of None": (renamed(None), r"state.*None.*\[0, 1\]"),
    "state of a third": (put("state", 2, value={"average": torch.ones(4)}), r"state.*2.*\[0, 1\]"),
    **{
        f"{key} {count}": (put(*GROUP, key, value=count), f"{key}.*{count}")
        for key in ("step", "n_averaged")
        for count in (True, False, -1, 2.0, NAN, INF, "3", 2**63)
    },
    **{
        f"{key} {value}": (put(*GROUP, key, value=value), f"{words}.*{value}")
        for key, words in {
            "lr": "(lr|learning rate)",
            "momentum": "momentum",
            "weight_decay": "weight_decay",
            "dampening": "dampening",
        }.items()
        for value in (None, "0.1", NAN, 1j, {})
    },
    **{
        f"{key} {value}": (put(*GROUP, key, value=value), f"{key}.*{value}")
        for key in ("nesterov", "maximize")
        for value in ("no", NAN, 0.5)
    },
    "lr too large": (put(*GROUP, "lr", value=10**400), "lr.*1000"),
    **{
        f"implicit_momentum {value}": (
            put(*GROUP, "implicit_momentum", value=value),
            f"implicit_momentum.*{value}",
        )
        for value in (0.5, True, "0.9")
    },
}
# what the optimizer averages, the checkpoint, what the error must say
CHECKPOINTS: dict[str, tuple[rf.Average | None, Call, str]] = {
    "other shapes": (EMA, saved_by(EMA, shapes=[(5,), (2, 3)]), r"parameter 0.*\(5,\).*\(4,\)"),
    "transposed": (EMA, saved_by(EMA, shapes=[(4,), (3, 2)]), r"parameter 1.*\(3, 2\).*\(2, 3\)"),
    "as many elements": (None, saved_by(shapes=[(4,), (6,)]), r"parameter 1.*\(6,\).*\(2, 3\)"),
    "fewer parameters": (EMA, saved_by(EMA, shapes=[(4,)]), "doesn't match the size"),
    "more groups": (EMA, saved_by(EMA, split=True), "different number of parameter groups"),
    "another kind": (EMA, saved_by(rf.mean()), "average.*Mean.*Ema"),
    "another kind of count": (
        rf.rbwa(2, 0),
        saved_by(rf.rbwa(2, 0, "algorithm2")),
        "average.*Algorithm2.*Mean",
    ),
    "another write-back": (
        EMA,
        saved_by(rf.switch_ema(0.5, steps_per_epoch=3)),
        "write_back_every",
    ),
    "write-back at each sample": (
        rf.switch_ema(0.5, steps_per_epoch=3),
        saved_by(rf.rbwa_e(0.5, steps_per_epoch=1, start_epoch=0)),
        "write_back_every=1.*write_back_every=3",
    ),
    "another initial": (
        rf.swa(1, 1, "current"),
        saved_by(rf.swa(1, 1)),
        "initial='first_sample'.*initial='current'",
    ),
    "another dtype": (
        EMA,
        saved_by(rf.Average(rf.Ema(0.5), dtype=torch.float32)),
        "dtype=torch.float32.*dtype=None",
    ),
    "an average, but no policy": (None, saved_by(EMA), "average.*Ema.*None"),
    "wider weights": (EMA, saved_by(EMA, dtype=torch.float64), "average.*float64.*float32"),
    "averages missing": (
        EMA,
        edited(lambda saved: [held.pop("average") for held in saved["state"].values()]),
        "parameter 0.*average",
    ),
    "averages missing after one sample": (
        EMA,
        edited(
            lambda saved: (
                [held.pop("average") for held in saved["state"].values()],
                group("n_averaged", 1)(saved),
            )
        ),
        "counts 1 samples, but parameter 0",
    ),
    "averages without a policy of theirs or ours": (
        None,
        edited(group("average", None)),
        "average for parameter 0",
    ),
    "rule": (None, saved_by(cls=rf.RSGDM), "rule.*'rsgdm_implicit'.*'sgd'"),
    "explicit rule": (
        None,
        saved_by(cls=rf.RSGDM, difference="explicit"),
        "rule.*'rsgdm_explicit'.*'sgd'",
    ),
    "baseline rule": (None, saved_by(cls=rf.RSGDM, difference=None), "rule.*'sgdm'.*'sgd'"),
    "unknown rule": (EMA, edited(group("rule", "adam")), "rule.*'adam'"),
    "unknown average": (EMA, edited(group("average", "moving")), "average.*'moving'"),
    "average is no text": (EMA, edited(group("average", 3)), "average.*3"),
    "a bad lr": (EMA, edited(group("lr", -1)), "^Invalid learning rate: -1$"),
    "a bad momentum": (EMA, edited(group("momentum", -1)), "^Invalid momentum value: -1$"),
    "a count that is none": (EMA, edited(group("n_averaged", "many")), "n_averaged.*'many'"),
    "a count below 0": (EMA, edited(group("n_averaged", -1)), "n_averaged.*-1"),
    "a step that is none": (EMA, edited(group("step", "last")), "step.*'last'"),
    "momentum is a number": (EMA, edited(first("momentum_buffer", 3.0)), "momentum_buffer.*3.0"),
    "momentum is sparse": (
        EMA,
        edited(first("momentum_buffer", torch.ones(4).to_sparse())),
        "momentum_buffer.*sparse",
    ),
    "momentum is complex": (
        EMA,
        edited(first("momentum_buffer", torch.ones(4) * 1j)),
        "momentum_buffer.*complex64",
    ),
    "momentum is on meta": (
        EMA,
        edited(first("momentum_buffer", torch.ones(4, device="meta"))),
        "momentum_buffer.*meta",
    ),
    "average is bfloat16": (EMA, edited(first("average", torch.ones(4).bfloat16())), "average.*bf"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_checkpoint_is_refused_in_a_line_and_changes_nothing(name: str) -> None:
    make, words = FOREIGN[name]
    opt, twin = simple(EMA), simple(EMA)
    before = snapshot(opt)
    with pytest.raises((ValueError, TypeError), match=words) as refusal:
        opt.load_state_dict(make())
    assert refusal.traceback[-1].path.parent == Path(rf.__file__).parent  # our words, not Python's
    assert "\n" not in str(refusal.value)
    assert snapshot(opt) == before
    for o in (opt, twin):
        for p in o.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        o.step()
    assert result(opt) == result(twin)


@pytest.mark.parametrize("value", [True, -0.5, 1.0, NAN, "0.9", 2])
def test_implicit_rsgdm_refuses_a_momentum_that_it_could_not_have_started_with(value: Any) -> None:
    opt = simple(cls=rf.RSGDM)
    saved = copy.deepcopy(opt.state_dict())
    assert saved["param_groups"][0]["implicit_momentum"] == 0.9
    saved["param_groups"][0]["implicit_momentum"] = value
    before = snapshot(opt)
    with pytest.raises(ValueError, match=f"implicit_momentum.*{value}"):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


def test_what_a_user_keeps_in_the_state_beside_the_parameters_is_kept_as_in_torch() -> None:
    for cls in (rf.FusedSGD, torch.optim.SGD):
        opt = cls([parameter(4)], lr=0.1)
        opt.state["seen"] = {"images": 3}
        again = cls([parameter(4)], lr=0.1)
        again.load_state_dict(opt.state_dict())
        assert again.state["seen"] == {"images": 3}


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(name: str, started: bool) -> None:
    average, make, words = CHECKPOINTS[name]
    saved = make()
    opt, twin = simple(average), simple(average)
    if not started:
        opt, twin = (
            type(o)([parameter(4), parameter(2, 3)], 0.1, 0.9, average=average) for o in (opt, twin)
        )
    before = snapshot(opt)
    with pytest.raises((ValueError, TypeError), match=words):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before
    for o in (opt, twin):
        for p in o.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        o.step()
    assert result(opt) == result(twin)
    opt.load_state_dict(simple(average).state_dict())
    assert opt.n_averaged == simple(average).n_averaged


def test_explicit_rsgdm_refuses_half_of_its_buffers() -> None:
    opt = simple(cls=rf.RSGDM, difference="explicit")
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][1]["previous_gradient"]
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"parameter 1.*previous_gradient"):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


def test_a_warning_turned_into_an_error_leaves_everything_as_it_was() -> None:
    saved = simple(rf.ema(0.9)).state_dict()
    opt = simple(rf.ema(0.5))
    before = snapshot(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"decay=0\.9.*decay=0\.5"):
            opt.load_state_dict(saved)
    assert snapshot(opt) == before
