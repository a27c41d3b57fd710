"""The usual averaging policies, by their names.

Steps are counted from 1 and only when taken; an epoch has ``steps_per_epoch`` of them. Arguments
that several have mean what Average says.

Sources: SWA, Izmailov et al. 2018; RSWA, RBWA and RBWA-E, the recurrent (batch) weight averaging
paper; Lookahead, Zhang et al. 2019; Switch-EMA, Li et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec

from rbwa_fused.average import Algorithm2, Average, Ema, Initial, Mean
from rbwa_fused.numbers import fraction, integer, number

Given = ParamSpec("Given")


def _prints_its_call(make: Callable[Given, Average]) -> Callable[Given, Average]:
    """A function whose policies print as its call."""

    @wraps(make)
    def made(*args: Given.args, **kwargs: Given.kwargs) -> Average:
        given = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
        return make(*args, **kwargs).written(f"{make.__name__}({', '.join(given)})")

    return made


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
    decay: float = 0.999,
    start: int = 0,
    every: int = 1,
    *,
    initial: Initial = "first_sample",
    offset: int = 0,
) -> Average:
    """Exponential moving average kept beside the weights (shadow weights), 0 <= decay < 1.

    For a scheduled decay use ``Average(lambda n, step: 1 - decay(step))``.
    """
    return Average(Ema(decay), start=start, every=every, initial=initial, offset=offset)


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
