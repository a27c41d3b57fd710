"""A step that fails or is interrupted leaves no memo of what it had not done yet."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import METHODS, STEPS, build, feed, result, train
from torch import nn

import rbwa_fused as rf
from rbwa_fused.engine import doors, packed


class Failing:
    """Functions whose n-th call from now on is interrupted, before it does anything."""

    left = 0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return function(*args)

        return failing


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> Failing:
    failing = Failing()
    for name in ("pack", "pack_last"):
        monkeypatch.setattr(packed.RowTable, name, failing.of(getattr(packed.RowTable, name)))
    return failing


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_repeated_after_its_rows_were_half_packed_is_the_step(
    method: str, nth: int, pack: Failing
) -> None:
    plain, opt2 = build(method)
    train(plain, opt2, 1, STEPS)
    model, opt = build(method)
    failed = 0
    for step in range(1, STEPS + 1):
        feed(model, step)
        pack.left = nth
        try:
            opt.step()
        except KeyboardInterrupt:
            failed += 1
            opt.step()
    assert failed > 0
    assert result(opt) == result(opt2)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("changed", [{"lr": 5.0}, {"lr": 5}, {"momentum": 0.0}], ids=str)
def test_a_hyperparameter_taken_back_after_a_failed_step_is_taken_back(
    changed: dict[str, float], nth: int, pack: Failing
) -> None:
    (model, opt), (plain, opt2) = build("momentum"), build("momentum")
    train(model, opt, 1, 3)
    feed(model, 4)
    usual = {key: opt.param_groups[0][key] for key in changed}
    opt.param_groups[0].update(changed)
    pack.left = nth
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    opt.param_groups[0].update(usual)
    train(model, opt, 4, STEPS)
    train(plain, opt2, 1, STEPS)
    assert result(opt) == result(opt2)


def test_replicas_are_looked_for_again_after_a_search_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Replicated(nn.Linear):
        pass

    net = Replicated(2, 2)
    opt = rf.FusedSGD(net.parameters(), 0.1, in_backward=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Replicated)
    with monkeypatch.context() as patch:
        failing = Failing()
        failing.left = 1
        patch.setattr(gc, "get_objects", failing.of(gc.get_objects))
        with pytest.raises(KeyboardInterrupt):
            net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        net(torch.ones(1, 2)).sum().backward()
    assert opt.n_averaged == 0


def fail_a_step(opt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is interrupted before its one call of C."""

    def interrupted(calls: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(doors, "in_turn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()


def test_a_copy_made_behind_a_first_step_that_failed_takes_a_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=1.0, momentum=0.5, dampening=0.5)
    p.grad = torch.ones(3)
    fail_a_step(opt, monkeypatch)
    again = copy.deepcopy(opt)
    q = again.param_groups[0]["params"][0]
    q.grad = torch.ones(3)
    again.step()
    assert q.tolist() == [0.0] * 3


def test_a_group_added_behind_a_first_step_that_failed_leaves_it_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What that step was given stands in the state, and no step has followed it."""
    ends = []
    for fails in (True, False):
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        opt = rf.FusedSGD([p], lr=1.0, momentum=0.5, dampening=0.5)
        p.grad, q.grad = torch.ones(3), torch.ones(2)
        if fails:
            fail_a_step(opt, monkeypatch)
            assert "momentum_buffer" in opt.state[p]
        opt.add_param_group({"params": [q]})
        opt.step()
        ends.append((p.tolist(), q.tolist()))
    assert ends[0] == ends[1] == ([0.0] * 3, [0.0] * 2)
