"""Two checkouts side by side: ``python -m benchmarks.checkouts OTHER`` (see docs/benchmarks.md).

OTHER is the folder of another checkout of this project, built in its own .venv. Each row is run by
both, in one process each, in turn; the figure is the ratio of the medians, this checkout's over the
other's. Weights and state after a few steps are compared first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.measure.progress import bar
from benchmarks.report.markdown import table
from rbwa_fused.command import Parser, run

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "benchmarks" / "measure" / "one_checkout.py"


class Checkout:
    """A process with one checkout's rows.

    Raises:
        RuntimeError: for a folder without a built checkout in it.
    """

    def __init__(self, folder: Path, python: str, told: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, "-P", str(CHILD)],
            cwd=folder,
            env={"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        answer = self.ask(told)
        if Path(answer["where"]) != folder:
            raise RuntimeError(f"{python} finds rbwa_fused in {answer['where']}, not in {folder}")
        self.digests: dict[str, str] = answer["rows"]

    def ask(self, what: Any) -> Any:
        """The answer to one line."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        try:
            stdin.write(json.dumps(what) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = stderr.read().strip().splitlines()[-1:] or ["it ended"]
            raise RuntimeError(last[0])
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def compared(
    here: Checkout, other: Checkout, names: Sequence[str], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step here and there, of each row and round."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with bar(rounds * len(names), "row") as progress:
        for i in range(rounds):
            for name in names:
                first, second = (here, other) if i % 2 else (other, here)
                a, b = first.ask(name), second.ask(name)
                pairs[name].append((a, b) if i % 2 else (b, a))
                progress.update()
    return pairs


def report(pairs: dict[str, list[tuple[float, float]]], here: Checkout, other: Checkout) -> str:
    """A line a row: medians, their ratio and its quartiles over rounds, and whether bits agree."""
    lines = []
    for name, own in pairs.items():
        ours, theirs = (median(column) for column in zip(*own, strict=True))
        low, _, high = quantiles([a / b for a, b in own], n=4)
        same = "yes" if here.digests[name] == other.digests[name] else "NO"
        micro = [f"{1e6 * seconds:,.1f}" for seconds in (ours, theirs)]
        lines.append([name, *micro, f"{ours / theirs:.3f}", f"{low:.3f}-{high:.3f}", same])
    return table(["row", "here, us", "other, us", "ratio", "quartiles", "same bits"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. Returns 1 where a row's bits differ."""
    parser = Parser(
        prog="python -m benchmarks.checkouts", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument(
        "other", type=Path, metavar="OTHER", nargs="?", help="folder of another checkout"
    )
    parser.add_argument("--python", help="the other's Python (default: OTHER/.venv/bin/python)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="rows")
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.threads < 1:
        parser.error("--rounds must be at least 2 and --threads at least 1")
    if args.other is None:
        parser.error("OTHER is the folder of another checkout")
    other = args.other.resolve()
    python = args.python or str(other / ".venv" / "bin" / "python")
    if not (other / "rbwa_fused").is_dir():
        parser.error(f"no checkout in {args.other}")

    from benchmarks.rows.shapes import MODELS

    shapes, only = MODELS["resnet18"]().parameters, args.only or ["*"]
    told = {"shapes": shapes, "threads": args.threads, "only": only}
    both = []
    try:
        for folder, interpreter in ((ROOT, sys.executable), (other, python)):
            both.append(Checkout(folder, interpreter, told))
        names = [name for name in both[0].digests if name in both[1].digests]
        if not names:
            parser.error(f"no row is named {' or '.join(only)}")
        here, there = both
        print(report(compared(here, there, names, args.rounds), here, there))
        return int(any(here.digests[name] != there.digests[name] for name in names))
    except (RuntimeError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    finally:
        for checkout in both:
            checkout.close()


if __name__ == "__main__":
    sys.exit(run("benchmarks.checkouts", main))
