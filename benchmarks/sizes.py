"""Step time against parameter count, and the bandwidth of a copy, in one process.

Each model is 62 equal tensors, as many as ResNet-18 has, so that one figure shows where the host's
time ends and the memory's begins. Run by ``python -m benchmarks``.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import bandwidth
from benchmarks.measure.clock import Cuda
from benchmarks.measure.proof import all_proven
from benchmarks.measure.runner import one_by_one
from benchmarks.measure.timing import on_host
from benchmarks.rows.problem import small_tensors
from benchmarks.rows.providers import BASELINE, ON_GPU, named
from benchmarks.rows.shapes import Layout

COUNTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
TENSORS = 62
ROWS = (BASELINE, "SGD + momentum", "RBWA", "EMA", "fused + AveragedModel (EMA)")
LEAST_SAMPLE = 2e-4  # seconds; shorter steps are timed several at a time
NANOSECONDS = 0.5  # a parameter takes about, to choose how many
ROUNDS, MOST_SECONDS = 40, 6.0
SECONDS_A_ROW = 0.2  # of a size on a GPU


def on_cpu(threads: int, seed: int) -> dict[str, Any]:
    """For a fresh process: "copy GB/s", and for each parameter count (in text, as JSON has it) the
    figures of `on_host` of each row."""
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"copy GB/s": bandwidth.of_host(seed), "sizes": {}}
    for count in COUNTS:
        problem = small_tensors(TENSORS, count // TENSORS)
        providers = all_proven(named(ROWS), problem)
        step = 2e-5 + NANOSECONDS * 1e-9 * count
        steps = max(1, round(LEAST_SAMPLE / step))
        rounds = max(8, min(ROUNDS, int(MOST_SECONDS / (len(ROWS) * steps * step))))
        found["sizes"][str(problem.numel)] = on_host(providers, rounds, steps, seed)
    return found


def on_gpu() -> dict[str, Any]:
    """The same on a GPU: "ms" and "warm ms" of the device with cold and warm caches, "host ms"; and
    "wrong", rows of ours that were not timed."""
    device = Cuda()
    rows = named(ROWS, ON_GPU)
    found: dict[str, Any] = {"sizes": {}, "wrong": []}
    for count in COUNTS:
        layout = Layout([(count // TENSORS,)] * TENSORS)
        result = one_by_one(device, layout, torch.float32, rows, ROUNDS, limit=SECONDS_A_ROW)
        found.setdefault("copy GB/s", result["copy GB/s"])
        found["wrong"] += result["wrong"]
        found["sizes"][str(layout.numel)] = {
            name: {
                "ms": row["cold ms"],
                "warm ms": row["warm ms"],
                "host ms": row["host ms"],
                "samples": row["rounds"],
            }
            for name, row in result["rows"].items()
        }
        device.release()
    return found
