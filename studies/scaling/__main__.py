"""The tables of studies/scaling/README.md: ``python -m studies.scaling``.

Without options what is computed is printed, each table under its name. ``--measure`` compares the
formulas with two and four processes of this machine, in about a minute and a half.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.needed import need
from benchmarks.measure.progress import bar

RESULTS = Path(__file__).resolve().parent / "results"


def measured() -> dict[str, Any]:
    """Runs the processes."""
    from benchmarks.measure import machine
    from studies.scaling import processes

    description = machine.description(1)
    seconds = {}
    with bar(len(processes.WORLDS), "group") as progress:
        for world in processes.WORLDS:
            seconds[str(world)] = processes.run(world)
            progress.update()
    kept = ("cpu", "cores", "threads", "date", "torch", "rbwa_fused", "load average before")
    facts = {name: description[name] for name in kept}
    return {
        "machine": {**facts, "load average after": round(os.getloadavg()[0], 2)},
        "seconds": seconds,
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from rbwa_fused.command import Parser

    parser = Parser(prog="python -m studies.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="measure, write --out and print it")
    parser.add_argument("--out", type=Path, help="JSON file (default: studies/scaling/results/…)")
    parser.add_argument("--results", type=Path, help="print what such a file has")
    parser.add_argument("--update", type=Path, help="put the tables into a document, unprinted")
    parser.add_argument("--picture", type=Path, help="draw the picture there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, or measures."""
    args = arguments(argv)
    from benchmarks.measure import machine
    from studies.scaling import document, predicted

    if args.picture:
        need("studies.scaling", "matplotlib")
        from studies.scaling.picture import draw

        draw(args.picture)
        return
    if args.measure:
        results = measured()
        name = f"{machine.slug()}-{results['machine']['date']}-scaling.json"
        out = args.out or RESULTS / name
        out.write_text(json.dumps(results, indent=1) + "\n")
        tables = predicted.tables(results)
    elif args.results:
        tables = predicted.tables(json.loads(args.results.read_text()))
    else:
        tables = {name: table() for name, table in document.TABLES.items()}
    if args.update:
        args.update.write_text(document.updated(args.update.read_text(), tables))
    else:
        print(document.marked(tables))


if __name__ == "__main__":
    need("studies.scaling", "numpy")  # before torch is imported, which would warn of it
    from rbwa_fused.command import run

    sys.exit(run("python -m studies.scaling", main))
