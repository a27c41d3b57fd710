"""What one optimizer step costs: ``python -m benchmarks.step`` (see docs/benchmarks.md).

Every figure is a ratio within one process: the median time of a row's step over that of
``torch.optim.SGD(fused=True, momentum=0.9, weight_decay=5e-4)``, interleaved with it. The tables
show the median and the range of these ratios over fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from tqdm import tqdm

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROOT = Path(__file__).resolve().parent.parent


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
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=8, help="fresh processes")
    parser.add_argument("--repeats", type=int, default=30, help="rounds in each process")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN",
                        help="rows to measure beside the baseline, such as 'RBWA*'; repeatable")  # fmt: skip
    parser.add_argument("--no-host", dest="host", action="store_false", help="no host times")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/…)")
    args = parser.parse_args(argv)
    for name in ("threads", "processes", "repeats"):
        if getattr(args, name) < 1:
            stop(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def available_rows(patterns: list[str]) -> tuple[tuple[str, ...], str | None]:
    """Names of the rows that can be measured here, and the ceiling's library; the rest is said."""
    from benchmarks import ceiling
    from benchmarks.providers import selected

    rows = selected(patterns)
    for row in rows:
        if not row.available():
            print(f"skipped: {row.name} ({row.needs} is not installed)")
    rows = [row for row in rows if row.available()]
    library = None
    if any(row.kind == "ceiling" for row in rows):
        try:
            library = str(ceiling.build())
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            print(f"skipped: the ceiling, and shares of it ({reason})")
            rows = [row for row in rows if row.kind != "ceiling"]
    return tuple(row.name for row in rows), library


def fresh_process(settings: str, tick: Any) -> dict[str, Any]:
    """Runs benchmarks.process and returns its result."""
    command = [sys.executable, "-m", "benchmarks.process", settings]
    with TemporaryFile("w+") as stderr:
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            assert process.stdout is not None
            last = ""
            for line in process.stdout:
                last = line.strip()
                if last == TICK:
                    tick()
        stderr.seek(0)
        errors = stderr.read().strip().splitlines()
    if process.returncode != 0:
        stop(errors[-1] if errors else f"a process ended with {process.returncode}")
    result: dict[str, Any] = json.loads(last)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        stop("torchvision is needed, for the shapes of its models")
    try:
        from rbwa_fused import _C  # noqa: F401
    except ImportError as error:
        stop(f"the CPU kernels are not built ({error})")
    from benchmarks import machine, problem, report
    from benchmarks.process import ROUNDS_WITHOUT_ITS_OWN, Settings

    description = machine.description(args.threads)
    try:
        problem.known_model(args.model)
        rows, library = available_rows(args.only)
    except ValueError as error:
        stop(str(error))
    out = args.out or ROOT / "benchmarks" / "results" / (
        f"{machine.slug()}-{description['date']}.json"
    )
    if not os.access(next(p for p in out.resolve().parents if p.exists()), os.W_OK):
        stop(f"cannot write {out}")
    ticks = args.repeats + (ROUNDS_WITHOUT_ITS_OWN if args.host else 0)
    results = []
    with tqdm(total=args.processes * ticks, unit="round") as bar:
        for seed in range(args.processes):
            settings = Settings(
                model=args.model,
                dtype=args.dtype,
                threads=args.threads,
                rounds=args.repeats,
                seed=seed,
                rows=rows,
                library=library,
                host=args.host,
            )
            results.append(fresh_process(settings.to_json(), bar.update))
    text = report.tables(description, args.model, args.dtype, results)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = {
        "machine": description,
        "settings": {"model": args.model, "dtype": args.dtype, "repeats": args.repeats},
        "processes": results,
    }
    out.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
