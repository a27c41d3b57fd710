"""An Averager's samples that are interrupted at any line, or run out of memory at any allocation:
trained on, they come to what a run comes to in which nothing happened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from beside import as_bits
from interrupts import FULL, Allocation, Line, tried
from torch import Tensor, nn

import rbwa_fused as rf

STEPS = 12
HERE = (str(Path(rf.__file__).parent),)  # an interrupt in another optimizer's step is that one's


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=made)


class Run(NamedTuple):
    """A model, its optimizer, the averager behind its steps or beside them, and a teacher."""

    net: Net
    opt: torch.optim.Optimizer
    averager: rf.Averager
    teacher: Net | None
    hooked: bool


class Case(NamedTuple):
    """What is interrupted, after so many steps, behind a preparation."""

    steps: int
    prepare: Callable[[Run], None] = lambda run: None
    into: bool = False
    evaluates: bool = False


def replace(run: Run, new: dict[str, nn.Parameter]) -> None:
    """Puts parameters in others' places, in the module and the optimizer."""
    old = dict(run.net.named_parameters())
    for name, p in new.items():
        module, _, leaf = name.rpartition(".")
        run.net.get_submodule(module).register_parameter(leaf, p)
        if old[name] in run.opt.state:
            run.opt.state[p] = run.opt.state.pop(old[name])
    now = dict(run.net.named_parameters())
    run.opt.param_groups[0]["params"] = list(now.values())


def one_exchanged(run: Run) -> None:
    replace(run, {"last.weight": nn.Parameter(run.net.last.weight.detach().clone())})


def all_exchanged(run: Run) -> None:
    named = run.net.named_parameters()
    replace(run, {name: nn.Parameter(p.detach().clone()) for name, p in named})


def another_shape(run: Run) -> None:
    replace(run, {"last.weight": nn.Parameter(torch.ones(3, 4))})
    run.opt.state.pop(run.net.last.weight, None)


def buffers_exchanged(run: Run) -> None:
    norm = run.net.norm
    norm.running_mean, norm.running_var = torch.ones(4), torch.full((4,), 2.0)


def teacher_exchanged(run: Run) -> None:
    assert run.teacher is not None
    run.teacher.last = nn.Linear(4, 2, bias=False).requires_grad_(False)
    with torch.no_grad():
        run.teacher.last.weight.fill_(0.5)


CASES = {
    "first sample": Case(0),
    "third sample": Case(2),
    "a parameter exchanged": Case(4, one_exchanged),
    "all parameters exchanged": Case(4, all_exchanged),
    "a parameter of another shape": Case(4, another_shape),
    "buffers exchanged": Case(4, buffers_exchanged),
    "first sample into a teacher": Case(0, into=True),
    "a student's parameter exchanged": Case(4, one_exchanged, into=True),
    "a teacher's parameter exchanged": Case(4, teacher_exchanged, into=True),
    "averaged": Case(5, evaluates=True),
    "averaged, all exchanged": Case(5, all_exchanged, evaluates=True),
}
POLICIES = {
    "ema": rf.ema(0.75),
    "lookahead": rf.lookahead(2, 0.5),
    "swa current": rf.swa(3, 2, "current"),  # begins behind the third step
    "mean, late": rf.mean(start=2),
}
# By the case: whether it is hooked, and the policy.
FEW = [
    ("first sample", False, "lookahead"),
    ("first sample", True, "lookahead"),
    ("third sample", False, "swa current"),
    ("third sample", True, "swa current"),
    ("a parameter exchanged", True, "lookahead"),
    ("all parameters exchanged", False, "swa current"),
    ("a parameter of another shape", True, "ema"),
    ("buffers exchanged", True, "swa current"),
    ("first sample into a teacher", True, "ema"),
    ("a student's parameter exchanged", False, "ema"),
    ("a teacher's parameter exchanged", True, "ema"),
    ("averaged", True, "lookahead"),
    ("averaged, all exchanged", False, "ema"),
]
# With RBWA_PROFILE=long all of both, but where tables are made again, which has four thousand
# places and goes by no policy.
SAMPLES = [name for name, case in CASES.items() if case.prepare is Case(0).prepare]
ALL = dict.fromkeys([*FEW, *product(SAMPLES, [False, True], POLICIES)])
RUNS = list(ALL) if FULL else FEW


def feed(run: Run, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in run.net.parameters():
        p.grad = 0.1 * torch.randn(p.shape, generator=generator) + 0.1 * p.detach()
    for _, b in run.net.named_buffers():
        if b.is_floating_point():
            b.mul_(0.5).add_(step)


def started(case: Case, policy: rf.Average, hooked: bool) -> Run:
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    teacher = copy.deepcopy(net).requires_grad_(False) if case.into else None
    behind = opt if hooked else None
    averager = rf.Averager(net, policy, optimizer=behind, buffers=True, into=teacher)
    run = Run(net, opt, averager, teacher, hooked)
    for step in range(1, case.steps + 1):
        feed(run, step)
        taken(run)
    case.prepare(run)
    feed(run, case.steps + 1)
    if not hooked and not case.evaluates:
        opt.step()
    return run


def taken(run: Run) -> None:
    run.opt.step()
    if not run.hooked:
        run.averager.update()


def act(case: Case, run: Run) -> None:
    """What is interrupted."""
    if case.evaluates:
        with run.averager.averaged():
            pass
    elif run.hooked:
        run.opt.step()
    else:
        run.averager.update()


def again(case: Case, run: Run, before: Tensor) -> None:
    """Does once more what did not come to its end, as a program that goes on would."""
    if case.evaluates:
        return
    if run.hooked and torch.equal(run.net.first.weight, before):
        run.opt.step()
    counted = run.averager.state_dict()["param_groups"][0]["step"]
    if not run.hooked and counted == case.steps:
        run.averager.update()


def state(run: Run) -> Any:
    saved = run.averager.state_dict()
    return as_bits(
        (
            run.net.state_dict(),
            saved["param_groups"],
            [saved["state"][i] for i in sorted(saved["state"])],
            None if run.teacher is None else run.teacher.state_dict(),
            run.averager.n_averaged,
        )
    )


def end(case: Case, run: Run) -> Any:
    """What there is at once, and at the end of the run."""
    now = state(run)
    if case.evaluates:
        taken(run)
    for step in range(case.steps + 2, STEPS + 1):
        feed(run, step)
        taken(run)
    return now, state(run)


def beginning_of_the_hook(run: Run) -> tuple[str, int] | None:
    """An interrupt there, or behind the optimizer's own last line, comes before the averager can
    know of the step."""
    if not run.hooked:
        return None
    (hook,) = run.opt._optimizer_step_post_hooks.values()
    return hook.__code__.co_filename, hook.__code__.co_firstlineno + 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("name", "hooked", "policies"), RUNS)
@pytest.mark.parametrize("disturbance", [Line, Allocation])
def test_a_sample_that_fails_anywhere_is_taken_by_another_attempt(
    disturbance: Any, name: str, hooked: bool, policies: str
) -> None:
    """Every line each time that it is run with RBWA_PROFILE=long."""
    case, policy = CASES[name], POLICIES[policies]
    if case.into and policy.write_back_every:
        policy = rf.ema(0.75)
    undisturbed = started(case, policy, hooked)
    act(case, undisturbed)
    expected = end(case, undisturbed)
    counting = disturbance(-1, HERE)
    run = started(case, policy, hooked)
    with counting:
        act(case, run)
    left_out = beginning_of_the_hook(run)
    numbers = [n for n in tried(disturbance, counting.seen) if counting.seen[n - 1] != left_out]
    fired = 0
    for n in numbers:
        run, event = started(case, policy, hooked), disturbance(n, HERE)
        before = run.net.first.weight.detach().clone()
        try:
            with event:
                act(case, run)
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            pass
        fired += event.fired
        assert torch.is_grad_enabled(), event.seen[-1]
        again(case, run, before)
        assert end(case, run) == expected, (n, event.seen[-1])
    print(f"{name}, {policies}: {fired} places")
    assert fired >= 0.95 * len(numbers)
    assert fired > 20 or disturbance is Allocation


@pytest.mark.parametrize("disturbance", [Line, Allocation])
def test_an_averager_that_cannot_be_made_leaves_nothing_behind(disturbance: Any) -> None:
    """Its hooks would keep it alive, and its averages in the weights."""

    def made() -> rf.Averager:
        return rf.Averager(net, rf.lookahead(2), optimizer=opt)

    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    counting = disturbance(-1, HERE)
    with counting:
        averager = made()
    averager.remove()
    for n in tried(disturbance, counting.seen):
        event = disturbance(n, HERE)
        with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)) as raised, event:
            made()
        assert not opt._optimizer_step_pre_hooks, event.seen[-1]
        assert not opt._optimizer_step_post_hooks, event.seen[-1]
        made().remove()  # as long as somebody looks at the first, too
        assert raised.value is not None
