"""A step, a rebuild, a new group and averaged() that are interrupted at any line, or run out of
memory at any allocation: trained on, they come to what a run comes to in which nothing happened."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from runs import STEPS, build, feed, result, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rbwa_fused as rf

OURS = (str(Path(rf.__file__).parent), str(Path(torch.optim.__file__).parent / "optimizer.py"))
FULL = os.environ.get("RBWA_PROFILE") == "long"
Run = tuple[Any, Any]  # a model and its optimizer


class Line:
    """Interrupts the n-th line that is run of the package, or of torch.optim.Optimizer.

    Attributes:
        seen: which lines were run, in their order.
    """

    def __init__(self, n: int) -> None:
        self.left, self.fired = n, False
        self.seen: list[tuple[str, int]] = []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *raised: Any) -> None:
        sys.settrace(self._before)


class Allocation(TorchDispatchMode):
    """Lets the n-th operation that makes a tensor fail."""

    MAKING = ("empty", "clone", "zeros", "ones", "full", "_to_copy", "cat", "stack")

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left, self.fired = n, False
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1].startswith(self.MAKING):
            self.seen.append(func._schema.name)
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


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
    """The numbers of those that are tried: of each line the first time and the last that it is run,
    and every allocation."""
    run, counting = ready(case, method), disturbance(-1)
    with counting:
        case.act(run)
    seen = counting.seen
    if disturbance is Allocation or FULL:
        return list(range(1, len(seen) + 1))
    first = {line: n for n, line in reversed(list(enumerate(seen, 1)))}
    last = {line: n for n, line in enumerate(seen, 1)}
    return sorted({*first.values(), *last.values()})


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
