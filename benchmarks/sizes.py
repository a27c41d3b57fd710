"""Step time against parameter count, and the copy bandwidth of this machine, in one process.

Each model is 62 equal tensors, as many as ResNet-18 has, so that one figure shows where the host's
time ends and the memory's begins. Run by ``python -m benchmarks``.
"""

from __future__ import annotations

import random
from statistics import median
from time import perf_counter

import torch

from benchmarks.measure.process import prepared
from benchmarks.measure.timing import Times, interleaved, switches
from benchmarks.rows.problem import small_tensors
from benchmarks.rows.providers import BASELINE, named

COUNTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
TENSORS = 62
ROWS = (BASELINE, "SGD + momentum", "RBWA", "EMA", "fused + AveragedModel (EMA)")
LEAST_SAMPLE = 2e-4  # seconds; shorter steps are timed several at a time
NANOSECONDS = 0.5  # a parameter takes about, to choose how many
ROUNDS, MOST_SECONDS = 40, 6.0
COPIED = 2**28  # bytes, more than any cache holds
COPIES = 20

Figures = dict[str, dict[str, dict[str, float]]]


def measure(threads: int, seed: int) -> Figures:
    """``interleaved``'s figures of each row, by parameter count (as JSON has them, in text)."""
    torch.set_num_threads(threads)
    found = {}
    for count in COUNTS:
        problem = small_tensors(TENSORS, count // TENSORS)
        providers = prepared(named(ROWS), problem)
        step = 2e-5 + NANOSECONDS * 1e-9 * count
        steps = max(1, round(LEAST_SAMPLE / step))
        rounds = max(8, min(ROUNDS, int(MOST_SECONDS / (len(ROWS) * steps * step))))
        found[str(TENSORS * (count // TENSORS))] = interleaved(
            providers, rounds, steps, seed, lambda: None
        )
    return found


def copy_bandwidth(threads: int, seed: int) -> float:
    """GB/s of `b.copy_(a)`, counting what it reads and writes: the median over pairs of buffers."""
    torch.set_num_threads(threads)
    buffers = [torch.ones(COPIED // 4) for _ in range(4)]
    times = Times()
    choose = random.Random(seed)
    for _ in range(COPIES):
        a, b = choose.sample(buffers, 2)
        before, start = switches(), perf_counter()
        b.copy_(a)
        seconds = perf_counter() - start
        times.add(seconds, switches() != before)
    return 2 * COPIED / median(times.kept) / 1e9


def run(threads: int, seed: int) -> dict[str, object]:
    """Both, for a fresh process."""
    return {"copy GB/s": copy_bandwidth(threads, seed), "sizes": measure(threads, seed)}
