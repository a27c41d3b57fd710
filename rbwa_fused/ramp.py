"""Ramps: how the weight of a sample falls while an average is young, ``ema(ramp=ramp.count())``.

A young EMA with a small weight stays close to where it began. A ramp gives its first samples more:
that of a sample before which there are n, the initial one included, is

    w = the smaller of 1 - floor and the larger of the ramp and 1 - decay.

What other libraries call a decay is 1 - w, and ``floor`` is their smallest decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from rbwa_fused.numbers import fraction, positive


class Printed:
    """What prints as the call that makes it."""

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)]  # type: ignore[arg-type]
        return f"ramp.{type(self).__name__.lower()}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Count(Printed):
    """9 / (10 + n), a decay of (1 + n) / (10 + n): diffusers' EMAModel by default."""

    on_device: ClassVar[int] = 5  # enum class Weight of csrc/policy.h

    floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "floor", fraction("floor", self.floor))

    def of(self, n: int, cap: float) -> float:
        """Weight of the sample before which there are n >= 1, where 1 - decay is ``cap``."""
        return 9.0 / (10 + n)

    def numbers(self) -> tuple[float, ...]:
        """What a device needs to know of it (struct Policy of csrc/policy.h)."""
        return ()


@dataclass(frozen=True, repr=False)
class Inverse(Printed):
    """(1 + n / gamma)^-power: EMAModel(use_ema_warmup=True), timm's ModelEmaV3, ema-pytorch."""

    on_device: ClassVar[int] = 6

    gamma: float = 1.0
    power: float = 2.0 / 3.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", positive("gamma", self.gamma))
        object.__setattr__(self, "power", positive("power", self.power))
        object.__setattr__(self, "floor", fraction("floor", self.floor))

    def of(self, n: int, cap: float) -> float:
        """See Count.of."""
        return math.pow(1.0 + n / self.gamma, -self.power)

    def numbers(self) -> tuple[float, ...]:
        """See Count.numbers."""
        return self.gamma, self.power


@dataclass(frozen=True, repr=False)
class Exponential(Printed):
    """cap + (1 - cap) e^(-n / tau), a decay of decay (1 - e^(-n / tau)): YOLO's ModelEMA."""

    on_device: ClassVar[int] = 7

    tau: float = 2000.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", positive("tau", self.tau))
        object.__setattr__(self, "floor", fraction("floor", self.floor))

    def of(self, n: int, cap: float) -> float:
        """See Count.of."""
        return cap + (1.0 - cap) * math.exp(-n / self.tau)

    def numbers(self) -> tuple[float, ...]:
        """See Count.numbers."""
        return (self.tau,)


Ramp = Count | Inverse | Exponential


def count(*, floor: float = 0.0) -> Count:
    """9 / (10 + n): a decay of (1 + n) / (10 + n), as diffusers' EMAModel has it by default.

    Args:
        floor: the smallest decay, 0 <= floor < 1.
    """
    return Count(floor)


def inverse(gamma: float = 1.0, power: float = 2.0 / 3.0, *, floor: float = 0.0) -> Inverse:
    """(1 + n / gamma)^-power: that of diffusers (``use_ema_warmup``, inv_gamma), of timm
    (``use_warmup``) and of ema-pytorch (inv_gamma; see docs/equivalences.md for update_every).

    Args:
        gamma (samples, > 0): how soon it begins to fall.
        power (> 0): how fast it falls; 2/3 suits runs of a million samples, 3/4 shorter ones.
        floor: the smallest decay, 0 <= floor < 1.
    """
    return Inverse(gamma, power, floor)


def exponential(tau: float = 2000.0, *, floor: float = 0.0) -> Exponential:
    """1 - decay (1 - e^(-n / tau)), as in YOLO's ModelEMA.

    Args:
        tau (samples, > 0): by when the ramp has fallen to 1/e.
        floor: the smallest decay, 0 <= floor < 1.
    """
    return Exponential(tau, floor)
