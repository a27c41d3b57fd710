"""One run as a value: what is trained where, and its record. Any process can perform it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch

from studies.papers import datasets, flatness, training
from studies.papers.datasets import Data, Part, Source
from studies.papers.networks import VGG_SIDE
from studies.papers.settings import Setting
from studies.papers.store import Key, Record
from studies.papers.systems import SYSTEMS


class JobError(Exception):
    """A run that cannot be finished on this machine."""


class Where(NamedTuple):
    """What decides on no result: where the archives lie, and who computes."""

    root: str
    device: str
    threads: int


class Job(NamedTuple):
    """A run: ``section`` is sweep (tested on validation images), runs, or flatness."""

    section: str
    setting: Setting
    system: str
    lr: float
    seed: int
    rays: int = 0
    directions: str = ""

    @property
    def key(self) -> Key:
        return Key(self.section, self.setting.name, self.system, self.lr, self.seed)


def data_of(setting: Setting, part: Part, where: Where) -> Data:
    """The setting's images; VGG-16 gets no smaller ones than it can halve five times."""
    source = Source(setting.data, setting.hard, where.root)
    side = VGG_SIDE if setting.model == "vgg16" else 0
    return datasets.load(source, part, setting.dtype, side, where.device)


def perform(job: Job, where: Where, on_epoch: Callable[[], object] = lambda: None) -> Record:
    """Trains and tests; the record of results.json.

    Raises:
        JobError: out of memory.
    """
    torch.set_num_threads(where.threads)
    begin = perf_counter()
    with memory_errors_told(job.setting, where):
        record = record_of(job, data_of(job.setting, part_of(job), where), on_epoch)
    return record | {"seconds": round(perf_counter() - begin, 2)}


@contextmanager
def memory_errors_told(setting: Setting, where: Where) -> Iterator[None]:
    """Raises JobError for whatever way PyTorch has to say that memory is short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        size = setting.batch_size
        raise JobError(
            f"out of memory on {where.device} with {setting.model} at batch size {size}: try "
            f"--batch-size {max(2, size // 2)}"
        ) from None


def part_of(job: Job) -> Part:
    return "sweep" if job.section == "sweep" else "final"


def record_of(job: Job, data: Data, on_epoch: Callable[[], object]) -> Record:
    setting, lr, seed = job.setting, job.lr, job.seed
    if job.section == "flatness":
        pair = [SYSTEMS[name] for name in job.system.split("+")]
        return flatness.probe(pair, setting, lr, seed, data, job.rays, job.directions, on_epoch)
    system = SYSTEMS[job.system]
    if job.section != "sweep":
        return dict(training.train(system, setting, lr, seed, data, on_epoch))
    curves = training.train(system, setting, lr, seed, data, on_epoch, "at the end")
    return {
        "validation_accuracy": curves["test_accuracy"][-1],
        "validation_loss": curves["test_loss"][-1],
    }


def out_of_memory(error: Exception) -> bool:
    """CUDA has an error of its own for it; the CPU's allocator only has words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "not enough memory" in str(error) or "can't allocate memory" in str(error)
    )
