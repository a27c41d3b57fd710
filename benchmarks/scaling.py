"""The tables of docs/scaling.md: ``python -m benchmarks.scaling``.

Without options what is computed is printed, each table under its name. ``--measure`` compares the
formulas with two and four processes of this machine, in about a minute and a half.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    machine,
    scaling_answers,
    scaling_measure,
    scaling_predicted,
    scaling_tables,
    simulated,
)
from benchmarks.process import ROOT
from benchmarks.progress import bar
from rbwa_fused.command import Parser, run

TABLES: dict[str, Callable[[], str]] = {
    "answers": scaling_answers.answers,
    "assumptions": scaling_answers.assumptions,
    "bytes": scaling_tables.bytes_a_parameter,
    "step": scaling_tables.step_and_average,
    "collectives": scaling_tables.collectives,
    "room": scaling_tables.room,
    "buffer": scaling_tables.buffer,
    **{
        f"times-{model}-{tokens}": partial(scaling_tables.times, model, tokens)
        for model, t in scaling_tables.MODELS.items()
        for tokens in (t.tokens, scaling_tables.FEW_TOKENS)
    },
    "parts": scaling_tables.parts,
    "hidden": scaling_tables.hidden,
    "periods": scaling_tables.periods,
    "evaluation": scaling_tables.evaluation,
    "simulations": simulated.simulations,
}


def marked(tables: dict[str, str]) -> str:
    """Tables as the document has them."""
    return "\n\n".join(f"<!-- {name} -->\n{text}" for name, text in tables.items())


def updated(document: str, tables: dict[str, str]) -> str:
    """The document with these tables behind their names.

    Raises:
        ValueError: for a table that the document does not name.
    """
    for name, text in tables.items():
        before, mark, after = document.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"no table {name} in the document")
        rest = after if after.startswith("\n") else after[len(quoted(document, name)) + 1 :]
        document = f"{before}{mark}{text}\n{rest}"
    return document


def quoted(document: str, name: str) -> str:
    """What stands in a document behind a table's name, up to an empty line."""
    after = document.split(f"<!-- {name} -->\n", 1)[1]
    return "" if after.startswith("\n") else after.partition("\n\n")[0].rstrip("\n")


def measured() -> dict[str, Any]:
    """Runs the processes."""
    description = machine.description(1)
    seconds = {}
    with bar(len(scaling_measure.WORLDS), "group") as progress:
        for world in scaling_measure.WORLDS:
            seconds[str(world)] = scaling_measure.run(world)
            progress.update()
    kept = ("cpu", "cores", "threads", "date", "torch", "rbwa_fused", "load average before")
    facts = {name: description[name] for name in kept}
    return {
        "machine": {**facts, "load average after": round(os.getloadavg()[0], 2)},
        "seconds": seconds,
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="measure, write --out and print it")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/…)")
    parser.add_argument("--results", type=Path, help="print what such a file has")
    parser.add_argument("--update", type=Path, help="put the tables into a document, unprinted")
    parser.add_argument("--picture", type=Path, help="draw the picture there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, or measures."""
    args = arguments(argv)
    if args.picture:
        from benchmarks.scaling_picture import draw

        draw(args.picture)
        return
    if args.measure:
        results = measured()
        name = f"{machine.slug()}-{results['machine']['date']}-scaling.json"
        out = args.out or ROOT / "benchmarks" / "results" / name
        out.write_text(json.dumps(results, indent=1) + "\n")
        tables = scaling_predicted.tables(results)
    elif args.results:
        tables = scaling_predicted.tables(json.loads(args.results.read_text()))
    else:
        tables = {name: table() for name, table in TABLES.items()}
    if args.update:
        args.update.write_text(updated(args.update.read_text(), tables))
    else:
        print(marked(tables))


if __name__ == "__main__":
    sys.exit(run("python -m benchmarks.scaling", main))
