"""Training programs that people run, with an Averager for their averages: torchvision's reference
script and timm's. Each is written here twice, as it is and with the Averager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import as_bits
from programs import (
    EPOCHS,
    Net,
    assert_equal_to_rounding,
    batches,
    evaluated,
    floating,
    through_a_file,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import rbwa_fused as rf

# ---- torchvision: references/classification/train.py ---------------------------------------------

WARMUP = 2  # epochs, of the learning rate, in which the average stays a copy
ALPHA = min(1.0, (1.0 - 0.99) * 1 * 32 * 2 / EPOCHS)  # 1 - decay, by world, batch, steps and epochs


class ExponentialMovingAverage(AveragedModel):
    """As torchvision's references/classification/utils.py has it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        def ema_avg(avg_model_param: Tensor, model_param: Tensor, num_averaged: Any) -> Tensor:
            return decay * avg_model_param + (1 - decay) * model_param

        super().__init__(model, "cpu", ema_avg, use_buffers=True)


class Torchvision:
    """A run of the script: SGD in two groups, warm-up and cosine, an epoch at a time.

    Args:
        count: batches an epoch.
        every: ``--model-ema-steps``.
        averager: of a net and its optimizer; None for the script's own average.
        by_hand: the averager is updated where the script updates its own.
        overflow: epoch and batch whose gradients overflow; None for training without a scaler.
    """

    def __init__(
        self,
        count: int,
        every: int,
        averager: Callable[[nn.Module, Any], rf.Averager] | None,
        *,
        by_hand: bool = False,
        overflow: tuple[int, int] | None = None,
    ) -> None:
        self.count, self.every, self.by_hand, self.overflow = count, every, by_hand, overflow
        self.net = Net()
        norms = [p for m in self.net if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        others = [p for p in self.net.parameters() if all(p is not q for q in norms)]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others}]
        self.opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)
        lrs = torch.optim.lr_scheduler
        self.schedule = lrs.SequentialLR(
            self.opt,
            [
                lrs.LinearLR(self.opt, start_factor=0.01, total_iters=WARMUP),
                lrs.CosineAnnealingLR(self.opt, T_max=EPOCHS - WARMUP),
            ],
            milestones=[WARMUP],
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if overflow else None
        self.ema = None if averager else ExponentialMovingAverage(self.net, 1.0 - ALPHA)
        self.averager = averager(self.net, self.opt) if averager else None

    def epoch(self, epoch: int) -> None:
        for i, (image, target) in enumerate(batches(epoch, self.count)):
            loss = F.cross_entropy(self.net(image), target, label_smoothing=0.1)
            self.opt.zero_grad()
            if self.scaler is not None:
                self.scaler.scale(loss).backward()
                if (epoch, i) == self.overflow:
                    self.net[0].weight.grad.fill_(torch.inf)  # type: ignore[union-attr, operator]
                self.scaler.unscale_(self.opt)
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.scaler.step(self.opt)
                self.scaler.update()
            else:
                loss.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                self.opt.step()
            if i % self.every == 0:
                if self.ema is not None:
                    self.ema.update_parameters(self.net)
                    if epoch < WARMUP:
                        self.ema.n_averaged.fill_(0)
                elif self.by_hand and self.averager is not None:
                    self.averager.update()
        self.schedule.step()

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """The outputs of the model and of its average."""
        if self.averager is None:
            assert self.ema is not None
            return evaluated(self.net), evaluated(self.ema)
        with self.averager.averaged():
            averaged = evaluated(self.net)
        return evaluated(self.net), averaged

    def averages(self) -> dict[str, Tensor]:
        if self.averager is None:
            assert self.ema is not None
            return floating(self.ema.module)
        return self.averager.averaged_state_dict()

    def parts(self) -> dict[str, Any]:
        own = {"model": self.net, "optimizer": self.opt, "lr_scheduler": self.schedule}
        more = {"model_ema": self.averager, "scaler": self.scaler}
        return {**own, **{name: part for name, part in more.items() if part is not None}}


def as_samples_of_a_function(count: int, every: int) -> Callable[..., rf.Averager]:
    """Behind the optimizer: the reset in the warm-up as a weight of 1. The script samples behind
    batch 0; samples come after start + every, and the one after step 1 is gone at the next."""
    first = WARMUP * count + 1
    average = rf.Average(
        lambda n, step: 1.0 if step <= first else ALPHA, start=1, every=every, name="warmup"
    )
    return lambda net, opt: rf.Averager(net, average, optimizer=opt, buffers=True)


def as_a_late_start(count: int, every: int) -> Callable[..., rf.Averager]:
    """Behind the optimizer: a first sample behind the warm-up is a copy, too."""
    average = rf.ema(1.0 - ALPHA, start=WARMUP * count + 1 - every, every=every)
    return lambda net, opt: rf.Averager(net, average, optimizer=opt, buffers=True)


def by_hand(count: int, every: int) -> Callable[..., rf.Averager]:
    """An update where the script has its own, so that the start counts updates."""
    average = rf.ema(1.0 - ALPHA, start=WARMUP * math.ceil(count / every))
    return lambda net, opt: rf.Averager(net, average, buffers=True)


# By the way that it is written: the averager, batches an epoch, EMA steps, and an overflow, which
# the script's average counts as a sample of unchanged weights.
TORCHVISION: dict[str, tuple[Callable[..., Any], int, int, tuple[int, int] | None]] = {
    "function": (as_samples_of_a_function, 6, 2, None),
    "late start": (as_a_late_start, 6, 2, None),
    "late start, each step": (as_a_late_start, 5, 1, None),
    "by hand": (by_hand, 5, 2, None),
    "by hand, with a scaler": (by_hand, 5, 2, (2, 2)),
}


@pytest.mark.parametrize("way", TORCHVISION)
def test_torchvisions_script_trains_and_averages_as_it_does(way: str) -> None:
    """In the warm-up the script's average is a copy of the last sampled weights. A policy that
    starts later has none then: the weights of now are evaluated, which is the same with a sample
    behind each step."""
    averager, count, every, overflow = TORCHVISION[way]
    literal = Torchvision(count, every, None, overflow=overflow)
    options: Any = {"by_hand": averager is by_hand, "overflow": overflow}
    ours = Torchvision(count, every, averager(count, every), **options)
    for epoch in range(EPOCHS):
        literal.epoch(epoch)
        ours.epoch(epoch)
        assert as_bits(ours.net.state_dict()) == as_bits(literal.net.state_dict())
        if epoch < WARMUP and way != "function" and every > 1:
            assert ours.averager is not None and ours.averager.n_averaged == 0
            expected = floating(ours.net)
        else:
            expected = literal.averages()
            torch.testing.assert_close(ours.evaluate(), literal.evaluate(), rtol=1e-11, atol=1e-13)
        assert_equal_to_rounding(ours.averages(), expected, (epoch + 1) * count)
    moved = floating(ours.net)
    assert any((moved[name] - a).abs().max() > 1e-4 for name, a in literal.averages().items())


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("way", TORCHVISION)
def test_torchvisions_script_resumes_bit_for_bit(way: str, stop: int) -> None:
    averager, count, every, overflow = TORCHVISION[way]

    def run() -> Torchvision:
        options: Any = {"by_hand": averager is by_hand, "overflow": overflow}
        return Torchvision(count, every, averager(count, every), **options)

    whole, again = run(), run()
    for epoch in range(EPOCHS):
        if epoch == stop:
            saved = {name: part.state_dict() for name, part in whole.parts().items()}
            checkpoint = through_a_file(saved)
        whole.epoch(epoch)
    for name, part in again.parts().items():
        part.load_state_dict(checkpoint[name])
    for epoch in range(stop, EPOCHS):
        again.epoch(epoch)
    for name, part in whole.parts().items():
        assert as_bits(again.parts()[name].state_dict()) == as_bits(part.state_dict()), name
    assert as_bits(again.evaluate()) == as_bits(whole.evaluate())


# ---- timm: train.py ------------------------------------------------------------------------------

ACCUMULATED, LOADED = 3, 7  # batches a step and an epoch: the last step has fewer
UPDATES = math.ceil(LOADED / ACCUMULATED)
DECAY = 0.9


class Timm:
    """A run of the script: AdamW without weight decay on vectors, a schedule by updates, gradients
    of several batches, and ModelEmaV3, which is updated with the number of the update.

    Args:
        averaged: with an Averager instead.
        late: ``update_after_step``, or ``start``.
    """

    def __init__(self, averaged: bool, late: int = 0) -> None:
        timm = pytest.importorskip("timm")
        optim, scheduler = pytest.importorskip("timm.optim"), pytest.importorskip("timm.scheduler")
        self.net = Net()
        self.opt = optim.create_optimizer_v2(self.net, opt="adamw", lr=0.02, weight_decay=0.05)
        self.schedule = scheduler.CosineLRScheduler(
            self.opt, t_initial=EPOCHS * UPDATES, warmup_t=4, warmup_lr_init=1e-3, t_in_epochs=False
        )
        self.averager = self.ema = None
        if averaged:
            average = rf.ema(DECAY, start=late)
            self.averager = rf.Averager(self.net, average, optimizer=self.opt, buffers=True)
        else:
            self.ema = timm.utils.ModelEmaV3(self.net, decay=DECAY, update_after_step=late)

    def epoch(self, epoch: int) -> None:
        updates = epoch * UPDATES
        last = LOADED % ACCUMULATED
        self.opt.zero_grad()
        for i, (image, target) in enumerate(batches(epoch, LOADED)):
            accumulated = last if i >= LOADED - last else ACCUMULATED
            (F.cross_entropy(self.net(image), target) / accumulated).backward()
            if i != LOADED - 1 and (i + 1) % ACCUMULATED != 0:
                continue
            nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
            self.opt.step()
            updates += 1
            self.opt.zero_grad()
            if self.ema is not None:
                self.ema.update(self.net, step=updates)
            self.schedule.step_update(num_updates=updates)

    def state_dict_ema(self) -> dict[str, Tensor]:
        if self.averager is None:
            assert self.ema is not None
            return {name: t.clone() for name, t in self.ema.module.state_dict().items()}
        return self.averager.averaged_state_dict()


@pytest.mark.parametrize("late", [0, 5])
def test_timms_script_trains_and_averages_as_it_does(late: int) -> None:
    """ModelEmaV3 copies at update 1 (or `late` + 1), as a first sample does, also before it, where
    an average that starts later is the weights themselves."""
    literal, ours = Timm(False, late), Timm(True, late)
    for epoch in range(EPOCHS):
        literal.epoch(epoch)
        ours.epoch(epoch)
        assert as_bits(ours.net.state_dict()) == as_bits(literal.net.state_dict())
        theirs, own = literal.state_dict_ema(), ours.state_dict_ema()
        assert list(own) == list(theirs)
        counts = [name for name, t in theirs.items() if not t.is_floating_point()]
        assert len(counts) == 2 and all(torch.equal(own[name], theirs[name]) for name in counts)
        assert_equal_to_rounding(own, theirs, (epoch + 1) * UPDATES)
        assert ours.averager is not None and literal.ema is not None
        with ours.averager.averaged():
            outputs = evaluated(ours.net)
        torch.testing.assert_close(outputs, evaluated(literal.ema.module), rtol=1e-11, atol=1e-13)
    assert ours.averager is not None and ours.averager.n_averaged == EPOCHS * UPDATES - late


@pytest.mark.parametrize("from_its_own", [True, False])
def test_timms_script_resumes_bit_for_bit(from_its_own: bool) -> None:
    """Also from `state_dict_ema` alone, which is what the script saves."""
    whole, again = Timm(True), Timm(True)
    assert whole.averager is not None and again.averager is not None
    for epoch in range(EPOCHS):
        if epoch == 2:
            own = whole.averager.state_dict() if from_its_own else whole.state_dict_ema()
            parts = [whole.net.state_dict(), whole.opt.state_dict(), own]
            checkpoint = through_a_file(parts)
        whole.epoch(epoch)
    again.net.load_state_dict(checkpoint[0])
    again.opt.load_state_dict(checkpoint[1])
    again.averager.load_state_dict(checkpoint[2], step=None if from_its_own else 2 * UPDATES)
    again.schedule.step_update(num_updates=2 * UPDATES)
    for epoch in range(2, EPOCHS):
        again.epoch(epoch)
    assert as_bits(again.net.state_dict()) == as_bits(whole.net.state_dict())
    assert as_bits(again.opt.state_dict()) == as_bits(whole.opt.state_dict())
    assert as_bits(again.state_dict_ema()) == as_bits(whole.state_dict_ema())
