"""Interleaved timing on a device: the device's time with cold and warm caches, and the host's.

A visit to a row is three of its steps. The first starts on an idle device and gives the host's
time: a host clock around the call. Then the device spins while the host queues the rest, so that
no gap between launches is timed. The caches are evicted, and the second step, between two marks, is
cold; the third, between two more, is warm. Evicting leaves the cache full of written lines, which
the cold step has to write to memory, as a step in a loop has to write those of the step before it.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

from benchmarks.measure.clock import Device
from benchmarks.rows.provider import Provider, over_period

COPY_BYTES = 2**30
COPIES = 20
EMPTY_KERNELS = 50
EMPTY_LEAD = 0.005  # seconds, more than the host takes to queue them
LEAST_ROUNDS = 10  # visits of three steps until every tenth step was each of the three
LEAD = 1.5  # spins in units of the time that the host takes to queue a visit
CLOCKS = ("host", "cold", "warm")


@dataclass
class Series:
    """Seconds of a row's steps, with and without a sample of its average."""

    without: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)

    def add(self, seconds: float, sampled: bool) -> None:
        (self.sampled if sampled else self.without).append(seconds)

    def ms(self, period: int) -> float:
        """Milliseconds of a step: medians, weighted as steps with a sample occur."""
        both = [times for times in (self.without, self.sampled) if times]
        return 1e3 * over_period(median(both[0]), median(both[-1]), period)

    def quartiles_ms(self) -> list[float]:
        """First and third quartile of what is more frequent."""
        _, many = sorted((self.without, self.sampled), key=len)
        first, _, third = quantiles(many, n=4)
        return [1e3 * first, 1e3 * third]


def interleaved(
    device: Device,
    providers: Sequence[Provider],
    rounds: int,
    seed: int,
    limit: float,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Times `rounds` visits to each provider, in random order every round.

    It stops early after `limit` seconds, but not before LEAST_ROUNDS.

    Returns:
        For each provider "host ms", "cold ms" and "warm ms" of a step, "cold quartiles ms", and
        the "rounds" that were made.
    """
    order = list(providers)
    shuffle = random.Random(seed).shuffle
    series = {p.name: {clock: Series() for clock in CLOCKS} for p in order}
    leads: dict[str, float] = {}
    made = 0
    gc.collect()
    gc.disable()
    try:
        for provider in order:  # not timed; says how long queueing takes
            unused = {clock: Series() for clock in CLOCKS}
            leads[provider.name] = LEAD * _visit(device, provider, 0.0, unused)
        start = perf_counter()
        while made < rounds and (made < LEAST_ROUNDS or perf_counter() - start < limit):
            shuffle(order)
            for provider in order:
                name = provider.name
                queueing = _visit(device, provider, leads[name], series[name])
                leads[name] = min(leads[name], LEAD * queueing)
            made += 1
            after_round()
    finally:
        gc.enable()
    return {p.name: {**_summary(series[p.name], p.period), "rounds": made} for p in providers}


def _visit(device: Device, provider: Provider, lead: float, series: dict[str, Series]) -> float:
    """Takes the three steps. Returns the seconds in which the host queued the last two."""
    sampled = provider.prepare()
    device.synchronize()
    start = perf_counter()
    provider.step()
    series["host"].add(perf_counter() - start, sampled)
    device.synchronize()

    start = perf_counter()
    device.spin(lead)
    device.evict()
    marks = []
    for clock in ("cold", "warm"):
        sampled = provider.prepare()
        before = device.mark()
        provider.step()
        marks.append((clock, sampled, before, device.mark()))
    queueing = perf_counter() - start
    device.synchronize()
    for clock, sampled, before, after in marks:
        series[clock].add(device.seconds(before, after), sampled)
    return queueing


def _summary(series: dict[str, Series], period: int) -> dict[str, Any]:
    return {
        **{f"{clock} ms": series[clock].ms(period) for clock in CLOCKS},
        "cold quartiles ms": series["cold"].quartiles_ms(),
    }


def copy_bandwidth(device: Device, size: int = COPY_BYTES) -> float:
    """GB/s of a copy of `size` bytes on the device: bytes read and written, median."""
    source = torch.ones(size, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    target.copy_(source)
    marks = []
    for _ in range(COPIES):
        before = device.mark()
        target.copy_(source)
        marks.append((before, device.mark()))
    device.synchronize()
    return 2 * size / median(device.seconds(*pair) for pair in marks) / 1e9


def empty_ms(device: Device) -> float:
    """Milliseconds between two marks with an empty kernel between them: what a launch costs the
    device beside its work; median."""
    device.synchronize()
    device.spin(EMPTY_LEAD)
    marks = []
    for _ in range(EMPTY_KERNELS):
        before = device.mark()
        device.nothing()
        marks.append((before, device.mark()))
    device.synchronize()
    return 1e3 * median(device.seconds(*pair) for pair in marks)
