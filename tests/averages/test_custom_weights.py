"""A policy's own function: what a checkpoint remembers of it, and what it can tell from another."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import scheduled
from torch import nn

import rbwa_fused as rf
from rbwa_fused.average import same, structure
from rbwa_fused.fingerprint import INTERPRETER, alike, fingerprint

RATE = 0.5


def by_global(n: int, step: int) -> float:
    """What is written here is no part of it."""
    return RATE / n


def by_default(n: int, step: int, rate: float = 0.5) -> float:
    return rate / n


def closing(rate: Any) -> Callable[[int, int], float]:
    def weight(n: int, step: int) -> float:
        return rate[min(n, len(rate) - 1)] if isinstance(rate, list) else rate / n

    return weight


def recursive(rate: float) -> Callable[[int, int], float]:
    def weight(n: int, step: int) -> float:
        return rate if n < 2 else weight(n - 1, step) / 2

    return weight


class Ramp:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, n: int, step: int) -> float:
        return self.rate / n


class Trainer:
    """Goes on changing while its method stays the same function."""

    def __init__(self) -> None:
        self.epoch = 0

    def weight(self, n: int, step: int) -> float:
        return 0.5


def renamed(function: Callable[[int, int], float], name: str) -> Callable[[int, int], float]:
    function.__qualname__ = name
    return function


PAIRS: dict[str, tuple[Any, Any]] = {
    "lambdas": (lambda n, step: 0.5, lambda n, step: 0.25),
    "operators": (lambda n, step: n / step, lambda n, step: n % step),
    "attributes": (lambda n, step: n.real / 9, lambda n, step: n.imag / 9),
    "inner functions": (
        lambda n, step: max([i / 9 for i in range(n)]),
        lambda n, step: max([i / 8 for i in range(n)]),
    ),
    "closures": (closing(0.5), closing(0.25)),
    "tables": (closing([1.0, 0.5]), closing([1.0, 0.25])),
    "recursive": (recursive(0.5), recursive(0.25)),
    "decorated": (functools.wraps(scheduled)(closing(0.5)), functools.wraps(scheduled)(closing(1))),
    "partials": (functools.partial(by_default, rate=0.5), functools.partial(by_default, rate=1.0)),
    "instances": (Ramp(0.5), Ramp(0.25)),
    "options": (by_default, renamed(lambda n, step, rate=0.25: rate / n, by_default.__qualname__)),
}


class Echo:
    """Has whatever it is asked for, as some configurations and proxies do."""

    def __getattr__(self, name: str) -> Echo:
        return Echo()

    def __call__(self, n: int, step: int) -> float:
        return 0.5


class Sulking:
    """Raises where it is asked for what it has not, and has a word in what it has."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no attributes here")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")

    def __call__(self, n: int, step: int) -> float:
        return 0.5


class Boasting(float):
    def __repr__(self) -> str:
        return f"{float(self)} at {id(self)}"


class Hiding(list[float]):
    def __iter__(self) -> Any:
        raise RuntimeError("not to be read")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def doubled(depth: int) -> Callable[[int, int], float]:
    """A function that reaches one function in 2^depth ways."""
    weight: Any = by_default
    for _ in range(depth):
        weight = (lambda f, g: lambda n, step: (f(n, step) + g(n, step)) / 2)(weight, weight)
    result: Callable[[int, int], float] = weight
    return result


ODD: dict[str, Callable[[], Any]] = {
    "keys by address": lambda: closing({by_default: 1, object(): 2}),
    "keys in the order of hashes": lambda: closing({frozenset("abcdefgh"): 1}),
    "a set": lambda: closing(set("abcdefgh")),
    "a number's own text": lambda: closing(Boasting(0.5)),
    "a long number": lambda: closing(10**5000),
    "a list's own iterator": lambda: closing(Hiding([0.5])),
    "any attribute": Echo,
    "closes over any attribute": lambda: closing(Echo()),
    "no attribute": Sulking,
    "closes over no attribute": lambda: closing(Sulking()),
    "a builtin": lambda: max,
    "deep": lambda: closing(nested(5000)),
    "deep functions": lambda: doubled(40),
    "long": lambda: closing([0.5] * 1_000_000),
}


def fingerprints() -> list[str]:
    odd = [fingerprint(weight()) for weight in ODD.values()]
    return odd + [fingerprint(weight) for pair in PAIRS.values() for weight in pair]


def average(weight: Any, name: str | None = "ramp") -> rf.Average:
    return rf.Average(weight, name=name)


def loaded(source: Any, into: Any) -> list[str]:
    """The warnings of a checkpoint that is loaded under another policy."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=0.1, average=source)
    p.grad = torch.ones(3)
    opt.step()
    again = rf.FusedSGD([q], lr=0.1, average=into)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again.load_state_dict(opt.state_dict())
    assert again.n_averaged == 1
    return [str(w.message) for w in seen]


@pytest.mark.parametrize("name", ["ramp", None])
@pytest.mark.parametrize("pair", PAIRS)
def test_another_function_of_the_same_name_warns_once(pair: str, name: str | None) -> None:
    left, right = (average(weight, name) for weight in PAIRS[pair])
    assert loaded(left, left) == [] and loaded(right, right) == []
    seen = loaded(left, right)
    assert len(seen) == 1 and left.describe() in seen[0] and right.describe() in seen[0]


def test_a_global_that_a_function_reads_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = average(by_global).describe()
    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.25)
    assert not same(before, average(by_global).describe())
    monkeypatch.setattr(sys.modules[__name__], "OTHER", 0.25, raising=False)
    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.5)
    assert same(before, average(by_global).describe())


def test_a_function_is_the_same_whatever_was_done_with_it_before() -> None:
    before = fingerprint(by_global)
    for n in range(1, 2000):  # the interpreter specialises its code
        by_global(n, n)
    assert fingerprint(by_global) == before
    trainer = Trainer()
    before = fingerprint(trainer.weight)
    trainer.epoch = 7
    assert fingerprint(trainer.weight) == before


def test_a_function_is_the_same_in_another_process() -> None:
    code = "import test_custom_weights as t; print(t.fingerprints())"
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, [Path(rf.__file__).parents[1], here.parent, here]))
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert printed.strip() == str(fingerprints())


@pytest.mark.parametrize("name", ODD)
def test_a_state_dict_neither_fails_nor_waits_for_what_a_function_holds(name: str) -> None:
    weight = ODD[name]()
    begun = time.process_time()
    fingerprint(weight)
    assert time.process_time() - begun < 1.0  # 0.1 at most; some never ended, or took seconds
    policy = average(weight)
    assert structure(policy.describe())[0] == "<ramp>"
    assert loaded(policy, policy) == []
    assert structure(rf.Average(weight).describe()) == structure(rf.Average(weight).describe())


def test_a_function_that_holds_too_much_is_believed() -> None:
    left, right = (average(closing([rate] * 20_000)) for rate in (0.5, 0.25))
    assert loaded(left, right) == [] and "code=" not in left.describe()


def test_a_name_finds_a_function_that_was_moved() -> None:
    before, after = average(renamed(closing(0.5), "old.place")), average(closing(0.5))
    assert loaded(before, after) == []
    unnamed = rf.Average(renamed(closing(0.5), "old.place"))
    with pytest.raises(ValueError, match=r"name='test_custom_weights\.old\.place' says so"):
        loaded(unnamed, after)
    assert loaded(unnamed, average(closing(0.5), "test_custom_weights.old.place")) == []
    with pytest.raises(ValueError, match=r"<test_custom_weights\.closing\.<locals>\.weight>"):
        loaded(rf.ema(0.5), rf.Average(closing(0.5)))


def test_checkpoints_that_say_nothing_of_the_code_are_believed() -> None:
    policy = rf.Average(scheduled, start=2)
    older = (
        "Average(<runs.scheduled>, start=2, every=1, write_back_every=0, "
        "initial='first_sample', dtype=None)"
    )
    assert structure(older) == structure(policy.describe()) and same(older, policy.describe())
    assert not same(older.replace("start=2", "start=3"), policy.describe())
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=0.1, average=policy)
    saved = opt.state_dict()
    saved["param_groups"][0]["average"] = older
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)


def test_digests_of_another_interpreter_say_nothing() -> None:
    assert alike(f"{INTERPRETER}-00000000", "cpython310-11111111")
    assert not alike(f"{INTERPRETER}-00000000", f"{INTERPRETER}-11111111")


@pytest.mark.parametrize("name", ["", "a,b", "f(x)", "a=1", "two\nlines", 3])
def test_a_name_that_a_checkpoint_could_not_give_back_is_refused(name: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Invalid name"):
        rf.Average(scheduled, name=name)


def test_only_a_function_takes_a_name() -> None:
    with pytest.raises(ValueError, match=r"Invalid name: 'mine' .*Mean\(\) names itself"):
        rf.Average(rf.mean().weight, name="mine")


@pytest.mark.parametrize("name", ["ramp", "a <b> c", "läuft.langsam-1"])
def test_a_name_is_read_back_from_a_checkpoint(name: str) -> None:
    policy = rf.Average(scheduled, start=3, write_back_every=4, name=name)
    assert structure(policy.describe()) == (f"<{name}>", "rarely", "'first_sample'", "None")
    assert f"Average(<{name}>, start=3" in policy.describe()


def test_a_named_policy_is_pickled_and_compared_whole() -> None:
    policy = rf.Average(scheduled, name="ramp")
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy != rf.Average(scheduled, name="other") and policy != rf.Average(scheduled)
    assert len({policy, rf.Average(scheduled, name="ramp")}) == 1
