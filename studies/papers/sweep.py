"""Performs what of a plan is not finished yet, one by one or in processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from tqdm import tqdm

from studies.papers.jobs import Job, JobError, Where, perform
from studies.papers.plan import Plan
from studies.papers.store import Record, Store


def run(plan: Plan, store: Store, where: Where, processes: int) -> None:
    """Performs what is not finished yet; each run is in the file as soon as it is done."""
    with workers(processes) as pool, tqdm(unit="epoch", smoothing=0.05, disable=None) as bar:
        while True:
            sweep = unfinished(plan.sweep_jobs(store), store)
            todo = sweep or unfinished(plan.result_jobs(store), store)
            if not todo:
                return
            bar.total = bar.n + epochs(todo)
            if sweep:  # and what the results will take, whichever rates are chosen
                results = plan.count(store) - len(plan.sweep_jobs(store))
                bar.total += results * epochs_of_result(plan)
            for job, record in execute(todo, where, pool, bar):
                store.add(job.key, record)
                if bar.disable:  # not a terminal: a line for each run in place of the bar
                    line = f"{progress(plan, store)} {title(job)}: {told(record)}"
                    print(line, file=sys.stderr)


@contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to share the runs, or None for this one."""
    if processes == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()  # of the program that this is a part of
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=ignore_interrupts)
    try:
        yield pool
        pool.shutdown()
    except BaseException as error:  # after Ctrl-C too, nobody waits for runs that are not finished
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise JobError(
                "a process was killed, most likely out of memory: try fewer --jobs"
            ) from None
        raise


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def unfinished(jobs: Sequence[Job], store: Store) -> list[Job]:
    return [job for job in jobs if job.key not in store.records]


def progress(plan: Plan, store: Store) -> str:
    """Finished runs of the plan, of how many; a sweep may yet grow."""
    wanted = plan.count(store)
    sweep = plan.sweep_jobs(store)
    left = len(unfinished(sweep, store))
    if left == 0:
        left = len(unfinished(plan.result_jobs(store), store))
    else:
        left += wanted - len(sweep)
    return f"{wanted - left}/{wanted}"


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
    jobs: Sequence[Job], where: Where, pool: ProcessPoolExecutor | None, bar: tqdm[None]
) -> Iterator[tuple[Job, Record]]:
    """Jobs and their records as they finish."""
    if pool is None:
        for job in jobs:
            bar.set_description(title(job))
            yield job, perform(job, where, bar.update)
        return
    futures = {pool.submit(perform, job, where): job for job in jobs}
    for future in as_completed(futures):
        job = futures[future]
        record = future.result()
        bar.set_description(title(job))
        bar.update(epochs([job]))
        yield job, record
