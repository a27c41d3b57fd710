"""A step that a device counts, and a look at its counts, interrupted at any line of the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import Line, tried
from rules import RULES
from test_update import state_of
from torch import nn

import rbwa_fused as rf

pytestmark = pytest.mark.usefixtures("emulated_cuda")

Run = tuple[Any, list[nn.Parameter]]
STEPS = 5


def feed(run: Run, step: int) -> None:
    for i, p in enumerate(run[1]):
        p.grad = torch.full_like(p, 0.1 * i - step)


def ready(rule: str, steps: int) -> Run:
    """After so many steps, with others in the groups' hyperparameters than the device was told."""
    ps = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 7)]
    opt = RULES[rule].made(
        [{"params": ps[:1]}, {"params": ps[1:]}],
        lr=torch.tensor(0.1),
        average=rf.ema(0.5),
        backend="cuda",
        capturable=True,
    )
    run = opt, ps
    for step in range(steps):
        feed(run, step)
        opt.step()
    opt.param_groups[0]["weight_decay"] = 0.2
    if RULES[rule].counts is not None:
        opt.param_groups[0]["r"] = 1.0
        opt.param_groups[1]["weight_sum"] = 0.5
    feed(run, steps)
    return run


def taken(run: Run) -> int:
    step: int = run[0].state_dict()["param_groups"][0]["step"]
    return step


def end(run: Run, steps: int, act: Callable[[Run], Any]) -> Any:
    opt, ps = run
    for step in range(steps + (act is stepped), STEPS):
        feed(run, step)
        opt.step()
    state = opt.state_dict()
    kept = [t.tolist() for p in ps for _, t in sorted(state_of(opt, p).items())]
    return [p.tolist() for p in ps], kept, str(state["param_groups"])


def stepped(run: Run) -> None:
    run[0].step()


@pytest.mark.parametrize(("act", "steps"), [(stepped, 0), (stepped, 2), (taken, 2)])
@pytest.mark.parametrize("rule", ["momentum", "free sgd", "free adamw"])
def test_another_attempt_comes_to_the_same(
    rule: str, act: Callable[[Run], Any], steps: int
) -> None:
    undisturbed, seen = ready(rule, steps), Line(-1)
    with seen:
        act(undisturbed)
    expected = end(undisturbed, steps, act)
    fired = 0
    for n in tried(Line, seen.seen):
        run, line = ready(rule, steps), Line(n)
        try:
            with line:
                act(run)
        except KeyboardInterrupt:
            fired += 1
        if act is stepped and taken(run) == steps:
            act(run)
        assert end(run, steps, act) == expected, line.seen[-1]
    assert fired > 20
