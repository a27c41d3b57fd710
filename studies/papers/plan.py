"""Which runs there are, and which learning rates are reported.

Learning rates. A list is run as it is, and all of it is reported. ``auto`` gives each system of
each setting the rate that does best on validation images: a fifth of the training images,
trained on the other four fifths (under --hard: those training images that are not among the 300),
with seeds that are not the results'. Best is the highest mean accuracy after the last epoch, of
equals the lowest mean loss. The grid is the same for all; while the best is its highest or lowest
rate, the next half decade is tried too, and at last the quarter decades beside the best. No test
image is looked at. The results then train on all training images.
A control takes the rate of the system that it is a control of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean

from studies.papers.jobs import Job
from studies.papers.settings import HALF_DECADES, LADDER, SWEEP_SEED, Setting
from studies.papers.store import Key, Store
from studies.papers.systems import controlled


@dataclass(frozen=True)
class Plan:
    """Everything to be run.

    Args:
        command: the table's name, or flatness.
        systems: names in SYSTEMS' order; of flatness the two to compare.
        baseline: the system that differences are taken to.
        rates: explicit learning rates, empty for ``auto``.
        grid: the sweep's first rates, a part of HALF_DECADES.
        sweeps: how many seeds the sweep has.
        rays, directions: of flatness.
    """

    command: str
    settings: tuple[Setting, ...]
    systems: tuple[str, ...]
    baseline: str
    rates: tuple[float, ...]
    grid: tuple[float, ...]
    sweeps: int
    seeds: tuple[int, ...]
    rays: int = 0
    directions: str = ""

    @property
    def swept(self) -> tuple[str, ...]:
        """Whose rates are chosen: flatness compares two solutions at one, the first system's."""
        if self.command == "flatness":
            return self.systems[:1]
        return tuple(name for name in self.systems if self.owner(name) == name)

    def owner(self, system: str) -> str:
        """Whose rate the system takes."""
        original = controlled(system)
        return original if original in self.systems else system

    def sweep_jobs(self, store: Store) -> list[Job]:
        """Those that are known to be wanted by what is finished so far."""
        if self.rates:
            return []
        return [
            Job("sweep", setting, system, lr, SWEEP_SEED + k)
            for setting in self.settings
            for system in self.swept
            for lr in self.tried(setting, system, store)
            for k in range(self.sweeps)
        ]

    def tried(self, setting: Setting, system: str, store: Store) -> tuple[float, ...]:
        """The sweep's rates, lowest first: the grid, beyond it while the best is an end of what was
        tried, and then the best one's neighbours in quarter decades."""
        low, high = HALF_DECADES.index(self.grid[0]), HALF_DECADES.index(self.grid[-1])
        while True:
            rates = HALF_DECADES[low : high + 1]
            found = [success(self, setting, system, lr, store) for lr in rates]
            if None in found:
                return rates
            best = rates[found.index(max(each for each in found if each is not None))]
            if best == rates[-1] != HALF_DECADES[-1]:
                high += 1
            elif best == rates[0] != HALF_DECADES[0]:
                low -= 1
            else:
                place = LADDER.index(best)
                return tuple(sorted({*rates, *LADDER[max(0, place - 1) : place + 2]}))

    def result_jobs(self, store: Store) -> list[Job]:
        """Those that report, once the sweep is finished."""
        if self.command == "flatness":
            pair = "+".join(self.systems)
            return [
                Job("flatness", setting, pair, lr, seed, self.rays, self.directions)
                for setting in self.settings
                for lr in self.rates_of(setting, self.systems[0], store)
                for seed in self.seeds
            ]
        return [
            Job("runs", setting, system, lr, seed)
            for setting in self.settings
            for seed in self.seeds
            for system in self.systems
            for lr in self.rates_of(setting, system, store)
        ]

    def rates_of(self, setting: Setting, system: str, store: Store) -> tuple[float, ...]:
        """The learning rates that are reported."""
        return self.rates or (best(self, setting, self.owner(system), store),)

    def count(self, store: Store) -> int:
        """Runs in all, as far as is known."""
        systems = 1 if self.command == "flatness" else len(self.systems)
        results = len(self.settings) * systems * max(1, len(self.rates)) * len(self.seeds)
        return len(self.sweep_jobs(store)) + results


def success(
    plan: Plan, setting: Setting, system: str, lr: float, store: Store
) -> tuple[float, float] | None:
    """Mean accuracy on validation images, then minus the mean loss; None if it is not finished."""
    keys = [Key("sweep", setting.name, system, lr, SWEEP_SEED + k) for k in range(plan.sweeps)]
    records = [store.records[key] for key in keys if key in store.records]
    if len(records) < len(keys):
        return None
    losses = [record["validation_loss"] for record in records]
    loss = math.inf if None in losses else mean(losses)  # null: diverged
    return mean(record["validation_accuracy"] for record in records), -loss


def best(plan: Plan, setting: Setting, system: str, store: Store) -> float:
    """Of the rates tried, once all are finished; of equals the lowest."""
    found = {
        lr: result
        for lr in plan.tried(setting, system, store)
        if (result := success(plan, setting, system, lr, store)) is not None
    }
    return max(found, key=lambda lr: found[lr])
