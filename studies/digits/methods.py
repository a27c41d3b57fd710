"""The methods, in one table: which optimizer, which average, which weights are tested.

Every average rides on the same base: SGD with ``--momentum`` mu and ``--lr`` eta. Two rules move
1/(1 - mu) times less for the same learning rate, so they get eta/(1 - mu), which gives a constant
gradient the same pace in the long run: SGD without momentum, and RSGDM, whose momentum is an
average of gradients and not their sum. Where an average is kept beside the weights it is the
average that is tested, with BatchNorm re-estimated; elsewhere the live weights are tested as they
are. Averaging starts after ``--start-epoch``, Lookahead at the first step.

The two controls know nothing of rbwa_fused: torch.optim.SGD, its learning rate set by hand before
every step. RBWA written back after every step *is* SGD with learning rate eta/(n+1), n being the
samples averaged so far, and RBWA-E is SGD with (1 - beta) eta after the first averaged step. So
each must agree with its control up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import rbwa_fused as rf
from studies.digits.options import Settings

EMA_DECAY = 0.99  # a horizon of 100 steps, about two epochs of the default batch size
RBWA_E_BETA = 0.9
LOOKAHEAD_STEPS = 5
LOOKAHEAD_ALPHA = 0.5


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        about: the picture's legend.
        family: its row in the picture.
        optimizer: builds it for the parameters.
        lr: learning rate of the step, counted from 1, where it is set by hand.
        averaged: test the average beside the weights, not the live weights.
    """

    about: str
    family: str
    optimizer: Callable[[Iterable[Parameter], Settings], Optimizer]
    lr: Callable[[Settings, int], float] | None = None
    averaged: bool = False

    def before_step(self, opt: Optimizer, settings: Settings, step: int) -> None:
        """Sets the learning rate of a control."""
        if self.lr is not None:
            for group in opt.param_groups:
                group["lr"] = self.lr(settings, step)


def sgd(params: Iterable[Parameter], s: Settings) -> Optimizer:
    return rf.FusedSGD(params, s.lr / (1.0 - s.momentum), weight_decay=s.weight_decay)


def momentum(params: Iterable[Parameter], s: Settings) -> Optimizer:
    return rf.FusedSGD(params, s.lr, s.momentum, weight_decay=s.weight_decay)


def rsgdm(params: Iterable[Parameter], s: Settings) -> Optimizer:
    return rf.RSGDM(params, s.lr / (1.0 - s.momentum), s.momentum, s.weight_decay)


def torch_sgd(params: Iterable[Parameter], s: Settings) -> Optimizer:
    return torch.optim.SGD(params, s.lr, s.momentum, weight_decay=s.weight_decay, fused=True)


def averaging(
    policy: Callable[[Settings], rf.Average],
) -> Callable[[Iterable[Parameter], Settings], Optimizer]:
    """SGD with momentum and that average."""

    def build(params: Iterable[Parameter], s: Settings) -> Optimizer:
        return rf.FusedSGD(params, s.lr, s.momentum, weight_decay=s.weight_decay, average=policy(s))

    return build


def rbwa_lr(s: Settings, step: int) -> float:
    samples = max(0, step - 1 - s.start)
    return s.lr / (samples + 1)


def rbwa_e_lr(s: Settings, step: int) -> float:
    return s.lr if step <= s.start + 1 else (1.0 - RBWA_E_BETA) * s.lr


PLAIN = "no average"
KEPT = "average kept in a buffer"
LIVE = "average written back every step"

METHODS: dict[str, Method] = {
    "sgd": Method("SGD, no momentum", PLAIN, sgd),
    "momentum": Method("SGD with momentum", PLAIN, momentum),
    "rsgdm": Method("RSGDM", PLAIN, rsgdm),
    "swa": Method(
        "SWA, mean of epoch ends",
        KEPT,
        averaging(lambda s: rf.swa(start=s.start, every=s.steps_per_epoch)),
        averaged=True,
    ),
    "rswa": Method(
        "RSWA, SWA written back",
        KEPT,
        averaging(lambda s: rf.rswa(s.steps_per_epoch, s.start_epoch)),
        averaged=True,
    ),
    "ema": Method(
        f"EMA, decay {EMA_DECAY}",
        KEPT,
        averaging(lambda s: rf.ema(EMA_DECAY, start=s.start)),
        averaged=True,
    ),
    "lookahead": Method(
        f"Lookahead, k = {LOOKAHEAD_STEPS}, alpha = {LOOKAHEAD_ALPHA}",
        KEPT,
        averaging(lambda s: rf.lookahead(LOOKAHEAD_STEPS, LOOKAHEAD_ALPHA)),
        averaged=True,
    ),
    "rbwa": Method(
        "RBWA, running count", LIVE, averaging(lambda s: rf.rbwa(s.steps_per_epoch, s.start_epoch))
    ),
    "rbwa-control": Method("its control: SGD, lr η/(n+1)", LIVE, torch_sgd, lr=rbwa_lr),
    "rbwa-algorithm2": Method(
        "RBWA, count of Algorithm 2",
        LIVE,
        averaging(lambda s: rf.rbwa(s.steps_per_epoch, s.start_epoch, "algorithm2")),
    ),
    "rbwa-e": Method(
        f"RBWA-E, beta = {RBWA_E_BETA}",
        LIVE,
        averaging(
            lambda s: rf.rbwa_e(
                RBWA_E_BETA, steps_per_epoch=s.steps_per_epoch, start_epoch=s.start_epoch
            )
        ),
    ),
    "rbwa-e-control": Method("its control: SGD, lr (1-β)η", LIVE, torch_sgd, lr=rbwa_e_lr),
}

CONTROLS = {"rbwa": "rbwa-control", "rbwa-e": "rbwa-e-control"}
