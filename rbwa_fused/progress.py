"""Schedule-free learning (Defazio et al., 2024): how far a group is, and its next step.

Three sequences, of which the weights are y, where gradients are taken:

    z <- z - eta_k g(y)        x <- (1 - c_k) x + c_k z        y <- (1 - beta) z + beta x

x is the average that is evaluated, a mean of all z. It is not kept, as y and z say it: x = y +
(1 - 1/beta) (z - y). Its weights are

    eta_k = lr min(1, (k + 1) / warmup_steps)
    c_k = weight_k / (weight_0 + ... + weight_k),  weight_k = (k + 1)^r eta_max^weight_lr_power

where eta_max is the largest so far. The count k, the sum and eta_max stand in the param group, as
the schedulefree package has them, and a step that is taken moves them on. Where a device counts
they stand there, too (engine/schedules.py), and the group has them as they were read last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rbwa_fused.numbers import flag, integer, number, power
from rbwa_fused.several import averaging, names_of, policies_of

Group = Mapping[str, Any]

# What a group has before its first step, by the package's names; all but the mode is counted.
START: dict[str, Any] = {
    "k": 0,
    "weight_sum": 0.0,
    "lr_max": -1.0,
    "scheduled_lr": 0.0,
    "train_mode": False,
}
COUNTED = tuple(START)[:4]  # struct Progress of csrc/schedule.h
HYPERPARAMETERS = ("warmup_steps", "r", "weight_lr_power")


class Progress(NamedTuple):
    """A step to come.

    Attributes:
        eta: its learning rate.
        c: the weight of its z in x.
        left: what it leaves in the group.
    """

    eta: float
    c: float
    left: dict[str, Any]


def progress(group: Group) -> Progress:
    """The step to come of a group that was checked."""
    k, warmup_steps, r = group["k"], group["warmup_steps"], group["r"]
    eta = float(group["lr"])
    if k < warmup_steps:
        eta *= (k + 1) / warmup_steps
    largest = max(eta, float(group["lr_max"]))
    weight = to_the(largest, group["weight_lr_power"])
    if r != 0:
        weight *= to_the(float(k + 1), r)
    total = float(group["weight_sum"]) + weight
    left = {"k": k + 1, "weight_sum": total, "lr_max": largest, "scheduled_lr": eta}
    return Progress(eta, weight / total if total != 0.0 else 0.0, left)


def to_the(base: float, exponent: float) -> float:
    """A power. Small whole exponents multiply, and halves have a root, which have the same bits on
    every device; what others make differs there in the last places (csrc/schedule.h)."""
    if exponent == 2.0:
        return base * base
    size = abs(exponent)
    if not (size <= 16.0 and (2.0 * size).is_integer()):
        return float(base**exponent)
    result = power(base, int(size))
    if size % 1.0 == 0.5:
        result *= math.sqrt(base)
    return 1.0 / result if exponent < 0.0 else result


def derived(theta: Tensor, z: Tensor, beta: float) -> Tensor:
    """x, of y and z in one dtype."""
    return theta + (1.0 - 1.0 / beta) * (z - theta)


def between(x: Tensor, z: Tensor, beta: float) -> Tensor:
    """y, of x and z in one dtype."""
    return x + (1.0 - beta) * (z - x)


def check(group: Group) -> None:
    """Raise ValueError or TypeError for what is out of range, or an average that moves y."""
    for name in ("warmup_steps", "weight_lr_power"):
        if not number(name, group[name]) >= 0.0:
            raise ValueError(f"Invalid {name}: {group[name]} (expected at least 0)")
    r = number("r", group["r"])
    if r != r:
        raise ValueError(f"Invalid r: {group['r']}")
    integer("k", group["k"], least=0)
    for name, least in (("weight_sum", 0.0), ("lr_max", -1.0)):
        if not number(name, group[name]) >= least:
            raise ValueError(f"Invalid {name}: {group[name]} (expected at least {least})")
    number("scheduled_lr", group["scheduled_lr"])
    flag("train_mode", group["train_mode"])
    averages = averaging(group.get("average"))
    for name in names_of(averages):
        if name in ("x", "average"):
            raise ValueError(
                f"Invalid average: the name {name!r}, by which averaged(which=) knows another one "
                "of a schedule-free optimizer"
            )
    for policy in policies_of(averages):
        if policy.write_back_every > 0:
            raise ValueError(
                f"Invalid average: {policy} writes back to the weights, which with z say where the "
                "schedule-free average is (expected one that does not: it averages y, beside x)"
            )


def exclusive(name: str, beta: Any, said: str) -> None:
    """Raise for what is no number between 0 and 1 exclusive."""
    if not 0.0 < number(name, beta) < 1.0:
        raise ValueError(f"{said}: {beta}")
