"""What a command shows of syntheses: a table, a picture, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from rbwa_fused.posthoc.profiles import Profile, density
from rbwa_fused.posthoc.synthesis import Synthesis

HEADS = ("asked", "realised", "residual", "rounding", "file")


def table(plans: Sequence[Synthesis]) -> str:
    """A line for each length, the residual in percent."""
    lines = [HEADS]
    for plan in plans:
        files = ", ".join(map(str, plan.files)) or "-"
        rounding = f"{plan.rounding:.2%}" if plan.rounding > 0.0 else "-"
        numbers = (f"{plan.sigma_rel:.4g}", f"{plan.realised:.4f}", f"{plan.residual:.2%}")
        lines.append((*numbers, rounding, files))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(line[:-1], widths, strict=True)), line[-1]])
        for line in lines
    )


@contextmanager
def bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar of elements where tqdm is installed, on a terminal; what it is told of is the
    count of those read since."""
    if find_spec("tqdm") is None:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="", unit_scale=True, desc="elements", disable=None) as shown:
        yield shown.update


def refuse_picture(file: Path | None) -> None:
    """Raises ValueError for a picture of a kind that matplotlib, if it is there, does not draw."""
    if file is None or find_spec("matplotlib") is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.filetypes)
    if file.suffix[1:].lower() not in known:
        raise ValueError(f"Invalid picture: {file} (expected an ending of {', '.join(known)})")


def draw(plans: Sequence[Synthesis], file: Path) -> None:
    """A picture of the profiles asked for, as lines, and of those made, dashed.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    t = max(profile.t for profile in plans[0].profiles)
    times = torch.linspace(0.0, t, 2001, dtype=torch.float64)[1:]
    for number, plan in enumerate(plans):
        asked = density([Profile(t, plan.gamma)], [1.0], times)
        made = density(plan.profiles, plan.weights, times)
        label = f"{plan.sigma_rel:.4g}, residual {plan.residual:.1%}"
        axes.plot(times.tolist(), (t * asked).tolist(), color=f"C{number}", label=label)
        axes.plot(times.tolist(), (t * made).tolist(), "--", color=f"C{number}")
    axes.set_xlabel("steps since the averages' start")
    axes.set_ylabel("share of the average, times t")
    axes.set_xlim(0, t)
    axes.legend(title="asked (lines), made (dashed)")
    figure.savefig(file, dpi=110, metadata={"Software": None})
