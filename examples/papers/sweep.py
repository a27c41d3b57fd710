"""Which runs there are, which are finished, and the rest of them, one by one or in processes.

Learning rates. A list is run as it is, and all of it is reported. ``auto`` gives each system of
each setting the rate of a grid that does best on validation images: a fifth of the training images,
trained on the other four fifths (under --hard: those training images that are not among the 300),
with seeds that are not the results'. Best is the highest mean accuracy after the last epoch, of
equals the lowest mean loss. No test image is looked at. The results then train on all training
images.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from statistics import mean

from tqdm import tqdm

from examples.papers.jobs import Job, JobError, Where, perform
from examples.papers.settings import SWEEP_SEED, Setting
from examples.papers.store import Key, Record, Store


@dataclass(frozen=True)
class Plan:
    """Everything to be run.

    Args:
        command: the table's name, or flatness.
        systems: names in SYSTEMS' order; of flatness the two to compare.
        baseline: the system that differences are taken to.
        rates: explicit learning rates, empty for ``auto``.
        grid: the rates of the sweep.
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
        """Flatness compares two solutions at one rate, the first system's."""
        return self.systems[:1] if self.command == "flatness" else self.systems

    def sweep_jobs(self) -> list[Job]:
        if self.rates:
            return []
        return [
            Job("sweep", setting, system, lr, SWEEP_SEED + k)
            for setting in self.settings
            for system in self.swept
            for lr in self.grid
            for k in range(self.sweeps)
        ]

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
        return self.rates or (best(self, setting, system, store),)

    def count(self) -> int:
        """Runs in all."""
        systems = 1 if self.command == "flatness" else len(self.systems)
        results = len(self.settings) * systems * max(1, len(self.rates)) * len(self.seeds)
        return len(self.sweep_jobs()) + results


def best(plan: Plan, setting: Setting, system: str, store: Store) -> float:
    """The rate of the grid that did best on validation images."""

    def success(lr: float) -> tuple[float, float]:
        keys = [Key("sweep", setting.name, system, lr, SWEEP_SEED + k) for k in range(plan.sweeps)]
        records = [store.records[key] for key in keys]
        losses = [record["validation_loss"] for record in records]
        loss = mean(losses) if None not in losses else math.inf  # null: diverged
        return mean(record["validation_accuracy"] for record in records), -loss

    return max(plan.grid, key=success)


def run(plan: Plan, store: Store, where: Where, processes: int) -> None:
    """Performs what is not finished yet; each run is in the file as soon as it is done."""
    done, wanted = 0, plan.count()
    with tqdm(unit="epoch", smoothing=0.05, disable=None) as bar:
        for stage in ("sweep", "results"):
            jobs = plan.sweep_jobs() if stage == "sweep" else plan.result_jobs(store)
            todo = [job for job in jobs if job.key not in store.records]
            done += len(jobs) - len(todo)
            bar.total = epochs(todo) + (bar.n if stage == "results" else 0)
            if stage == "sweep":  # what the results will take, whichever rates are chosen
                bar.total += (wanted - len(jobs)) * epochs_of_result(plan)
            with closing(execute(todo, where, processes, bar)) as finished:
                for job, record in finished:
                    store.add(job.key, record)
                    done += 1
                    if bar.disable:  # not a terminal: a line for each run in place of the bar
                        print(f"{done}/{wanted} {title(job)}: {told(record)}", file=sys.stderr)


def epochs(jobs: Sequence[Job]) -> int:
    """Flatness trains two networks."""
    return sum(job.setting.epochs * (2 if job.section == "flatness" else 1) for job in jobs)


def epochs_of_result(plan: Plan) -> int:
    return plan.settings[0].epochs * (2 if plan.command == "flatness" else 1)


def told(record: Record) -> str:
    """A finished run's line."""
    if "validation_accuracy" in record:
        return f"{record['validation_accuracy']:.2f} % of the validation images"
    if "test_accuracy" in record:
        return f"{record['test_accuracy'][-1]:.2f} %"
    return f"{record['seconds']} s"


def title(job: Job) -> str:
    kind = {"sweep": "sweep: ", "runs": "", "flatness": "flatness: "}[job.section]
    return f"{kind}{job.setting.name} {job.system}, lr {job.lr:g}, seed {job.seed}"


def execute(
    jobs: Sequence[Job], where: Where, processes: int, bar: tqdm[None]
) -> Generator[tuple[Job, Record], None, None]:
    """Jobs and their records as they finish."""
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            bar.set_description(title(job))
            yield job, perform(job, where, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=ignore_interrupts)
    try:
        futures = {pool.submit(perform, job, where): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            record = future.result()
            bar.set_description(title(job))
            bar.update(epochs([job]))
            yield job, record
        pool.shutdown()
    except BaseException as error:  # after Ctrl-C too, nobody waits for runs that are not finished
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise JobError(
                "a process was killed, most likely out of memory: try fewer --jobs"
            ) from None
        raise


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
