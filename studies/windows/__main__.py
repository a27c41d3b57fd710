"""What windows give against real decays: ``python -m studies.windows``.

A small byte-level model learns the source text of Python's library at a constant rate. Windows of
its last steps, three shapes and three lengths in one pass, stand beside runs whose learning rate
really fell over the same steps. Prints a table and writes it with every seed's figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.needed import need
from benchmarks.measure.progress import bar

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = (20, 5, 2)  # parts of a run


def table(known: dict[str, Any]) -> str:
    """A row for each shape and length, in bits a byte."""
    from benchmarks.report import markdown
    from studies.papers.statistics import paired, summary

    runs: list[dict[str, float]] = known["runs"]

    def of(name: str) -> list[float]:
        return [run[name] for run in runs]

    def against(name: str, other: str) -> str:
        mean, low, high, _ = paired(of(name), of(other))
        return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"

    rows = []
    for length in known["lengths"]:
        for shape in ("linear", "sqrt", "cosine"):
            window, decay = f"{shape} window of {length}", f"{shape} decay over {length}"
            row = [f"{shape}, {length}", f"{summary(of(window)).mean:.3f}"]
            row += [f"{summary(of(decay)).mean:.3f}", against(window, "constant")]
            rows.append([*row, against(decay, "constant"), against(window, decay)])
    head = ["shape, steps", "window", "decay", "window - constant", "decay - constant"]
    return (
        f"{known['steps']} steps, {len(runs)} seeds; at a constant rate "
        f"{summary(of('constant')).mean:.3f} bits a byte\n\n"
        + markdown.table([*head, "window - decay"], rows)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or prints results that were written before."""
    from rbwa_fused.command import Parser

    parser = Parser(prog="python -m studies.windows", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="of each run (default: 3000)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "windows.json", help="JSON file")
    parser.add_argument("--results", type=Path, help="print what such a file has")
    args = parser.parse_args(argv)
    if args.results:
        print(table(json.loads(args.results.read_text())))
        return
    from benchmarks.measure import machine
    from studies.windows import training

    text = training.load()
    lengths = [args.steps // part for part in LENGTHS]
    known = {
        "machine": machine.description(1),
        "steps": args.steps,
        "lengths": lengths,
        "bytes": {"train": len(text.train), "test": len(text.test)},
        "runs": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with bar(args.seeds, "seed") as progress:
        for seed in range(args.seeds):
            known["runs"].append(training.results(seed, args.steps, lengths, text))
            args.out.write_text(json.dumps(known, indent=1) + "\n")
            progress.update()
    print(table(known))


if __name__ == "__main__":
    need("studies.windows", "scipy")
    from rbwa_fused.command import run

    sys.exit(run("python -m studies.windows", main))
