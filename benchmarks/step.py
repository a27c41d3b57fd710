"""What one optimizer step costs: ``python -m benchmarks.step`` (see docs/benchmarks.md).

On the CPU every figure is a ratio within one process: the median time of a row's step over that of
``torch.optim.SGD(fused=True, momentum=0.9, weight_decay=5e-4)``, interleaved with it. The tables
show the median and the range of these ratios over fresh processes. ``--device cuda`` measures on a
GPU, in one process, see gpu.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.measure.progress import bar
from benchmarks.report.written import write_json
from rbwa_fused.command import run

if TYPE_CHECKING:
    from benchmarks import gpu

DTYPES = ("float32", "bfloat16", "float16", "float64")
MODEL = "resnet18"
RESULTS = Path(__file__).resolve().parent / "results"


class Arguments(argparse.ArgumentParser):
    """Errors take one line."""

    def error(self, message: str) -> NoReturn:
        stop(message)


def stop(message: str) -> NoReturn:
    """Ends the program with one line."""
    raise SystemExit(f"benchmarks.step: {message}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Arguments(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    models = (
        f"cpu: any classifier of torchvision, such as vgg16, gpt2 or transformer-1b (default: "
        f"{MODEL}); cuda: resnet18, resnet50, gpt2, transformer-1b, one or several (default: all)"
    )
    parser.add_argument("--model", action="extend", nargs="+", metavar="NAME", help=models)
    backend = "cuda: measure this one of ours only (default: both where available)"
    parser.add_argument("--backend", choices=("cuda", "triton"), help=backend)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2, help="cpu only")
    processes = "fresh processes (cpu only; cuda takes one)"
    parser.add_argument("--processes", type=int, default=8, help=processes)
    parser.add_argument("--repeats", type=int, default=50, help="rounds in each process")
    only = "rows to measure beside the baseline, such as 'RBWA*'; may be repeated"
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help=only)
    parser.add_argument(
        "--no-host", dest="host", action="store_false", help="no host table (cpu only)"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/…)")
    args = parser.parse_args(argv)
    for name in ("threads", "processes", "repeats"):
        if getattr(args, name) < 1:
            stop(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.device == "cpu" and args.backend is not None:
        stop("--backend is for --device cuda")
    return args


def cpu_model(names: list[str] | None) -> str:
    """The one model that the CPU measures."""
    if names is not None and len(names) > 1:
        stop(f"--device cpu takes one --model, not {len(names)}")
    return MODEL if names is None else names[0]


def available_rows(patterns: list[str], dtype: str) -> tuple[tuple[str, ...], str | None]:
    """Names of the rows that can be measured here, and the ceiling's library; the rest is said."""
    from benchmarks.measure import machine
    from benchmarks.rows import ceiling
    from benchmarks.rows.providers import selected

    rows = selected(patterns)
    for row in rows:
        if not row.available():
            print(f"skipped: {row.name} ({row.needs} is not installed)")
        elif row.not_in == dtype:
            print(f"skipped: {row.name} ({dtype} cannot hold what it keeps)")
    rows = [row for row in rows if row.available() and row.not_in != dtype]
    library = None
    if any(row.kind == "ceiling" for row in rows):
        try:
            library = str(ceiling.build(machine.slug()))
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            print(f"skipped: the ceiling, and shares of it ({reason})")
            rows = [row for row in rows if row.kind != "ceiling"]
    return tuple(row.name for row in rows), library


def check_memory(model: str, dtype: str, rows: int) -> None:
    """Ends the program where the rows do not fit into this machine's memory."""
    import torch

    from benchmarks.measure import machine
    from benchmarks.rows import shapes

    needed = shapes.bytes_needed(model, getattr(torch, dtype), rows)
    free = machine.free_memory()
    if needed > free:
        stop(
            f"{rows} rows of {model} take about {needed / 1e9:.0f} GB and {free / 1e9:.0f} are "
            "free; choose some with --only"
        )


def writable(out: Path) -> Path:
    """The file's path, its folder made; ends the program where nothing can be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"cannot write {out} ({error.strerror})")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        stop(f"cannot write {out}")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and writes the results."""
    args = arguments(argv)
    if args.device == "cuda":
        on_gpu(args)
    else:
        on_cpu(args)


def gpu_plan(args: argparse.Namespace) -> gpu.Plan:
    """What a GPU is to measure; ends the program where it cannot."""
    from benchmarks import gpu

    try:
        return gpu.planned(args)
    except ValueError as error:
        stop(str(error))


def on_gpu(args: argparse.Namespace) -> None:
    """All models, in this process; ends with status 1 if a row of ours was wrong."""
    from benchmarks import gpu

    plan = gpu_plan(args)
    name = f"{plan.device.slug()}-{date.today().isoformat()}.json"
    if gpu.main(plan, writable(args.out or RESULTS / name)) != 0:
        raise SystemExit(1)


def ticks(args: argparse.Namespace) -> int:
    """Times that a process tells of its progress."""
    from benchmarks.measure.runner import HOST_TICKS

    return int(args.repeats) + (HOST_TICKS if args.host else 0)


def measured(
    args: argparse.Namespace,
    model: str,
    rows: tuple[str, ...],
    library: str | None,
    after_tick: Callable[[], object],
) -> list[dict[str, Any]]:
    """The result of each fresh process.

    Raises:
        WrongError: for a row that is wrong.
        RuntimeError: for a process that was killed. What else a row raises.
    """
    from benchmarks.measure.process import fresh
    from benchmarks.measure.runner import Settings, side_by_side

    def of_process(seed: int) -> dict[str, Any]:
        settings = Settings(
            model=model,
            dtype=args.dtype,
            threads=args.threads,
            rounds=args.repeats,
            seed=seed,
            rows=rows,
            library=library,
            host=args.host,
        )
        return fresh(side_by_side, settings, after_tick=after_tick)

    return [of_process(seed) for seed in range(args.processes)]


def on_cpu(args: argparse.Namespace) -> None:
    """One model, in fresh processes."""
    model = cpu_model(args.model)
    if find_spec("torchvision") is None:
        stop("torchvision is needed, for the shapes of its models")
    if find_spec("rbwa_fused._C") is None:
        stop("rbwa_fused's CPU kernels are not built")
    from benchmarks.measure import machine
    from benchmarks.report import tables

    try:
        rows, library = available_rows(args.only, args.dtype)
        check_memory(model, args.dtype, len(rows))
    except ValueError as error:
        stop(str(error))
    description = machine.description(args.threads)
    out = writable(args.out or RESULTS / f"{machine.slug()}-{description['date']}-step.json")

    with bar(args.processes * ticks(args), "round") as progress:
        try:
            results = measured(args, model, rows, library, progress.update)
        except Exception as error:  # whatever a row's library raises
            progress.close()
            stop(f"{type(error).__name__}: {error}".splitlines()[0])
    print(tables.cpu_tables(description, model, args.dtype, results))
    written = {
        "machine": description,
        "settings": {"model": model, "dtype": args.dtype, "repeats": args.repeats},
        "processes": results,
    }
    write_json(out, written)
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    sys.exit(run("benchmarks.step", main))
