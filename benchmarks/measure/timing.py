"""Interleaved timing: each row in turn, in another order every round, on the host or on a device.

On the host a visit to a row is one sample, of one or several steps. On a device it is three steps.
The first starts on an idle device and gives the host's time: a host clock around the call. Then the
device spins while the host queues the rest, so that no gap between launches is timed. The caches
are evicted, and the second step, between two marks, is cold; the third, between two more, is warm.
Evicting leaves the cache full of written lines, which the cold step has to write to memory, as a
step in a loop has to write those of the step before it.
"""

from __future__ import annotations

import gc
import math
import random
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeVar

from benchmarks.measure.clock import Cuda
from benchmarks.rows.provider import Provider, over_period

LEAST_KEPT = 5  # undisturbed samples; with fewer the median is taken over all of them
LEAST_ROUNDS = 10  # visits of three steps until every tenth step was each of the three
LEAD = 1.5  # spins in units of the time that the host takes to queue a visit
CLOCKS = ("host", "cold", "warm")

Item = TypeVar("Item")


@dataclass
class Samples:
    """Seconds of a row's steps, whether each was disturbed, and whether it sampled the average.

    A step is disturbed if any thread of the process was taken off its core while it ran:
    involuntary context switches of the process, counted by the kernel (getrusage, ru_nivcsw).
    """

    taken: list[tuple[float, bool, bool]] = field(default_factory=list)

    def add(self, seconds: float, disturbed: bool = False, sampled: bool = False) -> None:
        self.taken.append((seconds, disturbed, sampled))

    @property
    def disturbed(self) -> int:
        """How many were."""
        return sum(disturbed for _, disturbed, _ in self.taken)

    def kept(self, sampled: bool = False) -> list[float]:
        """The undisturbed ones, or all of them if those are too few."""
        own = [sample for sample in self.taken if sample[2] == sampled]
        kept = [seconds for seconds, disturbed, _ in own if not disturbed]
        enough = len(kept) >= min(LEAST_KEPT, len(own))
        return kept if enough else [seconds for seconds, _, _ in own]

    def ms(self, period: int = 1) -> float:
        """Milliseconds of a step: medians, weighted as steps with a sample occur."""
        both = [times for times in (self.kept(False), self.kept(True)) if times]
        return 1e3 * over_period(median(both[0]), median(both[-1]), period)

    def quartiles_ms(self) -> list[float]:
        """First and third quartile of the steps that are more frequent."""
        _, many = sorted((self.kept(False), self.kept(True)), key=len)
        first, _, third = quantiles(many, n=4)
        return [1e3 * first, 1e3 * third]


def switches() -> int:
    """Times that a thread of this process lost its core against its will."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def timed(call: Callable[[], object], times: int = 1) -> tuple[float, bool]:
    """Seconds of a call by the host's clock, of several in a row, and whether it was disturbed."""
    before = switches()
    start = perf_counter()
    for _ in range(times):
        call()
    seconds = perf_counter() - start
    return seconds / times, switches() != before


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside, but where somebody asks; then what was there before is not
    looked at, or every collection would walk all of torch, 0.2 s."""
    gc.collect()
    frozen = gc.get_freeze_count() > 0  # by somebody who times several rows, one after the other
    if not frozen:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if not frozen:
            gc.unfreeze()


def in_rounds(
    items: Sequence[Item],
    visit: Callable[[Item], object],
    rounds: int,
    seed: int,
    *,
    limit: float = math.inf,
    least: int = 0,
    after_round: Callable[[], object] = lambda: None,
) -> int:
    """Visits all items `rounds` times, in random order every round; stops early after `limit`
    seconds, but not before `least` rounds.

    Returns:
        The rounds that were made.
    """
    order, shuffle = list(items), random.Random(seed).shuffle
    start = perf_counter()
    for made in range(rounds):
        if made >= least and perf_counter() - start > limit:
            return made
        shuffle(order)
        for item in order:
            visit(item)
        after_round()
    return rounds


def on_host(
    providers: Sequence[Provider],
    rounds: int,
    steps: int,
    seed: int,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Times `rounds` samples of `steps` steps of each provider.

    With more than one step a sample, gradients are put in place once a sample.

    Returns:
        For each provider: "ms" of one step (the median; for an average that is sampled every few
        steps, the medians of steps with and without a sample, weighted as they occur), "samples"
        and how many of them were "disturbed".
    """
    samples = {p.name: Samples() for p in providers}

    def visit(provider: Provider) -> None:
        sampled = provider.prepare()
        samples[provider.name].add(*timed(provider.step, steps), sampled)

    def collect() -> None:
        gc.collect()
        after_round()

    with uncollected():
        in_rounds(providers, visit, rounds, seed, after_round=collect)
    return {
        p.name: {
            "ms": samples[p.name].ms(p.period),
            "samples": len(samples[p.name].taken),
            "disturbed": samples[p.name].disturbed,
        }
        for p in providers
    }


def on_device(
    device: Cuda, providers: Sequence[Provider], rounds: int, seed: int, limit: float
) -> dict[str, dict[str, Any]]:
    """Times `rounds` visits to each provider, or those of `limit` seconds, but LEAST_ROUNDS.

    Returns:
        For each provider "host ms", "cold ms" and "warm ms" of a step, "cold quartiles ms", and
        the "rounds" that were made.
    """
    samples = {p.name: {clock: Samples() for clock in CLOCKS} for p in providers}
    leads: dict[str, float] = {}

    def visit(provider: Provider) -> None:
        name = provider.name
        queueing = _three_steps(device, provider, leads[name], samples[name])
        leads[name] = min(leads[name], LEAD * queueing)

    with uncollected():
        for provider in providers:  # not timed; says how long queueing takes
            unused = {clock: Samples() for clock in CLOCKS}
            leads[provider.name] = LEAD * _three_steps(device, provider, 0.0, unused)
        made = in_rounds(providers, visit, rounds, seed, limit=limit, least=LEAST_ROUNDS)
    return {
        p.name: {
            **{f"{clock} ms": own.ms(p.period) for clock, own in samples[p.name].items()},
            "cold quartiles ms": samples[p.name]["cold"].quartiles_ms(),
            "rounds": made,
        }
        for p in providers
    }


def _three_steps(
    device: Cuda, provider: Provider, lead: float, samples: dict[str, Samples]
) -> float:
    """Returns the seconds in which the host queued the last two."""
    sampled = provider.prepare()
    device.synchronize()
    samples["host"].add(timed(provider.step)[0], sampled=sampled)
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
        samples[clock].add(device.seconds(before, after), sampled=sampled)
    return queueing
