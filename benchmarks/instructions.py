"""Instructions that a step takes for each parameter: ``python -m benchmarks.instructions``.

Counted by valgrind's callgrind on one thread, so a busy machine changes nothing. Valgrind
knows AVX2 and no AVX-512: the kernels choose AVX2 under it, as torch's do.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.report.markdown import table
from rbwa_fused.command import Parser, run

TENSORS, SIZE = 62, 20_000
STEPS = 2
ROWS = (
    *("torch SGD fused", "torch SGD foreach", "SGD, no momentum", "SGD + momentum", "RBWA"),
    *("RBWA-E", "RSGDM", "EMA", "SGD + two EMAs", "SWA", "fused + AveragedModel (EMA)"),
    *("fused + AveragedModel (mean)", "RSGDM, foreach", "SGD + momentum, clipped"),
    *("fused + clip_grad_norm_", "torch AdamW fused", "torch AdamW foreach", "AdamW"),
    *("AdamW + EMA", "AdamW + EMA, clipped", "AdamW fused + AveragedModel (EMA)"),
    *("AdamW fused + clip + AveragedModel", "Schedule-Free SGD", "Schedule-Free AdamW"),
    *("schedule_free SGD", "schedule_free AdamW"),
)
ROOT = Path(__file__).resolve().parent.parent


def control(*arguments: str) -> None:
    """Tells callgrind, under which this process runs."""
    command = ["callgrind_control", *arguments, str(os.getpid())]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def count() -> None:
    """Under callgrind: counts each row's steps, a dump for each, in their order."""
    import torch

    from benchmarks.measure.proof import all_proven
    from benchmarks.rows.problem import small_tensors
    from benchmarks.rows.providers import named

    torch.set_num_threads(1)
    for provider in all_proven(named(ROWS), small_tensors(TENSORS, SIZE)):
        provider.prepare()
        control("--instr=on")
        for _ in range(STEPS):
            provider.step()
        control("--instr=off")
        control("--dump")
        print(provider.name, flush=True)
    sys.stdout.flush()
    os._exit(0)  # torch's own end takes minutes here


def total(file: Path) -> int:
    """Instructions of a dump."""
    found = re.search(r"^totals: (\d+)$", file.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{file.name} has no total")
    return int(found[1])


def measure(folder: Path) -> dict[str, float]:
    """Instructions a parameter and step of each row.

    Raises:
        RuntimeError: if valgrind or a row failed.
    """
    command = [
        *("valgrind", "--tool=callgrind", "--instr-atstart=no"),
        f"--callgrind-out-file={folder / 'out'}",
        *(sys.executable, "-m", "benchmarks.instructions", "--count"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines()
    dumps = [folder / f"out.{k}" for k in range(1, len(names) + 1)]
    if done.returncode != 0 or not names or not all(dump.exists() for dump in dumps):
        raise RuntimeError((done.stderr or "no output").strip().splitlines()[-1])
    counted = TENSORS * SIZE * STEPS
    return {name: total(dump) / counted for name, dump in zip(names, dumps, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    """Counts and prints the table."""
    parser = Parser(
        prog="python -m benchmarks.instructions", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args(argv).count:
        count()
    if shutil.which("valgrind") is None:
        sys.exit("benchmarks.instructions: valgrind is not installed")
    with TemporaryDirectory() as folder:
        try:
            found = measure(Path(folder))
        except RuntimeError as error:
            sys.exit(f"benchmarks.instructions: {error}")
    print(f"{TENSORS} float32 tensors of {SIZE} elements, one thread, AVX2\n")
    rows = [[name, f"{value:.2f}"] for name, value in found.items()]
    print(table(["provider", "instructions a parameter"], rows))


if __name__ == "__main__":
    sys.exit(run("python -m benchmarks.instructions", main))
