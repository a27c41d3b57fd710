"""All benchmarks: ``python -m benchmarks``, or ``make bench``; a quarter of an hour on two cores.

One optimizer step of ResNet-18 by provider, step time by parameter count, the machine's copy
bandwidth, and whole training steps with what averaging adds to them, with SGD and with AdamW, where
a small transformer is trained as well; of several models where torch sees a GPU, and then there.
Prints tables; writes benchmarks/results/<machine>-<date>.json after every part, and pictures beside
it. A part that fails is named and leaves the others.

A GPU's seconds, as planned and not yet measured. Steps: some 35 rows of at most 1 for each model,
fewer for the smaller ones, and some 60 for proofs, captures and counting launches: 120 to 200.
Sizes: six of 2, a process and proofs: 30. Training: 12 runs, 28 with --full, of some 10 to start
and to prove 16 rows, and 4 or LEAST_ROUNDS rounds: 168 or 392. Together at most 570. Since no plan
knows every GPU, a run is begun there only if the longest one so far would end in its seconds
(BUDGET if none are given); what is left out is said.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks import step, training
from benchmarks.measure.needed import need
from benchmarks.measure.process import fresh
from benchmarks.measure.progress import bar
from benchmarks.measure.proof import WrongError, reason
from benchmarks.report import training_tables
from benchmarks.report.written import write_json
from benchmarks.rows.decoder import NAME as TRANSFORMER
from rbwa_fused.command import Parser, run

NEEDED = ("torchvision", "matplotlib", "scipy", "rbwa_fused._C")
BATCH_SIZES, FULL_BATCH_SIZES = (1, 8), (1, 8, 32)
GPU_BATCH_SIZES, FULL_GPU_BATCH_SIZES = (32, 256), (32, 128, 512, 1024)
PRECISIONS = ((), ("--amp", "--channels-last"))
FULL_PRECISIONS = (*PRECISIONS, ("--amp",))
ADAMW_MODELS = ((), ("--model", TRANSFORMER))
SECONDS, ROUNDS = 4.0, 40  # of a training run on a GPU, at most
BUDGET = 570.0  # seconds for everything on a GPU
FAILURES = (RuntimeError, WrongError)  # of a part; the others go on

Results = dict[str, Any]


class Part(NamedTuple):
    """What is measured by itself: `measure` puts it into the results."""

    name: str
    measure: Callable[[Results], object]
    may_wait: bool = False  # left out where the seconds do not suffice


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--full",
        action="store_true",
        help="cpu: more processes, rows that torch.compile builds, batch size 32 as well; cuda: "
        "batch sizes 32 to 1024, autocast without channels_last as well",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/…)")
    models = "cuda: models to step (default: all)"
    parser.add_argument("--model", action="extend", nargs="+", metavar="NAME", help=models)
    seconds = "cuda: begin no training run that would end after so many (default: 570)"
    parser.add_argument("--seconds", type=float, help=seconds)
    drawn = "cuda: draw nothing; python -m benchmarks.pictures draws a JSON file"
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help=drawn)
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}")
    return args


def trained(line: Sequence[str], results: Results) -> None:
    """A run of benchmarks.training: prints its table."""
    args = training.arguments(line)
    measured, peaks = training.measured(args)
    found = training_tables.results(args, measured)
    if args.device == "cpu":
        found["peak MB"] = peaks
    results["training"].append(found)
    print(f"\n{training_tables.report(args, measured, peaks)}")


def cpu_runs(full: bool, threads: int) -> list[list[str]]:
    """Command lines of benchmarks.training; memory is measured once."""
    sizes = FULL_BATCH_SIZES if full else BATCH_SIZES
    common = [*("--threads", str(threads)), *("--processes", "6" if full else "3")]
    sgd = [
        [
            *("--batch-size", str(size), *common),
            *("--repeats", str(40 if full else 25 if size == 1 else 12)),
            *(() if size == BATCH_SIZES[-1] else ("--no-memory",)),
        ]
        for size in sizes
    ]
    repeats = ("--repeats", "40" if full else "12")
    adamw = [
        ["--optimizer", "adamw", *model, *common, *repeats, "--no-memory"] for model in ADAMW_MODELS
    ]
    return sgd + adamw


def gpu_runs(full: bool) -> list[list[str]]:
    """Command lines of benchmarks.training, those first that may not be left out."""
    often = ("--processes", "1", "--repeats", str(ROUNDS), "--seconds", str(SECONDS))
    common = (*often, "--no-memory")
    sgd = [
        ["--device", "cuda", "--batch-size", str(size), *precision, *graph, *common]
        for precision in (FULL_PRECISIONS if full else PRECISIONS)
        for size in (FULL_GPU_BATCH_SIZES if full else GPU_BATCH_SIZES)
        for graph in ((), ("--graph",))
    ]
    adamw = [
        ["--device", "cuda", "--batch-size", "32", "--optimizer", "adamw", *model, *graph, *common]
        for model in ADAMW_MODELS
        for graph in ((), ("--graph",))
    ]
    return sgd + adamw


def in_parts(
    parts: Sequence[Part], results: Results, out: Path, budget: float, start: float
) -> None:
    """Measures part by part and writes the results after each; names what was not measured.

    Args:
        budget: seconds from `start` on; no part that may wait is begun if the longest of them so
            far would not end in them.
    """
    longest = 0.0

    def left_out(name: str, why: str) -> None:
        results.setdefault("not measured", {})[name] = why

    with bar(len(parts), "part") as progress:
        for part in parts:
            begun = perf_counter()
            if part.may_wait and begun - start + longest > budget:
                left_out(part.name, f"{budget:.0f} s would not have been enough")
                continue
            try:
                part.measure(results)
            except FAILURES as error:
                left_out(part.name, reason(error))
            if part.may_wait:
                longest = max(longest, perf_counter() - begun)
            write_json(out, results)
            progress.update()
    for name, why in results.get("not measured", {}).items():
        print(f"not measured: {name} ({why})")


def on_cpu(args: argparse.Namespace) -> int:
    """ResNet-18, in fresh processes."""
    from benchmarks import sizes
    from benchmarks.measure import machine
    from benchmarks.report import tables

    description = machine.description(args.threads)
    out = step.writable(args.out or step.RESULTS / f"{machine.slug()}-{date.today()}.json")
    line = ["--processes", "12" if args.full else "4", "--repeats", "30"]
    stepping = step.arguments([*line, "--threads", str(args.threads)])
    rows, library = step.available_rows(["*"] if args.full else [], "float32")

    def steps(results: Results) -> None:
        with bar(stepping.processes * step.ticks(stepping), "round") as progress:
            found = step.measured(stepping, step.MODEL, rows, library, progress.update)
        results["step"] = {"model": step.MODEL, "dtype": stepping.dtype, "processes": found}
        print(tables.cpu_tables(description, step.MODEL, stepping.dtype, found))

    parts = [
        Part("step", steps),
        Part("sizes", lambda results: results.update(fresh(sizes.on_cpu, args.threads, 0))),
        *(
            Part(f"training {' '.join(line)}", partial(trained, line))
            for line in cpu_runs(args.full, args.threads)
        ),
    ]
    results: Results = {"machine": description, "sizes": {}, "training": []}
    in_parts(parts, results, out, math.inf, perf_counter())
    return ended(results, out, draw=True)


def on_gpu(args: argparse.Namespace) -> int:
    """All models in this process, the rest in fresh ones."""
    from benchmarks import gpu, sizes

    start = perf_counter()
    models = ["--model", *args.model] if args.model else []
    plan = step.gpu_plan(step.arguments(["--device", "cuda", *models]))
    out = step.writable(args.out or step.RESULTS / f"{plan.device.slug()}-{date.today()}.json")
    status = gpu.main(plan, out)
    plan.device.release()
    results = json.loads(out.read_text())
    results |= {"sizes": {}, "training": [], "wrong": [], "not measured": {}}
    parts = [
        Part("sizes", lambda results: results.update(fresh(sizes.on_gpu))),
        *(
            Part(f"training {' '.join(line)}", partial(trained, line), may_wait=True)
            for line in gpu_runs(args.full)
        ),
    ]
    in_parts(parts, results, out, BUDGET if args.seconds is None else args.seconds, start)
    results["seconds"] = perf_counter() - start
    return max(status, ended(results, out, args.pictures))


def ended(results: Results, out: Path, draw: bool) -> int:
    """Writes and draws; 1 if a row of ours was wrong or a part has failed."""
    from benchmarks.report import pictures

    write_json(out, results)
    files = pictures.draw(results, out.with_suffix("")) if draw else []
    print(f"\nwritten: {', '.join(map(str, [out, *files]))}")
    wrong = results.get("wrong") or any(run["wrong"] for run in results["training"])
    return int(bool(wrong or results.get("not measured")))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes, draws."""
    args = arguments(argv)
    need("benchmarks", *NEEDED)
    import torch

    if torch.cuda.is_available():
        return on_gpu(args)
    if args.model or args.seconds is not None:
        sys.exit("benchmarks: --model and --seconds are for a GPU, and torch sees none")
    return on_cpu(args)


if __name__ == "__main__":
    sys.exit(run("python -m benchmarks", main))
