"""The suite on a GPU, in under ten minutes: ``python -m benchmarks`` where torch sees one.

`benchmarks.step --device cuda` first, then step time by parameter count, then whole training steps
of ResNet-18, eager and under a CUDA graph, each run in a fresh process. Everything is written as
soon as it is there, and a part that fails is named and leaves the others.

Seconds, as planned and not yet measured. Steps: some 35 rows of at most 1 for each model, fewer for
the smaller ones, and some 60 for proofs, captures and counting launches: 120 to 200. Sizes: six of
2, a process and proofs: 30. Training: 8 runs, 24 with --full, of some 10 to start and to prove 16
rows, and 4 or LEAST_ROUNDS rounds: 112 or 336. Together at most 570. Since no plan knows every GPU,
a run is begun only if the longest one so far would end in its seconds (BUDGET if none are given);
what is left out is said.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks import gpu, sizes, training
from benchmarks.measure import runner
from benchmarks.measure.clock import Cuda
from benchmarks.measure.process import fresh
from benchmarks.measure.progress import bar
from benchmarks.report import pictures, training_tables
from benchmarks.rows.providers import ON_GPU, named
from benchmarks.rows.shapes import Layout

BATCH_SIZES, FULL_BATCH_SIZES = (32, 256), (32, 128, 512, 1024)
PRECISIONS = ((), ("--amp", "--channels-last"))
FULL_PRECISIONS = (*PRECISIONS, ("--amp",))
SECONDS = 4.0  # of rounds in a training run
SECONDS_A_ROW = 0.2  # of a size
ROUNDS = 40
BUDGET = 570.0  # seconds for everything
FAILURES = (RuntimeError, runner.WrongError)  # of a part; the others go on


def by_size() -> dict[str, Any]:
    """Step time against parameter count, for a fresh process: "ms" and "warm ms" of the device with
    cold and warm caches, "host ms"; and the copy's GB/s."""
    device = Cuda()
    rows = named(sizes.ROWS, ON_GPU)
    found: dict[str, Any] = {"sizes": {}, "wrong": []}
    for count in sizes.COUNTS:
        layout = Layout([(count // sizes.TENSORS,)] * sizes.TENSORS)
        result = runner.measure(device, layout, torch.float32, rows, ROUNDS, limit=SECONDS_A_ROW)
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


def runs(full: bool) -> list[list[str]]:
    """Command lines of benchmarks.training, those first that may not be left out."""
    return [
        [
            *("--device", "cuda", "--batch-size", str(size), *precision, *graph),
            *("--processes", "1", "--repeats", str(ROUNDS), "--seconds", str(SECONDS)),
        ]
        for precision in (FULL_PRECISIONS if full else PRECISIONS)
        for size in (FULL_BATCH_SIZES if full else BATCH_SIZES)
        for graph in ((), ("--graph",))
    ]


def trained(argv: list[str]) -> dict[str, Any]:
    """What the JSON says of one run, and its table."""
    args = training.arguments(argv)
    measured = [fresh(training.measure, args, args.rows, 0)]
    return {
        **training_tables.results(args, measured),
        "table": training_tables.report(args, measured, {}),
    }


def main(
    plan: gpu.Plan,
    full: bool,
    out: Path,
    seconds: float | None = None,
    draw: bool = True,
) -> int:
    """Measures, prints, writes, draws; 1 if a row of ours was wrong or a part has failed."""
    budget = BUDGET if seconds is None else seconds
    start = perf_counter()
    status = gpu.main(plan, out)
    plan.device.release()
    results = json.loads(out.read_text())
    results |= {"sizes": {}, "training": [], "wrong": [], "not measured": {}}
    lines = runs(full)
    longest = 0.0
    with bar(1 + len(lines), "part") as progress:
        try:
            results |= fresh(by_size)
        except FAILURES as error:
            results["not measured"]["sizes"] = runner.reason(error)
        gpu.write_json(out, results)
        progress.update()
        for line in lines:
            name = f"training {' '.join(line)}"
            begun = perf_counter()
            if begun - start + longest > budget:
                results["not measured"][name] = f"{budget:.0f} s would not have been enough"
                continue
            try:
                run = trained(line)
                print(f"\n{run.pop('table')}")
                results["training"].append(run)
            except FAILURES as error:
                results["not measured"][name] = runner.reason(error)
            longest = max(longest, perf_counter() - begun)
            gpu.write_json(out, results)
            progress.update()
    for name, why in results["not measured"].items():
        print(f"not measured: {name} ({why})")
    results["seconds"] = perf_counter() - start
    gpu.write_json(out, results)
    files = pictures.draw(results, out.with_suffix("")) if draw else []
    print(f"\nwritten: {', '.join(map(str, [out, *files]))}")
    wrong = results["wrong"] or any(run["wrong"] for run in results["training"])
    return int(bool(status or wrong or results["not measured"]))
