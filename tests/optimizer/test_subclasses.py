"""Optimizers of a user's own, derived from ours: hooks and the profiler see each step once."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import rbwa_fused as rf

ONCE_GLOBALLY = ["global before", "global after"]


class Child(rf.FusedSGD):
    """Overrides `step` and calls the one above, as most do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)


class Grandchild(Child):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure=closure)


class Difference(rf.RSGDM):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class Twice:
    """A mixin of two steps for one."""

    def step(self) -> None:
        super().step()  # type: ignore[misc]
        super().step()  # type: ignore[misc]


class Mixed(Twice, rf.FusedSGD):  # type: ignore[misc]
    pass


class ByHand(rf.FusedSGD):
    """Does not call the step above at all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


CHILDREN = [Child, Grandchild, Difference, Mixed, ByHand]


def parameter(value: float = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.full((3,), value))
    p.grad = torch.ones(3)
    return p


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """What the hooks of all optimizers have seen."""
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *told: seen.append("global before")),
        register_optimizer_step_post_hook(lambda *told: seen.append("global after")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def watch(opt: Any, seen: list[str]) -> None:
    opt.register_step_pre_hook(lambda *told: seen.append("before"))
    opt.register_step_post_hook(lambda *told: seen.append("after"))


ONCE = ["global before", "before", "after", "global after"]


@pytest.mark.parametrize("cls", CHILDREN)
def test_hooks_run_once_a_step_of_a_subclass(cls: Any, seen: list[str]) -> None:
    opts = [cls([parameter()], lr=0.1) for cls in (*CHILDREN, rf.FusedSGD)]  # all classes patched
    opt = next(opt for opt in opts if type(opt) is cls)
    watch(opt, seen)
    opt.step()
    assert seen == ONCE
    opt.step()
    assert seen == ONCE * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_hooks_run_once_on_a_copy_of_a_subclass(
    copied: Callable[[Any], Any], seen: list[str]
) -> None:
    opt = copied(Grandchild([parameter()], lr=0.1))
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    watch(opt, seen)
    opt.step()
    assert seen == ONCE


@pytest.mark.parametrize("cls", CHILDREN)
def test_a_profile_shows_one_step_of_a_subclass_by_its_name(cls: Any) -> None:
    opt = cls([parameter()], lr=0.1)
    with torch.profiler.profile() as profile:
        opt.step()
    shown = [event.name for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert shown == [f"Optimizer.step#{cls.__name__}.step"]


def test_a_scheduler_sees_the_step_of_a_subclass(
    seen: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    opt = Child([parameter()], lr=0.1)
    scheduler = StepLR(opt, step_size=1)
    watch(opt, seen)
    opt.step()
    scheduler.step()
    assert seen == ONCE and opt.calls == 1
    assert not recwarn.list and opt.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_step_replaced_on_the_instance_still_runs_hooks_once(seen: list[str]) -> None:
    opt: Any = rf.FusedSGD([parameter()], lr=0.1)
    step, calls = opt.step, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return step(*args)

    opt.step = counted
    watch(opt, seen)
    opt.step()
    assert seen == ONCE and calls == [()]


def test_hooks_run_again_after_a_step_that_failed(seen: list[str]) -> None:
    opt = Child([parameter()], lr=0.1)

    def fails() -> None:
        raise ArithmeticError("of the closure")

    for _ in range(2):
        with pytest.raises(ArithmeticError, match="of the closure"):
            opt.step(fails)
    assert seen == ["global before"] * 2
    opt.step()
    assert seen[2:] == ONCE_GLOBALLY


@pytest.mark.parametrize("cls", [rf.FusedSGD, Child, Grandchild, torch.optim.SGD])
def test_a_step_taken_in_a_closure_is_seen_as_one_more(cls: Any, seen: list[str]) -> None:
    opt = cls([parameter()], lr=0.1)

    def closure() -> None:
        opt.step()
        assert seen == ["global before", *ONCE_GLOBALLY]

    opt.step(closure)
    assert seen == ["global before", *ONCE_GLOBALLY, "global after"]
    opt.step()
    assert seen[4:] == ONCE_GLOBALLY


def test_a_hook_that_exchanges_the_closure_reaches_the_step_above() -> None:
    opt = Grandchild([parameter()], lr=0.1)
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: "mine"), {}))
    assert opt.step() == "mine"


def steps(cls: Any, stepper: Callable[[Any], Callable[[], Any]]) -> Tensor:
    p = parameter()
    step = stepper(cls([p], lr=0.1, momentum=0.9))
    for _ in range(3):
        step()
    return p.detach()


@pytest.mark.parametrize("cls", [Child, Grandchild])
def test_a_compiled_step_of_a_subclass_is_the_step(cls: Any) -> None:
    expected = steps(torch.optim.SGD, lambda opt: opt.step)
    compiled = steps(cls, lambda opt: torch.compile(opt.step, backend="eager"))
    assert torch.equal(compiled, expected)


def test_a_saved_optimizer_of_a_subclass_goes_on() -> None:
    p = parameter()
    opt = Child([p], lr=0.1, momentum=0.9, average=rf.ema(0.5))
    opt.step()
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    (q,) = other.param_groups[0]["params"]
    q.grad = torch.ones(3)
    for one in (opt, other):
        one.step()
    assert torch.equal(p, q) and other.n_averaged == 2
