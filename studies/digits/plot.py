"""The picture: losses and accuracy by epoch, a row for each family of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from studies.digits.methods import METHODS
from studies.digits.options import Settings
from studies.digits.training import Run

Array = npt.NDArray[np.float64]
Curve = Literal["train_loss", "test_loss", "test_accuracy"]


class Style(NamedTuple):
    """How a method's lines look: colour, dashes and width in points."""

    color: str
    dashes: str | tuple[float, tuple[float, ...]] = "-"
    width: float = 1.8


# Okabe and Ito's colours, told apart by colour-blind readers too, and dashes beside them. A control
# is a thin line on top of the wide one that it must hide in.
STYLES = {
    "sgd": Style("#0072B2"),
    "momentum": Style("#8A8A8A"),
    "rsgdm": Style("#D55E00", (0, (5, 2))),
    "swa": Style("#0072B2"),
    "rswa": Style("#D55E00", (0, (5, 2))),
    "ema": Style("#009E73", "-."),
    "lookahead": Style("#CC79A7", (0, (2, 1))),
    "rbwa": Style("#56B4E9", width=4.0),
    "rbwa-control": Style("#00324D", (0, (5, 2)), width=1.4),
    "rbwa-algorithm2": Style("#009E73", "-."),
    "rbwa-e": Style("#F0B400", width=4.0),
    "rbwa-e-control": Style("#6B3A00", (0, (1.5, 1.5)), width=1.4),
}
REFERENCE = "momentum"
PANELS: tuple[tuple[Curve, str], ...] = (
    ("train_loss", "training loss (nats an image)"),
    ("test_loss", "test loss (nats an image)"),
    ("test_accuracy", "test accuracy (%)"),
)


def draw(runs: Sequence[Run], settings: Settings, path: Path) -> None:
    """Writes the picture as PNG; SGD with momentum stands in every row to compare with."""
    present = list(dict.fromkeys(run["method"] for run in runs))
    families = list(dict.fromkeys(METHODS[name].family for name in present))
    size = (16.0, 1.2 + 3.3 * len(families))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title(settings))
    axes = figure.subplots(len(families), len(PANELS), sharex=True, sharey="col", squeeze=False)
    for row, family in zip(axes, families, strict=True):
        members = [name for name in present if METHODS[name].family == family]
        if REFERENCE in present and REFERENCE not in members:
            members.insert(0, REFERENCE)
        for axis, (curve, label) in zip(row, PANELS, strict=True):
            for name in members:
                values = np.array([run[curve] for run in runs if run["method"] == name])
                banded = METHODS[name].family == family
                plot_curves(axis, METHODS[name].about, values, STYLES[name], banded)
            axis.set_ylabel(label)
            axis.grid(alpha=0.25)
            if settings.start_epoch > 0:
                axis.axvline(settings.start_epoch, color="#555555", linestyle=":", linewidth=1.0)
        row[-1].legend(
            title=family,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            frameon=False,
            alignment="left",
            handlelength=3.2,
        )
    for axis, (curve, _) in zip(axes[0], PANELS, strict=True):
        set_scale(axis, curve, runs)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png")


def plot_curves(axis: Axes, label: str, values: Array, style: Style, banded: bool) -> None:
    """The mean over the seeds, values [seeds, epochs], in a band from the lowest to the highest."""
    epochs = np.arange(1, values.shape[1] + 1)
    if banded:
        low, high = values.min(0), values.max(0)
        axis.fill_between(epochs, low, high, color=style.color, alpha=0.12, linewidth=0)
    axis.plot(
        epochs,
        values.mean(0),
        color=style.color,
        linestyle=style.dashes,
        linewidth=style.width,
        marker="o" if len(epochs) == 1 else None,
        label=label,
    )


def set_scale(axis: Axes, curve: Curve, runs: Sequence[Run]) -> None:
    """Room for the epochs that decide: the first tenth may leave the panel."""
    settled = [run[curve][len(run[curve]) // 10 :] for run in runs]
    values = [value for later in settled for value in later if math.isfinite(value)]
    if not values:
        return
    if curve == "test_accuracy":
        axis.set_ylim(min(values) - 0.3, max(values) + 0.3)
    elif min(values) > 0.0:
        axis.set_yscale("log")
        axis.set_ylim(0.8 * min(values), 1.25 * max(values))
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def title(settings: Settings) -> str:
    """What was trained, and how to read lines, bands and the dotted mark."""
    text = (
        f"Digit images, model {settings.model}, batch size {settings.batch_size}, "
        f"learning rate {settings.lr:g}, momentum {settings.momentum:g}"
    )
    if len(settings.seeds) > 1:
        text += f"; mean of {len(settings.seeds)} seeds, band: lowest to highest"
    if settings.start_epoch > 0:
        text += "; dotted: averaging starts"
    return text
