"""The tables and the picture of docs/posthoc.md: ``python -m studies.posthoc``.

Trains on three paths with 10 and with 5 snapshots of a pair of power EMAs, makes averages of other
lengths of them, and compares these with the true ones; two minutes. Needs scikit-learn, and
matplotlib for the picture.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure.needed import need
from benchmarks.measure.progress import bar
from rbwa_fused.command import Parser, run

NAME = "studies.posthoc"
RESULTS = Path(__file__).resolve().parent / "results.json"
LENGTHS = (0.05, 0.06, 0.075, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)
COUNTS = (10, 5)


def measured() -> dict[str, Any]:
    """Residuals by count of snapshots and length, and errors by path, too."""
    import torch
    from torch.nn.utils import parameters_to_vector

    from rbwa_fused.posthoc import synthesize
    from studies.posthoc.paths import PATHS, STEPS, followed

    results: dict[str, Any] = {"lengths": LENGTHS, "residuals": {}, "errors": {}}
    with bar(len(PATHS) * STEPS, "step") as progress, TemporaryDirectory() as root:
        for path in PATHS:
            folders = {count: Path(root) / f"{path} {count}" for count in COUNTS}
            true, weights = followed(path, folders, LENGTHS, progress.update)
            for count, folder in folders.items():
                made = [synthesize(folder, sigma_rel=s, most=1.0) for s in LENGTHS]
                errors = []
                for average, expected in zip(made, true, strict=True):
                    assert average.state_dict is not None
                    named = [average.state_dict[name] for name in names(path)]
                    off = parameters_to_vector(named).double() - expected
                    errors.append(torch.linalg.norm(off) / torch.linalg.norm(expected - weights))
                results["residuals"][str(count)] = [m.residual for m in made]
                results["errors"].setdefault(path, {})[str(count)] = [float(e) for e in errors]
    return results


def names(path: str) -> list[str]:
    """The parameters of a path's model, in their order."""
    from studies.posthoc.paths import PATHS

    model, _ = PATHS[path]()
    return [name for name, _ in model.named_parameters()]


def table(results: dict[str, Any], count: int) -> str:
    """Of one count of snapshots, in percent."""
    key = str(count)
    columns = [results["residuals"][key], *(of[key] for of in results["errors"].values())]
    heads = ["length", "residual", *(f"error, {path}" for path in results["errors"])]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for i, length in enumerate(results["lengths"]):
        cells = [f"{length:.3g}", *(f"{100 * column[i]:.2f} %" for column in columns)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Asked and made profiles of ten snapshots, and errors by length beside the residual."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rbwa_fused.posthoc.profiles import Profile, density, solve
    from rbwa_fused.power import gamma_of
    from studies.posthoc.paths import PAIR

    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    members = [Profile(k / 10, gamma_of(s)) for k in range(1, 11) for s in PAIR]
    times = torch.linspace(0.001, 1.0, 1000, dtype=torch.float64)
    for number, length in enumerate((0.05, 0.075, 0.15, 0.25)):
        target = Profile(1.0, gamma_of(length))
        made = density(members, solve(members, target).weights, times)
        asked = density([target], [1.0], times)
        left.plot(times.tolist(), asked.tolist(), color=f"C{number}", label=f"{length:.3g}")
        left.plot(times.tolist(), made.tolist(), "--", color=f"C{number}")
    left.set(xlabel="share of the run", ylabel="share of the average", ylim=(0, 8), xlim=(0.2, 1))
    left.legend(title="asked (lines), made (dashed)")
    lengths, residuals = results["lengths"], results["residuals"]["10"]
    curves = {"residual": residuals, **{p: e["10"] for p, e in results["errors"].items()}}
    for name, curve in curves.items():
        shown = [
            100 * value if residual > 1e-6 else math.nan  # what is kept is made exactly
            for value, residual in zip(curve, residuals, strict=True)
        ]
        right.semilogy(lengths, shown, "k.-" if curve is residuals else ".-", label=name)
    right.set(xlabel="length asked for, sigma_rel", ylabel="percent", ylim=(0.01, 30))
    right.legend(title="10 snapshots of 0.05 and 0.10")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def updated(page: str, results: dict[str, Any]) -> str:
    """A page with the tables between its marks."""
    for count in COUNTS:
        begin, end = f"<!-- {count} snapshots -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(begin)
        _, _, behind = rest.partition(end)
        page = f"{before}{begin}{table(results, count)}{end}{behind}"
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what is measured or was."""
    parser = Parser(prog=f"python -m {NAME}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"measure, and write it (as {RESULTS.name})")
    parser.add_argument("--picture", type=Path, help="draw the picture there")
    parser.add_argument("--update", type=Path, help="put the tables into a page, unprinted")
    args = parser.parse_args(argv)
    if args.out:
        need(NAME, "sklearn")
        args.out.write_text(json.dumps(measured(), indent=1) + "\n")
    results = json.loads((args.out or RESULTS).read_text())
    if args.picture:
        need(NAME, "matplotlib")
        draw(results, args.picture)
    if args.update:
        args.update.write_text(updated(args.update.read_text(), results))
    else:
        print("\n\n".join(table(results, count) for count in COUNTS))


if __name__ == "__main__":
    sys.exit(run(NAME, main))
