"""Quotients of rows that are no baseline's: ``python -m benchmarks.ratios FILE.json …``.

Of results of benchmarks.step, or of all benchmarks: the median of each process's quotient and their
range, as docs/benchmarks.md quotes them. What a row adds to another is their difference.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.report.markdown import NONE, table
from benchmarks.report.tables import of_each, spread
from rbwa_fused import command


class Quotient(NamedTuple):
    """A row's time over another's; of a pair, the first's without the second's."""

    section: str  # "step" or "host", of a process's results
    over: tuple[str, ...]
    under: tuple[str, ...]


ADAMW, WHOLE = "torch AdamW fused", "AdamW fused + clip + AveragedModel"
CLIPPED, CLIPPED_TODAY = "SGD + momentum, clipped", "fused + clip_grad_norm_"
SGD, AVERAGED = "torch SGD fused", "fused + AveragedModel (EMA)"
QUOTIENTS = (
    Quotient("step", ("AdamW",), (ADAMW,)),
    Quotient("step", ("AdamW + EMA",), (ADAMW,)),
    Quotient("step", ("AdamW + EMA",), ("plain loop: theta, g, m, v, a",)),
    Quotient("step", ("Schedule-Free SGD",), ("SGD + momentum",)),
    Quotient("step", ("Schedule-Free SGD",), ("schedule_free SGD",)),
    Quotient("step", ("Schedule-Free AdamW",), (ADAMW,)),
    Quotient("step", ("Schedule-Free AdamW",), ("schedule_free AdamW",)),
    Quotient("step", (CLIPPED, "SGD + momentum"), (CLIPPED_TODAY, SGD)),
    Quotient("step", ("AdamW + EMA, clipped",), (WHOLE,)),
    Quotient("step", ("fused + Averager (EMA)", SGD), (AVERAGED, SGD)),
    Quotient("step", ("AdamW fused + Averager (EMA)",), (ADAMW,)),
    Quotient("host", ("AdamW",), (ADAMW,)),
    Quotient("host", ("AdamW + EMA",), (ADAMW,)),
    Quotient("host", ("AdamW + EMA, clipped",), (WHOLE,)),
    Quotient("host", ("Schedule-Free AdamW",), ("schedule_free AdamW",)),
)


def of_processes(results: Sequence[dict[str, Any]], quotient: Quotient) -> list[float]:
    """A quotient in each process; nothing where a row was not measured."""
    section, over, under = quotient
    if any(row not in result[section] for result in results for row in over + under):
        return []
    above, below = (
        [first - sum(rest) for first, *rest in zip(*times, strict=True)]
        for times in ([of_each(results, section, row) for row in rows] for rows in (over, under))
    )
    return [a / b for a, b in zip(above, below, strict=True)]


def report(files: Sequence[Path]) -> str:
    """A table with a column a file."""
    lines = [
        [f"{section}: {' less '.join(over)}, over {' less '.join(under)}"]
        for section, over, under in QUOTIENTS
    ]
    for file in files:
        known = json.loads(file.read_text())
        results = known.get("step", known)["processes"]
        for line, quotient in zip(lines, QUOTIENTS, strict=True):
            found = of_processes(results, quotient)
            line.append(f"{median(found):.2f} ({spread(found)})" if found else NONE)
    return table(["time", *(file.stem for file in files)], lines)


def main() -> None:
    """Prints the quotients of results that were written before."""
    parser = command.Parser(
        "python -m benchmarks.ratios",
        description="Quotients of rows in a step's results.",
    )
    parser.add_argument("file", nargs="*", type=Path, help="as python -m benchmarks.step writes it")
    print(report(parser.parse_args().file))


if __name__ == "__main__":
    sys.exit(command.run("benchmarks.ratios", main))
