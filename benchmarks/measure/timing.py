"""Interleaved timing: one step of each provider in turn, in another order every round."""

from __future__ import annotations

import gc
import random
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from benchmarks.rows.provider import Provider, over_period

LEAST_KEPT = 5  # undisturbed samples; with fewer the median is taken over all of them


@dataclass
class Times:
    """Seconds of a provider's steps, and which of them were disturbed.

    A sample is disturbed if any thread of the process was taken off its core while it ran:
    involuntary context switches of the process, counted by the kernel (getrusage, ru_nivcsw).
    """

    samples: list[tuple[float, bool]] = field(default_factory=list)

    def add(self, seconds: float, disturbed: bool) -> None:
        self.samples.append((seconds, disturbed))

    @property
    def kept(self) -> list[float]:
        """The undisturbed samples, or all of them if those are too few."""
        kept = [seconds for seconds, disturbed in self.samples if not disturbed]
        enough = len(kept) >= min(LEAST_KEPT, len(self.samples))
        return kept if enough else [seconds for seconds, _ in self.samples]

    @property
    def disturbed(self) -> int:
        """How many samples were."""
        return sum(disturbed for _, disturbed in self.samples)


def switches() -> int:
    """Times that a thread of this process lost its core against its will."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def interleaved(
    providers: list[Provider], rounds: int, steps: int, seed: int, after_round: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Times `rounds` samples of `steps` steps of each provider, in random order every round.

    With more than one step a sample, gradients are put in place once a sample.

    Returns:
        For each provider: "ms" of one step (the median; for an average that is sampled every few
        steps, the medians of steps with and without a sample, weighted as they occur), "samples"
        and how many of them were "disturbed".
    """
    order = list(providers)
    shuffle = random.Random(seed).shuffle
    light = {p.name: Times() for p in providers}
    heavy = {p.name: Times() for p in providers}
    gc.collect()
    gc.freeze()  # or every collection would walk all of torch, 0.2 s
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for provider in order:
                sampled = provider.prepare()
                step = provider.step
                before = switches()
                start = perf_counter()
                for _ in range(steps):
                    step()
                seconds = perf_counter() - start
                times = heavy if sampled else light
                times[provider.name].add(seconds / steps, switches() != before)
            gc.collect()
            after_round()
    finally:
        gc.enable()
        gc.unfreeze()
    return {p.name: _summary(light[p.name], heavy[p.name], p.period) for p in providers}


def _summary(light: Times, heavy: Times, period: int) -> dict[str, float]:
    both = [times for times in (light, heavy) if times.samples]
    with_sample = median(both[-1].kept)
    without = median(both[0].kept)
    return {
        "ms": 1e3 * over_period(without, with_sample, period),
        "samples": sum(len(times.samples) for times in both),
        "disturbed": sum(times.disturbed for times in both),
    }
