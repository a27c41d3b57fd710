"""What an Averager refuses beside others' steps, and what it makes good where one of its own
samples fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import OPTIMIZERS, Net, adamw, as_bits, loss, train, trainable
from torch import nn

import rbwa_fused as rf
from rbwa_fused.engine.engine import Engine

# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the current stream is being captured, as of a machine with a GPU in use."""

    def say(captured: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)

    return say


def test_a_captured_sample_is_refused_since_a_replay_would_not_count(
    capturing: Callable[[bool], None],
) -> None:
    net = Net()
    averager = rf.Averager(net, rf.ema(0.5))
    averager.update()
    before = as_bits(averager.state_dict())
    capturing(True)
    with pytest.raises(
        RuntimeError, match=r"update\(\) while a CUDA graph .*update\(\) behind each"
    ):
        averager.update()
    assert as_bits(averager.state_dict()) == before
    capturing(False)
    averager.update()
    assert averager.n_averaged == 2


def test_a_captured_step_that_is_followed_is_refused_before_it_is_taken(
    capturing: Callable[[bool], None],
) -> None:
    net = Net()
    opt = torch.optim.SGD(trainable(net), lr=0.1)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 2)
    before = as_bits((list(net.parameters()), averager.state_dict()))
    capturing(True)
    with pytest.raises(
        RuntimeError, match=r"captured, whose replays .*Averager without optimizer="
    ):
        opt.step()
    assert as_bits((list(net.parameters()), averager.state_dict())) == before
    capturing(False)
    train(net, [opt], 3, 3)
    assert averager.n_averaged == 3


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_step_with_an_average_that_the_host_counts_is_refused_as_well(
    capturing: Callable[[bool], None], in_backward: bool
) -> None:
    def step() -> None:
        loss(net, 1).backward()
        opt.step()

    net = Net()
    opt = rf.FusedSGD(trainable(net), lr=0.1, average=rf.ema(0.5), in_backward=in_backward)
    plain = rf.FusedSGD(Net().parameters(), lr=0.1)
    for p in plain.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    step()
    opt.zero_grad()
    before = as_bits((list(net.parameters()), opt.state_dict()))
    capturing(True)
    with pytest.raises(RuntimeError, match=r"captured, .*\(expected capturable=True\)"):
        step()
    assert as_bits((list(net.parameters()), opt.state_dict())) == before
    plain.step()  # as torch.optim.SGD's, it has nothing to count


# ---- a teacher's owner ---------------------------------------------------------------------------


def test_a_teacher_that_an_optimizer_has_is_refused() -> None:
    """Its step would move what the averages have just been written to."""
    net = Net()
    teacher = copy.deepcopy(net)
    both = torch.optim.AdamW([*trainable(net), *trainable(teacher)])
    for target in (teacher, list(teacher.parameters())):
        with pytest.raises(ValueError, match=r"into: AdamW has its parameter 0 \('first.weight'\)"):
            rf.Averager(net, rf.ema(0.5), optimizer=both, into=target)
    own = [adamw(net), torch.optim.SGD(teacher.last.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"SGD has its parameter 4 \('last.weight'\)"):
        rf.Averager(net, rf.ema(0.5), optimizer=own, into=teacher)
    assert not own[0]._optimizer_step_post_hooks
    rf.Averager(net, rf.ema(0.5), optimizer=own, into=teacher, exclude=["last.*"])
    rf.Averager(net, rf.ema(0.5), optimizer=own[0], into=teacher)


def test_a_frozen_teacher_may_be_in_the_optimizer() -> None:
    """As in MoCo's program, whose model has both encoders: no gradient comes to it."""
    net = Net()
    teacher = copy.deepcopy(net).requires_grad_(False)
    opt = torch.optim.AdamW([*net.parameters(), *teacher.parameters()], weight_decay=0.1)
    rf.Averager(net, rf.ema(0.5), optimizer=opt, into=teacher)
    a = [p.clone() for p in teacher.parameters()]

    def behind(step: int) -> None:
        for average, p in zip(a, net.parameters(), strict=True):
            average.add_(0.5 * (p.detach() - average))

    train(net, [opt], 1, 3, behind)
    assert all(map(torch.equal, teacher.parameters(), a))


# ---- a sample that fails behind a step -----------------------------------------------------------


class Failing:
    """Lets the next sample fail, before it has changed anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed = False
        sample = Engine.sample

        def failing(engine: Engine, *args: Any, **options: Any) -> bool:
            if self.armed:
                self.armed = False
                raise torch.OutOfMemoryError("out of memory")
            return sample(engine, *args, **options)

        monkeypatch.setattr(Engine, "sample", failing)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


@pytest.mark.parametrize("optimizers", ["AdamW", "two"])
@pytest.mark.parametrize("asked", ["next step", "state_dict", "averaged", "averages", "remove"])
def test_the_sample_of_a_step_that_was_taken_is_not_lost(
    asked: str, optimizers: str, failing: Failing
) -> None:
    results = []
    for fails in (True, False):
        net = Net()
        own = OPTIMIZERS[optimizers](net)
        averager = rf.Averager(net, rf.ema(0.5), optimizer=own)
        train(net, own, 1, 2)
        failing.armed = fails
        try:
            train(net, own, 3, 3)
        except torch.OutOfMemoryError:
            assert averager.n_averaged == 2
        if asked == "state_dict":
            assert averager.state_dict()["param_groups"][0]["n_averaged"] == 3
        elif asked == "averaged":
            with averager.averaged():
                results.append(as_bits(list(net.parameters())))
        elif asked == "averages":
            results.append(as_bits(averager.averages()))
        elif asked == "remove":
            averager.remove()
            assert averager.n_averaged == 3
        for step in (4, 5):
            train(net, own, step, step)
            if asked == "remove":
                averager.update()
        results.append(as_bits((list(net.parameters()), averager.state_dict())))
    assert results[: len(results) // 2] == results[len(results) // 2 :]


@pytest.mark.parametrize("skipped", [False, True])
def test_a_skipped_step_stays_one_where_its_hook_fails(skipped: bool, failing: Failing) -> None:
    net = Net()
    opt = adamw(net, fused=True)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(number: int, overflows: bool) -> None:
        opt.zero_grad()
        scaler.scale(loss(net, number)).backward()
        if overflows:
            trainable(net)[0].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(opt)
        scaler.update()

    step(1, False)
    failing.armed = True
    with pytest.raises(torch.OutOfMemoryError):
        step(2, skipped)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step(3, False)
    assert averager.n_averaged == 3 - skipped


def test_a_loaded_checkpoint_says_how_many_samples_there_are(failing: Failing) -> None:
    net = Net()
    opt = adamw(net)
    averager = rf.Averager(net, rf.ema(0.5), optimizer=opt)
    train(net, [opt], 1, 2)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict(), averager.state_dict()))
    train(net, [opt], 3, 3)
    expected = as_bits((list(net.parameters()), averager.averages()))
    failing.armed = True
    with pytest.raises(torch.OutOfMemoryError):
        train(net, [opt], 4, 4)
    for loaded, state in zip((net, opt, averager), saved, strict=True):
        loaded.load_state_dict(state)  # type: ignore[attr-defined]
    train(net, [opt], 3, 3)
    assert as_bits((list(net.parameters()), averager.averages())) == expected
    assert averager.n_averaged == 3


def test_weights_of_before_the_next_step_are_taken_with_the_sample_before_it() -> None:
    """Nobody sees them once another optimizer has stepped."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    net = Last()
    averager = rf.Averager(net, rf.swa(2, 1, "current"))
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            net.weight.fill_(value)
        averager.update()
    assert averager.averages()["weight"].tolist() == [3.0, 3.0] and averager.n_averaged == 2
