"""All benchmarks, in under ten minutes on two cores: ``python -m benchmarks``, or ``make bench``.

One optimizer step of ResNet-18 by provider, step time by parameter count, the machine's copy
bandwidth, and whole training steps with what averaging adds to them. Prints tables; writes
benchmarks/results/<machine>-<date>.json and four pictures beside it. Where there is a GPU, it
measures the same there, see gpu_suite.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import step, training
from benchmarks.measure.needed import need
from benchmarks.measure.process import fresh
from benchmarks.measure.progress import bar
from benchmarks.report import training_tables
from rbwa_fused.command import Parser, run

NEEDED = ("torchvision", "matplotlib", "scipy", "rbwa_fused._C")
BATCH_SIZES, FULL_BATCH_SIZES = (1, 8), (1, 8, 32)


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


def measured_training(args: argparse.Namespace, batch_size: int, progress: Any) -> dict[str, Any]:
    """Figures of each row at a batch size, and their table."""
    options = training.arguments(
        [
            *("--batch-size", str(batch_size), "--threads", str(args.threads)),
            *("--processes", "6" if args.full else "3"),
            *("--repeats", str(40 if args.full else 25 if batch_size == 1 else 12)),
        ]
    )
    samples = []
    for seed in range(options.processes):
        samples.append(fresh(training.measure, options, options.rows, seed))
        progress.update()
    peaks = {}
    for name in options.rows if batch_size == BATCH_SIZES[-1] else ():
        peaks[name] = fresh(training.peak, options, name)
    progress.update()
    return {
        **training_tables.results(options, samples),
        "peak MB": peaks,
        "table": training_tables.report(options, samples, peaks),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes, draws."""
    args = arguments(argv)
    need("benchmarks", *NEEDED)
    import torch

    if torch.cuda.is_available():
        from benchmarks import gpu_suite

        models = ["--model", *args.model] if args.model else []
        plan = step.gpu_plan(step.arguments(["--device", "cuda", *models]))
        name = f"{plan.device.slug()}-{date.today()}.json"
        out = step.writable(args.out or step.RESULTS / name)
        if gpu_suite.main(plan, args.full, out, args.seconds, args.pictures) != 0:
            raise SystemExit(1)
        return
    if args.model or args.seconds is not None:
        sys.exit("benchmarks: --model and --seconds are for a GPU, and torch sees none")
    from benchmarks import sizes
    from benchmarks.measure import machine
    from benchmarks.report import pictures, tables

    description = machine.description(args.threads)
    out = step.writable(args.out or step.RESULTS / f"{machine.slug()}-{date.today()}.json")
    processes = 12 if args.full else 4
    batch_sizes = FULL_BATCH_SIZES if args.full else BATCH_SIZES
    stepping = step.arguments(
        ["--processes", str(processes), "--repeats", "30", "--threads", str(args.threads)]
    )
    rows, library = step.available_rows(["*"] if args.full else [])
    with bar(processes * step.ticks(stepping), "round of 1: step") as progress:
        steps = step.measured(stepping, step.MODEL, rows, library, progress.update)
    with bar(len(sizes.COUNTS) + 1, "size of 2: sizes") as progress:
        by_size = fresh(sizes.run, args.threads, 0)
        progress.update(len(sizes.COUNTS) + 1)
    training_processes = len(batch_sizes) * ((6 if args.full else 3) + 1)
    with bar(training_processes, "process of 3: training") as progress:
        trained = [measured_training(args, size, progress) for size in batch_sizes]
    texts = [
        tables.tables(description, step.MODEL, stepping.dtype, steps),
        *(run.pop("table") for run in trained),
    ]
    print("\n\n".join(texts))
    results = {
        "machine": description,
        "step": {"model": step.MODEL, "dtype": stepping.dtype, "processes": steps},
        **by_size,
        "training": trained,
    }
    out.write_text(json.dumps(results, indent=1) + "\n")
    files = pictures.draw(results, out.with_suffix(""))
    print(f"\nwritten: {', '.join(map(str, [out, *files]))}")
    if any(run["wrong"] for run in trained):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run("python -m benchmarks", main))
