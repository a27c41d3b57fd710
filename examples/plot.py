"""The picture: losses and accuracy by epoch, a row for each family of methods."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.methods import METHODS
from examples.options import Settings
from examples.training import Run

# Okabe and Ito's colours, told apart by colour-blind readers too; a line style goes with each.
STYLES = (
    ("#0072B2", "-"),
    ("#E69F00", (0, (5, 2))),
    ("#009E73", "-."),
    ("#CC79A7", "-"),
    ("#222222", (0, (1.5, 1.5))),
)
REFERENCE = "momentum"
REFERENCE_STYLE = ("#8A8A8A", "-")
PANELS = (
    ("train_loss", "training loss (nats an image)"),
    ("test_loss", "test loss (nats an image)"),
    ("test_accuracy", "test accuracy (%)"),
)


def draw(runs: Sequence[Run], settings: Settings, path: Path) -> None:
    """Writes the picture as PNG; lines are means over the seeds, bands lowest to highest seed."""
    present = list(dict.fromkeys(run["method"] for run in runs))
    families = list(dict.fromkeys(METHODS[name].family for name in present))
    height = 0.9 + 3.0 * len(families)
    figure = Figure(figsize=(15.0, height), dpi=100, layout="constrained")
    figure.suptitle(title(settings), fontsize=11)
    axes = figure.subplots(len(families), len(PANELS), sharex=True, sharey="col", squeeze=False)
    for row, family in zip(axes, families, strict=True):
        members = [name for name in present if METHODS[name].family == family]
        shown = [REFERENCE] * (REFERENCE in present) + [n for n in members if n != REFERENCE]
        for axis, (curve, _) in zip(row, PANELS, strict=True):
            styles = iter(STYLES)
            for name in shown:
                style = REFERENCE_STYLE if name == REFERENCE else next(styles)
                line(axis, name, [run for run in runs if run["method"] == name], curve, style)
            axis.grid(alpha=0.25)
            if settings.start_epoch > 0:
                axis.axvline(settings.start_epoch, color="#555555", linestyle=":", linewidth=1)
        row[-1].legend(
            title=family, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, frameon=False,
            handlelength=3.2, alignment="left",
        )
    ...
