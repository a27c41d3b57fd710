"""The weight of a sample: each kind is a value, with one formula that csrc/policy.h mirrors.

A formula gives the weight w itself and not 1 - decay, which would lose up to 5e-11 of it. Kernels
round it to their arithmetic once.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Protocol

from rbwa_fused.numbers import fraction, integer, number, positive
from rbwa_fused.power import sigma_rel_of
from rbwa_fused.ramp import Ramp

SHOWN = 8  # weights of a table that are printed


class Times(Protocol):
    """When samples are taken, see Average."""

    @property
    def start(self) -> int: ...

    @property
    def every(self) -> int: ...

    @property
    def origin(self) -> int: ...

    @property
    def begins(self) -> float: ...


@dataclass(frozen=True)
class Mean:
    """Weight 1/(n+1): the average of all samples so far."""

    on_device: ClassVar[int] = 1  # enum class Weight of csrc/policy.h
    by_step: ClassVar[bool] = False  # or by the count of samples alone

    def of(self, n: int, step: int, times: Times) -> float:
        """Weight of the sample taken after ``step`` when n >= 1 samples are averaged already."""
        return 1.0 / (n + 1)

    def numbers(self, times: Times) -> tuple[float, ...]:
        """What a device needs to know of it (struct Policy of csrc/policy.h)."""
        return ()


@dataclass(frozen=True)
class Ema:
    """Weight 1 - decay: an exponential moving average."""

    on_device: ClassVar[int] = 2
    by_step: ClassVar[bool] = False

    decay: float

    def __post_init__(self) -> None:
        fraction("decay", self.decay)

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of."""
        return 1.0 - self.decay

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers."""
        return (self.decay,)


@dataclass(frozen=True)
class Algorithm2:
    """Weight 1/(k+1) with the count that Algorithm 2 of the RBWA paper prints, k = (e - c) j.

    e is the epoch counted from 1, c the start epoch, j the batch within the epoch counted from 0.
    k is 0 at each epoch's first batch, so the average restarts there.
    """

    on_device: ClassVar[int] = 3
    by_step: ClassVar[bool] = True

    steps_per_epoch: int
    start_epoch: int

    def __post_init__(self) -> None:
        integer("steps_per_epoch", self.steps_per_epoch, least=1)
        integer("start_epoch", self.start_epoch, least=0)

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of."""
        epochs, batch = divmod(step - 1, self.steps_per_epoch)
        return 1.0 / ((epochs + 1 - self.start_epoch) * batch + 1)

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers."""
        return float(self.steps_per_epoch), float(self.start_epoch)


@dataclass(frozen=True)
class HalfLife:
    """Weight 1 - 2^(-every / half_life): an EMA in which a step counts half as much as one that is
    ``half_life`` steps younger, however seldom it samples."""

    on_device: ClassVar[int] = 4
    by_step: ClassVar[bool] = False

    half_life: float  # steps

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_life", positive("half_life", self.half_life))

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of."""
        return -math.expm1(-math.log(2.0) * times.every / self.half_life)

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers."""
        return (self.of(1, 1, times),)


@dataclass(frozen=True)
class Ramped:
    """An EMA with a ramp (ramp.py), which ends where the decay or the half-life says; of both, at
    the larger weight."""

    by_step: ClassVar[bool] = False

    ramp: Ramp
    decay: float | None = None
    half_life: float | None = None  # steps

    def __post_init__(self) -> None:
        if not isinstance(self.ramp, Ramp):
            raise TypeError(f"Invalid ramp: {self.ramp!r} (expected one of rbwa_fused.ramp)")
        if self.decay is None and self.half_life is None:
            raise TypeError("Invalid decay: None (expected a decay or a half_life, which end it)")
        if self.decay is not None:
            fraction("decay", self.decay)
        if self.half_life is not None:
            positive("half_life", self.half_life)

    @property
    def on_device(self) -> int:
        return self.ramp.on_device

    def _cap(self, times: Times) -> float:
        caps = [] if self.decay is None else [1.0 - self.decay]
        if self.half_life is not None:
            caps.append(HalfLife(self.half_life).of(1, 1, times))
        return max(caps)

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of."""
        cap = self._cap(times)
        return min(max(self.ramp.of(n, cap), cap), 1.0 - self.ramp.floor)

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers."""
        return (self._cap(times), 1.0 - self.ramp.floor, *self.ramp.numbers())


@dataclass(frozen=True)
class PowerEma:
    """Weight 1 - (1 - dt / t)^(gamma + 1): an EMA that grows with the run (power.py).

    t is in steps since ``start``, and dt is ``every``, the time since the sample before, also where
    a checkpoint goes on with another ``every``. All that was before the first sample counts as that
    sample. gamma = 0 is the mean, and -1/2 imitates a 1 - sqrt decay.
    """

    on_device: ClassVar[int] = 8
    by_step: ClassVar[bool] = True

    gamma: float

    def __post_init__(self) -> None:
        sigma_rel_of(self.gamma)
        object.__setattr__(self, "gamma", float(self.gamma))

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of."""
        if step - times.every <= times.origin:
            return 1.0
        passed = times.every / (step - times.start)
        return -math.expm1((self.gamma + 1.0) * math.log1p(-passed))

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers."""
        return self.gamma, float(times.start)


@dataclass(frozen=True)
class Cosine:
    """Weights that make of so many samples the mean that imitates a cosine decay of the learning
    rate: that of the j-th is c_j / (c_1 + … + c_j) with c_j = f_(j-1) - f_j and
    f_j = (1 + cos(pi j / samples)) / 2."""

    on_device: ClassVar[int] = 9
    by_step: ClassVar[bool] = False

    samples: int

    def __post_init__(self) -> None:
        integer("samples", self.samples, least=1)

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of. Of sines, since differences of cosines would cancel."""
        j = min(n + 1, self.samples)
        last, first, whole = (_sin_pi(k / (2 * self.samples)) for k in (2 * j - 1, 1, j))
        return last * first / (whole * whole)

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers."""
        return (float(self.samples),)


@dataclass(frozen=True, repr=False)
class Table:
    """Weights of the samples, one after the other; the last is that of all later ones.

    The first is used only where the average has begun before its first sample, with the weights of
    ``initial="current"`` or ``"now"``: the first sample is a copy.
    """

    on_device: ClassVar[int] = 10
    by_step: ClassVar[bool] = False

    weights: tuple[float, ...]

    def __init__(self, weights: Sequence[float]) -> None:
        given = tuple(number(f"weights[{i}]", w) for i, w in enumerate(_listed(weights)))
        if not given:
            raise ValueError("Invalid weights: [] (expected at least one)")
        for i, w in enumerate(given):
            if not 0.0 <= w <= 1.0:
                raise ValueError(f"Invalid weights[{i}]: {w} (expected 0 <= weight <= 1)")
        object.__setattr__(self, "weights", given)

    def __repr__(self) -> str:
        if len(self.weights) <= SHOWN:
            return f"Table({list(self.weights)})"
        digest = hashlib.sha256(struct.pack(f"{len(self.weights)}d", *self.weights)).hexdigest()
        return f"Table(<{len(self.weights)} weights {digest[:12]}>)"

    def of(self, n: int, step: int, times: Times) -> float:
        """See Mean.of."""
        taken = n - (times.begins < math.inf)
        return self.weights[min(taken, len(self.weights) - 1)]

    def numbers(self, times: Times) -> tuple[float, ...]:
        """See Mean.numbers. Where the weights stand is added by whoever puts them there."""
        return (float(len(self.weights)),)


Named = Mean | Ema | Algorithm2 | HalfLife | Ramped | PowerEma | Cosine | Table
Weight = Named | Callable[[int, int], float]


def _sin_pi(x: float) -> float:
    return math.sin(math.pi * x)


def online(coefficients: Sequence[float]) -> Table:
    """The table of the weighted mean of so many samples: that of the j-th sample is its coefficient
    over the sum of those up to it."""
    given = [number(f"weights[{i}]", c) for i, c in enumerate(_listed(coefficients))]
    for i, c in enumerate(given):
        if not 0.0 <= c < math.inf:
            raise ValueError(f"Invalid weights[{i}]: {c} (expected 0 <= weight < inf)")
    if not any(given):
        raise ValueError(f"Invalid weights: {given} (expected a positive sum)")
    shares = [c / max(given) for c in given]  # whose sum is finite
    sums = accumulate(shares)
    return Table([c / s if s > 0.0 else 1.0 for c, s in zip(shares, sums, strict=True)])


def _listed(weights: Sequence[float]) -> list[float]:
    """Of a list, a tuple, an array or a tensor."""
    try:
        if not isinstance(weights, str | bytes) and len(weights) >= 0:  # no iterator
            return list(weights)
    except TypeError:
        pass
    raise TypeError(f"Invalid weights: {weights!r} (expected a sequence of numbers)")
