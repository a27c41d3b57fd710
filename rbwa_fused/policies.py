"""The usual averaging policies, by their names.

Steps are counted from 1 and only when taken; an epoch has ``steps_per_epoch`` of them. Arguments
that several have mean what Average says.

Sources: SWA, Izmailov et al. 2018; RSWA, RBWA and RBWA-E, the recurrent (batch) weight averaging
paper; Lookahead, Zhang et al. 2019; Switch-EMA, Li et al. 2024; power_ema, Karras et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec

from rbwa_fused.average import Average, Initial
from rbwa_fused.numbers import fraction, integer, number
from rbwa_fused.power import gamma_of
from rbwa_fused.ramp import Ramp
from rbwa_fused.weights import (
    SHOWN,
    Algorithm2,
    Cosine,
    Ema,
    HalfLife,
    Mean,
    PowerEma,
    Ramped,
    Table,
    Weight,
    online,
)

Given = ParamSpec("Given")
# Defaults, as objects that nobody else passes: whether an argument was given is known by `is`.
DECAY, SIGMA_REL = float("0.999"), float("0.05")


def _prints_its_call(make: Callable[Given, Average]) -> Callable[Given, Average]:
    """A function whose policies print as its call."""

    @wraps(make)
    def made(*args: Given.args, **kwargs: Given.kwargs) -> Average:
        given = [*map(_text, args), *(f"{name}={_text(value)}" for name, value in kwargs.items())]
        return make(*args, **kwargs).written(f"{make.__name__}({', '.join(given)})")

    return made


def _text(value: Any) -> str:
    """An argument as it is written, but for long sequences."""
    try:
        if not isinstance(value, str) and len(value) > SHOWN:
            return f"<{len(value)} weights>"
    except TypeError:
        pass
    return repr(value)


@_prints_its_call
def mean(
    start: int = 0,
    every: int = 1,
    write_back_every: int = 0,
    *,
    initial: Initial = "first_sample",
    offset: int = 0,
) -> Average:
    """Running mean of the samples; units are steps."""
    return Average(
        Mean(),
        start=start,
        every=every,
        write_back_every=write_back_every,
        initial=initial,
        offset=offset,
    )


@_prints_its_call
def ema(
    decay: float = DECAY,
    start: int = 0,
    every: int = 1,
    *,
    half_life: float | None = None,
    ramp: Ramp | None = None,
    initial: Initial = "first_sample",
    offset: int = 0,
) -> Average:
    """Exponential moving average kept beside the weights (shadow weights).

    Args:
        decay: 0 <= decay < 1, of a sample, so that a larger ``every`` makes the average longer
            (default: 0.999).
        half_life (steps, > 0): by when a step counts half, whatever ``every`` is; in place of a
            decay. With a ramp it may stand beside one, and the ramp ends at the larger weight.
        ramp: of :mod:`rbwa_fused.ramp`: the first samples weigh more.

    Raises:
        TypeError: for a decay and a half-life without a ramp.

    For a decay of your own use ``table``, or ``Average(lambda n, step: 1 - decay(step))``.
    """
    given = half_life is None or decay is not DECAY
    if given and half_life is not None and ramp is None:
        raise TypeError(
            f"Invalid half_life: {half_life} (expected None beside decay={decay}: both say how "
            "long the average is)"
        )
    weight: Weight
    if ramp is not None:
        weight = Ramped(ramp, number("decay", decay) if given else None, half_life)
    else:
        weight = Ema(decay) if half_life is None else HalfLife(half_life)
    return Average(weight, start=start, every=every, initial=initial, offset=offset)


@_prints_its_call
def power_ema(
    sigma_rel: float = SIGMA_REL,
    start: int = 0,
    every: int = 1,
    *,
    gamma: float | None = None,
    initial: Initial = "first_sample",
    offset: int = 0,
) -> Average:
    """Power-function EMA (Karras et al. 2024): its length is a constant share of the run so far.

    Args:
        sigma_rel: that share, as the standard deviation of the average's profile relative to the
            steps since ``start``, 0 < sigma_rel < 1/sqrt(12) (default: 0.05). Half of the run, as
            the mean has it, is 1/sqrt(12); 0.05 and 0.10 are usual.
        gamma: the power itself, > -1, in place of ``sigma_rel`` (see rbwa_fused/power.py).
    """
    if gamma is not None and sigma_rel is not SIGMA_REL:
        raise TypeError(f"Invalid gamma: {gamma} (expected None beside sigma_rel={sigma_rel})")
    weight = PowerEma(gamma_of(sigma_rel) if gamma is None else gamma)
    return Average(weight, start=start, every=every, initial=initial, offset=offset)


@_prints_its_call
def merge(
    start: int,
    stop: int | None = None,
    decay: Literal["linear", "sqrt", "cosine"] | Sequence[float] = "linear",
    every: int = 1,
) -> Average:
    """Weighted mean of a window of the run that imitates a decay of the learning rate over it.

    The mean of weights c_j (of sum 1) is what SGD would have come to, had the learning rate been
    multiplied by 1, 1 - c_1, 1 - c_1 - c_2, … on the same gradients (docs/equivalences.md).

    Args:
        start, stop (steps): the window; samples follow steps start + every, … up to stop. Linear
            and square-root windows need no end.
        decay: ``"linear"``, to zero, which is the plain mean; ``"sqrt"``, 1 - sqrt(j / samples);
            ``"cosine"``, (1 + cos(pi j / samples)) / 2, which needs ``stop``; or the weights
            c_j >= 0 of the samples themselves, of any sum, which say ``stop``.
        every (steps, >= 1): between samples (default: 1).

    Several windows, which may overlap, are several averages: ``average=[merge(…), merge(…)]``.
    """
    start, every = integer("start", start, least=0), integer("every", every, least=1)
    if stop is not None:
        stop = integer("stop", stop, least=start + every)
    weight: Weight
    if isinstance(decay, str):
        if decay not in ("linear", "sqrt", "cosine"):
            raise ValueError(
                f"Invalid decay: {decay!r} (expected 'linear', 'sqrt', 'cosine' or weights)"
            )
        if decay != "cosine":
            weight = Mean() if decay == "linear" else PowerEma(-0.5)
        elif stop is None:
            raise TypeError("Invalid stop: None (expected a step where the decay is 'cosine')")
        else:
            weight = Cosine((stop - start) // every)
    else:
        weight = online(decay)
        samples = len(weight.weights)
        if stop is None:
            stop = start + every * samples
        elif (stop - start) // every != samples:
            raise ValueError(
                f"Invalid decay: {samples} weights (expected {(stop - start) // every}, one for "
                f"each sample up to stop={stop})"
            )
    return Average(weight, start=start, every=every, stop=stop)


@_prints_its_call
def table(
    weights: Sequence[float],
    start: int = 0,
    every: int = 1,
    write_back_every: int = 0,
    *,
    initial: Initial = "first_sample",
    offset: int = 0,
) -> Average:
    """An average whose samples have given weights, each in [0, 1].

    Args:
        weights: one after the other; the last one is that of all later samples. The first is used
            where the average has begun before its first sample, by ``initial="current"`` or
            ``"now"``: a first sample is a copy.
    """
    return Average(
        Table(weights),
        start=start,
        every=every,
        write_back_every=write_back_every,
        initial=initial,
        offset=offset,
    )


@_prints_its_call
def swa(
    start: int = 0,
    every: int = 1,
    initial: Initial = "first_sample",
    *,
    offset: int = 0,
) -> Average:
    """Stochastic weight averaging (Izmailov et al.; the RBWA paper's Algorithm 1).

    ``every`` is the cycle length in steps; samples are taken at cycle ends. ``"current"`` takes
    the weights at ``start`` as the first sample, as Izmailov et al. do.
    """
    return Average(Mean(), start=start, every=every, initial=initial, offset=offset)


@_prints_its_call
def rswa(steps_per_epoch: int, start_epoch: int = 10) -> Average:
    """Recurrent SWA: the mean of epoch ends, written back at each."""
    epoch = integer("steps_per_epoch", steps_per_epoch, least=1)
    start = integer("start_epoch", start_epoch, least=0) * epoch
    return Average(Mean(), start=start, every=epoch, write_back_every=epoch)


@_prints_its_call
def rbwa(
    steps_per_epoch: int,
    start_epoch: int = 10,
    count: Literal["running", "algorithm2"] = "running",
) -> Average:
    """Recurrent batch weight averaging: averaged and written back after every batch.

    ``"running"`` is the paper's eq. 1-2, ``"algorithm2"`` the count that its Algorithm 2 prints.
    """
    epoch = integer("steps_per_epoch", steps_per_epoch, least=1)
    epochs = integer("start_epoch", start_epoch, least=0)
    if count not in ("running", "algorithm2"):
        raise ValueError(f"Invalid count: {count!r} (expected 'running' or 'algorithm2')")
    weight = Mean() if count == "running" else Algorithm2(epoch, epochs)
    return Average(weight, start=epochs * epoch, write_back_every=1)


@_prints_its_call
def rbwa_e(beta: float = 0.9, *, steps_per_epoch: int, start_epoch: int = 10) -> Average:
    """RBWA with an exponential moving average (eq. 4-5), 0 <= beta < 1."""
    epoch = integer("steps_per_epoch", steps_per_epoch, least=1)
    start = integer("start_epoch", start_epoch, least=0) * epoch
    return Average(Ema(fraction("beta", beta)), start=start, write_back_every=1)


@_prints_its_call
def lookahead(k: int = 5, alpha: float = 0.5) -> Average:
    """Lookahead: every k steps the slow weights move by 0 < alpha <= 1 and are written back.

    The slow weights start at the initial weights.
    """
    k = integer("k", k, least=1)
    alpha = number("alpha", alpha)
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"Invalid alpha: {alpha} (expected 0 < alpha <= 1)")
    return Average(Ema(1.0 - alpha), every=k, write_back_every=k, initial="current")


@_prints_its_call
def switch_ema(decay: float = 0.999, *, steps_per_epoch: int) -> Average:
    """Switch-EMA: an EMA of every step, written back once an epoch, 0 <= decay < 1."""
    epoch = integer("steps_per_epoch", steps_per_epoch, least=1)
    return Average(Ema(decay), write_back_every=epoch)
