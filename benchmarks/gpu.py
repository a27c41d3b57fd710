"""The benchmark of benchmarks.step on a GPU: what is measured on what, in one process.

Launches are counted after all timing, since a profiler leaves its hooks in the process.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.clock import Cuda
from benchmarks.measure.progress import bar
from benchmarks.measure.runner import LIMIT, count_launches, one_by_one
from benchmarks.measure.timing import LEAST_ROUNDS
from benchmarks.report.tables import gpu_tables
from benchmarks.report.written import write_json
from benchmarks.rows import shapes
from benchmarks.rows.provider import Row
from benchmarks.rows.providers import gpu_rows, selected
from rbwa_fused.engine import backends as fused

BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what."""

    device: Cuda
    layouts: dict[str, shapes.Layout]
    dtype: torch.dtype
    rows: list[Row]
    rounds: int


def backends(asked: str | None, device: torch.device) -> tuple[str, ...]:
    """The backend that was asked for, or all that there are; those that are missing are said.

    Raises:
        ValueError: if the one that was asked for is missing.
    """
    names = BACKENDS if asked is None else (asked,)
    missing = {name: why for name in names if (why := fused.unavailable(name, device)) is not None}
    if asked is not None and missing:
        raise ValueError(f"backend {asked!r} {missing[asked]}")
    for name, why in missing.items():
        print(f"skipped: rbwa_fused on {name} ({why})")
    return tuple(name for name in names if name not in missing)


def planned(args: argparse.Namespace) -> Plan:
    """What the command line of benchmarks.step asks for.

    Raises:
        ValueError: for a model, a row or a backend that there is not, or too few rounds.
    """
    models = args.model or list(shapes.MODELS)
    for name in models:
        if name not in shapes.MODELS:
            raise ValueError(f"unknown model: {name} (expected one of {', '.join(shapes.MODELS)})")
    if args.repeats < LEAST_ROUNDS:
        raise ValueError(f"--repeats must be at least {LEAST_ROUNDS} on cuda, not {args.repeats}")
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device")
    device = Cuda()
    rows = selected(args.only, gpu_rows(backends(args.backend, device.device), device))
    layouts = {name: shapes.MODELS[name]() for name in models}
    return Plan(device, layouts, getattr(torch, args.dtype), rows, args.repeats)


def run(plan: Plan, write: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """Measures every model. `write` gets the results so far after every row, and again as their
    launches are counted."""
    device = plan.device
    results: list[dict[str, Any]] = []
    gc.collect()
    gc.freeze()  # what exists now is not looked at again whenever a row is freed
    try:
        with bar(len(plan.layouts) * (len(plan.rows) - 1), "row") as progress:

            def done(result: dict[str, Any]) -> None:
                progress.update()
                write([*results, {"model": name, **result}])

            for name, layout in plan.layouts.items():
                found = one_by_one(device, layout, plan.dtype, plan.rows, plan.rounds, done)
                results.append({"model": name, **found})
                write(results)
                device.release()
        for layout, result in zip(plan.layouts.values(), results, strict=True):
            if result["rows"]:
                count_launches(device, layout, plan.rows, result, lambda: write(results))
                device.release()
    finally:
        gc.unfreeze()
    return results


def main(plan: Plan, out: Path) -> int:
    """Measures, prints the tables, writes the results; 1 if a row of ours was wrong."""
    description = plan.device.description()
    settings = {"rounds": plan.rounds, "seconds a row": LIMIT}

    def write(problems: list[dict[str, Any]]) -> None:
        write_json(out, {"machine": description, "settings": settings, "problems": problems})

    results = run(plan, write)
    print(gpu_tables(description, results, plan.rows))
    print(f"\nwritten: {out}")
    return int(any(result["wrong"] for result in results))
