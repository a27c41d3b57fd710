"""The systems of the papers, in one table: which optimizer, which learning rate, what is tested.

One learning rate serves all: that of SGD without momentum. A rule whose momentum *sums* gradients
(PyTorch's) gets (1 - mu) of it, one whose momentum averages them (RSGDM's) gets all of it, so that
a constant gradient moves every system at the same pace in the long run.

A control knows nothing of rbwa_fused: it is torch.optim.SGD with its hyperparameters set before
every step, to which the system of the same name is equal up to rounding (docs/equivalences.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import rbwa_fused as rf
from studies.papers import schedules
from studies.papers.settings import Recipe

EMA_EPOCHS = 2  # an EMA's horizon, 1/(1 - decay) steps
FGE_EPOCHS = 2  # an FGE cycle
BETA = 0.9  # of RBWA-E, as in its paper
LOOKAHEAD_STEPS, LOOKAHEAD_ALPHA = 5, 0.5
REPLICAS = 3

Build = Callable[[Iterable[Parameter], Recipe], Optimizer]
Tested = Literal["live", "average", "ensemble", "mean of replicas"]


def always(recipe: Recipe, step: int) -> float:
    return 1.0


def as_given(recipe: Recipe, step: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Args:
        about: the picture's legend.
        family: its panel where a picture shows many systems.
        build: the optimizer for the parameters.
        factor: of the learning rate at a step, counted from 1.
        others: further hyperparameters of a step, of a control.
        tested: the live weights as they are, the average beside them with BatchNorm re-estimated,
            the mean of the snapshots' predictions, or the mean of the replicas' weights, BatchNorm
            re-estimated.
    """

    about: str
    family: str
    build: Build
    factor: Callable[[Recipe, int], float] = always
    others: Callable[[Recipe, int], dict[str, Any]] = as_given
    tested: Tested = "live"

    @property
    def replicas(self) -> int:
        """Networks that are trained at once."""
        return REPLICAS if self.tested == "mean of replicas" else 1


def plain(params: Iterable[Parameter], r: Recipe) -> Optimizer:
    return rf.FusedSGD(params, r.lr, weight_decay=r.weight_decay)


def momentum(params: Iterable[Parameter], r: Recipe) -> Optimizer:
    return rf.FusedSGD(params, r.summing_lr, r.momentum, weight_decay=r.weight_decay)


def sgdm(params: Iterable[Parameter], r: Recipe) -> Optimizer:
    return rf.RSGDM(params, r.lr, r.momentum, r.weight_decay, difference=None)


def nesterov(params: Iterable[Parameter], r: Recipe) -> Optimizer:
    return rf.FusedSGD(
        params, r.summing_lr, r.momentum, weight_decay=r.weight_decay, nesterov=r.momentum > 0.0
    )


def rsgdm(params: Iterable[Parameter], r: Recipe) -> Optimizer:
    return rf.RSGDM(params, r.lr, r.momentum, r.weight_decay)


def control(params: Iterable[Parameter], r: Recipe) -> Optimizer:
    return torch.optim.SGD(
        params, r.summing_lr, r.momentum, weight_decay=r.weight_decay, fused=True
    )


def averaging(policy: Callable[[Recipe], rf.Average]) -> Build:
    """SGD with the recipe's momentum, and that average."""

    def build(params: Iterable[Parameter], r: Recipe) -> Optimizer:
        return rf.FusedSGD(
            params, r.summing_lr, r.momentum, weight_decay=r.weight_decay, average=policy(r)
        )

    return build


def after_start(schedule: Callable[[int, int], float], epochs: int) -> Callable[..., float]:
    """Cycles of so many epochs from the first averaged step on, the full rate before."""

    def factor(r: Recipe, step: int) -> float:
        return 1.0 if step <= r.start else schedule(step - r.start, epochs * r.steps_per_epoch)

    return factor


def decay(r: Recipe) -> float:
    return 1.0 - 1.0 / (EMA_EPOCHS * r.steps_per_epoch + 1)


def swa(r: Recipe) -> rf.Average:
    """A sample at each epoch's end; the weights at the start are the first, as in the paper."""
    return rf.swa(r.start, r.steps_per_epoch, initial="current")


def corrected_start(r: Recipe, step: int) -> dict[str, Any]:
    """RSGDM's buffer never sees the first gradient: that step is taken without momentum."""
    if step == 1:
        return {"momentum": 0.0, "nesterov": False}
    return {"momentum": r.momentum, "nesterov": r.momentum > 0.0}


PLAIN = "no average"
BESIDE = "average beside the weights"
NOW_AND_THEN = "average fed back now and then"
EVERY_STEP = "average written back every step"

SYSTEMS: dict[str, System] = {
    "sgd": System("SGD, no momentum", PLAIN, plain),
    "momentum": System("SGD with momentum", PLAIN, momentum),
    "momentum-cosine": System(
        "the same, lr to 0 by a cosine",
        PLAIN,
        momentum,
        lambda r, step: schedules.cosine(step, r.steps),
    ),
    "sgdm": System("the same in the RSGDM paper's form", PLAIN, sgdm),
    "nesterov": System("Nesterov, PyTorch's", PLAIN, nesterov),
    "rsgdm": System("RSGDM", PLAIN, rsgdm),
    "rsgdm-control": System(
        "its control: Nesterov, first step corrected", PLAIN, control, others=corrected_start
    ),
    "swa": System("SWA, constant lr", BESIDE, averaging(swa), tested="average"),
    "swa-cyclical": System(
        "SWA, cyclical lr",
        BESIDE,
        averaging(swa),
        after_start(schedules.cyclical, 1),
        tested="average",
    ),
    "fge": System(
        "FGE, ensemble of snapshots",
        BESIDE,
        momentum,
        after_start(schedules.triangular, FGE_EPOCHS),
        tested="ensemble",
    ),
    "ema": System(
        f"EMA, horizon {EMA_EPOCHS} epochs",
        BESIDE,
        averaging(lambda r: rf.ema(decay(r), start=r.start)),
        tested="average",
    ),
    "rswa": System(
        "RSWA, SWA written back each epoch",
        NOW_AND_THEN,
        averaging(lambda r: rf.rswa(r.steps_per_epoch, r.start_epoch)),
        tested="average",
    ),
    "switch-ema": System(
        "Switch-EMA, written back each epoch",
        NOW_AND_THEN,
        averaging(lambda r: rf.switch_ema(decay(r), steps_per_epoch=r.steps_per_epoch)),
        tested="average",
    ),
    "lookahead": System(
        f"Lookahead, k = {LOOKAHEAD_STEPS}, alpha = {LOOKAHEAD_ALPHA}",
        NOW_AND_THEN,
        averaging(lambda r: rf.lookahead(LOOKAHEAD_STEPS, LOOKAHEAD_ALPHA)),
        tested="average",
    ),
    "replicas": System(
        f"elastic replicas, {REPLICAS} networks", NOW_AND_THEN, momentum, tested="mean of replicas"
    ),
    "rbwa": System(
        "RBWA, running count",
        EVERY_STEP,
        averaging(lambda r: rf.rbwa(r.steps_per_epoch, r.start_epoch)),
    ),
    "rbwa-control": System(
        "its control: SGD, lr η/(n+1)",
        EVERY_STEP,
        control,
        lambda r, step: schedules.rbwa(step, r.start),
    ),
    "rbwa-algorithm2": System(
        "RBWA, count of Algorithm 2",
        EVERY_STEP,
        averaging(lambda r: rf.rbwa(r.steps_per_epoch, r.start_epoch, "algorithm2")),
    ),
    "rbwa-algorithm2-control": System(
        "its control: SGD, lr η/((e-c)j+1)",
        EVERY_STEP,
        control,
        lambda r, step: schedules.rbwa_algorithm2(step, r.steps_per_epoch, r.start_epoch),
    ),
    "rbwa-e": System(
        f"RBWA-E, beta = {BETA}",
        EVERY_STEP,
        averaging(
            lambda r: rf.rbwa_e(BETA, steps_per_epoch=r.steps_per_epoch, start_epoch=r.start_epoch)
        ),
    ),
    "rbwa-e-control": System(
        "its control: SGD, lr (1-β)η",
        EVERY_STEP,
        control,
        lambda r, step: schedules.rbwa_e(step, r.start, BETA),
    ),
}

NEED_MOMENTUM = ("momentum", "momentum-cosine", "sgdm", "nesterov", "rsgdm", "rsgdm-control")


def is_control(name: str) -> bool:
    return name.endswith("-control")


def controlled(name: str) -> str:
    """The system that a control is a control of; any other is its own."""
    return name.removesuffix("-control")
