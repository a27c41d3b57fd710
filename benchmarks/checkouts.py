"""Two checkouts side by side: ``python -m benchmarks.checkouts OTHER`` (see docs/benchmarks.md).

OTHER is the folder of another checkout of this project, built in its own .venv. Each row is run by
both, in one process each, in turn; a pair of processes gives one ratio of medians, this checkout's
over the other's, and the figure is the median over fresh pairs, since a process keeps the placement
of its tensors. Weights and state after a few steps are compared first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
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
        RuntimeError: for a folder without a built checkout in it, or where no row is chosen.
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
        if not self.digests:
            raise RuntimeError(f"no row is named {' or '.join(told['only'])}")

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


Pair = tuple[float, float]  # seconds of a step here and in the other checkout


def compared(
    start: Callable[[bool], Checkout], processes: int, rounds: int
) -> tuple[dict[str, list[Pair]], set[str]]:
    """Of each row: the medians of each pair of processes; and the rows whose bits differ.

    ``start(True)`` starts this checkout's process, ``start(False)`` the other's.
    """
    found: dict[str, list[Pair]] = {}
    differing: set[str] = set()
    with bar(processes, "pair") as progress:
        for i in range(processes):
            both: dict[bool, Checkout] = {}
            try:
                for ours in (True, False) if i % 2 else (False, True):
                    both[ours] = start(ours)
                here, other = both[True], both[False]
                for name in here.digests.keys() & other.digests.keys():
                    if here.digests[name] != other.digests[name]:
                        differing.add(name)
                names = [name for name in here.digests if name in other.digests]
                for name, pair in timed_in_turn(here, other, names, rounds).items():
                    found.setdefault(name, []).append(pair)
            finally:
                for checkout in both.values():
                    checkout.close()
            progress.update()
    return found, differing


def timed_in_turn(
    here: Checkout, other: Checkout, names: Sequence[str], rounds: int
) -> dict[str, Pair]:
    """The medians of each row over the rounds of one pair of processes."""
    taken: dict[str, list[Pair]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names:
            if i % 2:
                a, b = here.ask(name), other.ask(name)
            else:
                b, a = other.ask(name), here.ask(name)
            taken[name].append((a, b))
    return {
        name: (median(a for a, _ in pairs), median(b for _, b in pairs))
        for name, pairs in taken.items()
    }


def report(found: dict[str, list[Pair]], differing: set[str]) -> str:
    """A line a row: medians over processes, quartiles of the ratio, and whether bits agree."""
    lines = []
    for name, pairs in found.items():
        micro = [f"{1e6 * median(column):,.1f}" for column in zip(*pairs, strict=True)]
        ratios = [a / b for a, b in pairs]
        low, _, high = quantiles(ratios, n=4)
        same = "NO" if name in differing else "yes"
        lines.append([name, *micro, f"{median(ratios):.3f}", f"{low:.3f}-{high:.3f}", same])
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
    parser.add_argument("--processes", type=int, default=8, help="pairs of them (default: 8)")
    parser.add_argument("--rounds", type=int, default=6, help="of a pair (default: 6)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="rows")
    args = parser.parse_args(argv)
    if args.processes < 2 or args.rounds < 1 or args.threads < 1:
        parser.error("--processes must be at least 2, --rounds and --threads at least 1")
    if args.other is None:
        parser.error("OTHER is the folder of another checkout")
    other = args.other.resolve()
    python = args.python or str(other / ".venv" / "bin" / "python")
    if not (other / "rbwa_fused").is_dir():
        parser.error(f"no checkout in {args.other}")

    from benchmarks.rows.shapes import MODELS

    shapes, only = MODELS["resnet18"]().parameters, args.only or ["*"]
    told = {"shapes": shapes, "threads": args.threads, "only": only}
    folders = {True: (ROOT, sys.executable), False: (other, python)}
    try:
        found, differing = compared(
            lambda ours: Checkout(*folders[ours], told), args.processes, args.rounds
        )
    except (RuntimeError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(report(found, differing))
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(run("benchmarks.checkouts", main))
