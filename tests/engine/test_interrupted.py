"""A step, a rebuild, a new group and averaged() that are interrupted at any line, or run out of
memory at any allocation: trained on, they come to what a run comes to in which nothing happened."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from interrupts import FULL, Allocation, Line, tried
from runs import STEPS, build, feed, result, train
from torch import nn

Run = tuple[Any, Any]  # a model and its optimizer


def started(method: str, steps: int, **options: Any) -> Run:
    model, opt = build(method, **options)
    train(model, opt, 1, steps)
    return model, opt


def stepped(run: Run) -> None:
    run[1].step()


def added(run: Run) -> None:
    model, opt = run
    opt.add_param_group({"params": [model.extra], "lr": 0.5})


def evaluated(run: Run) -> None:
    with run[1].averaged():
        pass


def dropped(run: Run) -> None:
    """Entered, and not left: the weights come back where the context is collected."""
    context = run[1].averaged()
    context.__enter__()


def converted(run: Run) -> None:
    """Gives the tables reasons to be made anew."""
    opt = run[1]
    for p in opt.param_groups[0]["params"][:2]:
        p.data = p.data.clone()
        opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}
    first = opt.param_groups[0]["params"][0]
    first.data = first.data.double()
    first.grad = first.grad.double()


def with_extra(run: Run) -> None:
    run[0].extra = nn.Parameter(torch.linspace(-1, 1, 9))


class Case(NamedTuple):
    """What is interrupted, after so many steps, behind a preparation."""

    steps: int
    prepare: Callable[[Run], None]
    act: Callable[[Run], None]


CASES = {
    "first step": Case(0, lambda run: None, stepped),
    "third step": Case(2, lambda run: None, stepped),
    "step with a rebuild": Case(8, converted, stepped),
    "new group": Case(8, with_extra, added),
    "averaged": Case(9, lambda run: None, evaluated),
    "averaged, and dropped": Case(9, lambda run: None, dropped),
}
FEW = ("rsgdm implicit", "rsgdm explicit lookahead", "ema")
MANY = ("momentum", "mean, written back rarely", "rbwa", *FEW)


def ready(case: Case, method: str) -> Run:
    run = started(method, case.steps)
    feed(run[0], case.steps + 1)
    case.prepare(run)
    return run


def end(case: Case, run: Run) -> Any:
    """The rest of a run, the interrupted step taken."""
    model, opt = run
    if case.act is not stepped:
        opt.step()
    for step in range(case.steps + 2, STEPS + 1):
        feed(model, step)
        opt.step()
    return result(opt)


def again(case: Case, run: Run) -> None:
    """Does once more what did not come to its end, as a program that goes on would."""
    opt = run[1]
    if case.act is stepped and opt.state_dict()["param_groups"][0]["step"] == case.steps:
        opt.step()
    if case.act is added and len(opt.param_groups) == 2:
        case.act(run)


def events(disturbance: Any, case: Case, method: str) -> list[int]:
    run, counting = ready(case, method), disturbance(-1)
    with counting:
        case.act(run)
    return tried(disturbance, counting.seen)


@pytest.mark.parametrize("method", MANY if FULL else FEW)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("disturbance", [Line, Allocation])
def test_whatever_fails_and_wherever_another_attempt_comes_to_the_same(
    disturbance: Any, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line each time that it is run, and more methods, with RBWA_PROFILE=long."""
    # pytest's would keep an interrupt of a `__del__`, and with it the object.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    case = CASES[name]
    undisturbed = ready(case, method)
    case.act(undisturbed)
    expected = end(case, undisturbed)
    numbers = events(disturbance, case, method)
    fired = 0
    for n in numbers:
        run, event = ready(case, method), disturbance(n)
        try:
            with event:
                case.act(run)
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            assert case.act is not added or len(run[1].param_groups) == 2, event.seen[-1]
        fired += event.fired  # also where it was swallowed
        assert torch.is_grad_enabled(), event.seen[-1]
        again(case, run)
        assert end(case, run) == expected, (n, event.seen[-1])
    print(f"{name}, {method}: {fired} places")
    assert fired >= 0.95 * len(numbers)  # the order within sets is no two runs' the same
    assert fired > 20 or disturbance is Allocation
    assert fired > 0 or name in ("third step", "averaged", "averaged, and dropped")
