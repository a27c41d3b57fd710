"""The picture: accuracy, test loss and training loss by epoch, a column for each setting.

A table of one setting has a column for each family of systems instead, the baseline in each.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from studies.papers.plan import Plan
from studies.papers.settings import TABLES, Setting
from studies.papers.store import Key, Store
from studies.papers.systems import SYSTEMS, is_control

Array = npt.NDArray[np.float64]

CURVES = (
    ("test_accuracy", "test accuracy (%)"),
    ("test_loss", "test loss (nats an image)"),
    ("train_loss", "training loss (nats an image)"),
)
# Okabe and Ito's colours, told apart by colour-blind readers too, and dashes beside them.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), "-.", (0, (2, 1)), (0, (7, 1.5, 1.5, 1.5)))
BASELINE_COLOR, CONTROL_COLOR = "#8A8A8A", "#000000"
PALETTE = 128  # colours of the file, for a third of the bytes


class Panel(NamedTuple):
    """One column: its title, its setting, and (system, learning rate) of each line."""

    title: str
    setting: Setting
    lines: tuple[tuple[str, float], ...]


def panels(plan: Plan, store: Store) -> list[Panel]:
    """A column a setting (and explicit rate), or a family where there is but one."""
    found = []
    for setting in plan.settings:
        for rate in plan.rates or (None,):
            lines = tuple(
                (system, plan.rates_of(setting, system, store)[0] if rate is None else rate)
                for system in plan.systems
            )
            suffix = f", lr {rate:g}" if len(plan.rates) > 1 else ""
            found.append(Panel(setting.title + suffix, setting, lines))
    families = list(dict.fromkeys(SYSTEMS[name].family for name in plan.systems))
    if len(found) > 1 or len(families) < 2:
        return found
    (whole,) = found
    return [
        Panel(family, whole.setting, tuple(line for line in whole.lines if line[0] in members))
        for family in families
        for members in [{plan.baseline, *(n for n in SYSTEMS if SYSTEMS[n].family == family)}]
    ]


def draw(plan: Plan, store: Store) -> bytes:
    """The picture as PNG."""
    columns = panels(plan, store)
    legend = 0.24 * max(len(panel.lines) for panel in columns)  # inches
    size = (max(4.2 * len(columns), 8.0), 1.0 + 3.0 * len(CURVES) + legend)
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    axes = figure.subplots(
        len(CURVES) + 1,
        len(columns),
        sharex=True,
        sharey="row" if len(plan.settings) == 1 else False,
        squeeze=False,
        height_ratios=[3.0] * len(CURVES) + [legend],
    )
    for row, (curve, label) in zip(axes, CURVES, strict=False):
        shown = [
            draw_panel(axis, panel, curve, plan, store)
            for axis, panel in zip(row, columns, strict=True)
        ]
        for axis, values in zip(row, shown, strict=True):
            together = np.concatenate(shown) if len(plan.settings) == 1 else values
            set_scale(axis, together, logarithmic=curve != "test_accuracy")
        row[0].set_ylabel(label)
    for column, panel in zip(axes.T, columns, strict=True):
        column[0].set_title(panel.title, fontsize="medium")
        column[-2].set_xlabel("epoch")
        column[-2].tick_params(labelbottom=True)
        column[-1].axis("off")
        column[-1].legend(
            *column[0].get_legend_handles_labels(),
            loc="upper center",
            frameon=False,
            handlelength=3.2,
            fontsize="small",
        )
    figure.suptitle(heading(plan))
    return png(figure)


def heading(plan: Plan) -> str:
    """What is shown, and how to read bands and the dotted mark."""
    text = TABLES[plan.command].about
    if len(plan.settings) == 1:
        text += f": {plan.settings[0].title}"
    if len(plan.seeds) > 1:
        text += f". Mean of {len(plan.seeds)} seeds, band: lowest to highest"
    return text + "; dotted: averages start"


def draw_panel(axis: Axes, panel: Panel, curve: str, plan: Plan, store: Store) -> Array:
    """Draws the lines and returns them, [seeds of all lines, epochs]."""
    every = []
    shades = 0
    for system, lr in panel.lines:
        values = curves_of(plan, store, panel.setting, system, lr, curve)
        every.append(values)
        style: dict[str, Any] = {"linewidth": 1.8}
        if system == plan.baseline:
            style |= {"color": BASELINE_COLOR, "linewidth": 2.4}
        elif is_control(system):  # a thin line on top of the wide one that it must hide in
            style |= {"color": CONTROL_COLOR, "linewidth": 1.1, "linestyle": (0, (1, 2))}
        else:
            style["color"] = COLORS[shades % len(COLORS)]
            if (f"{system}-control", lr) in panel.lines:
                style |= {"linewidth": 4.0, "alpha": 0.6}
            else:
                style["linestyle"] = DASHES[shades % len(DASHES)]
            shades += 1
        draw_line(axis, values, SYSTEMS[system].about, style, band=not is_control(system))
    if panel.setting.start_epoch > 0:
        axis.axvline(panel.setting.start_epoch, color="#555555", linestyle=":", linewidth=1.0)
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return np.concatenate(every)


def curves_of(
    plan: Plan, store: Store, setting: Setting, system: str, lr: float, curve: str
) -> Array:
    """[seeds, epochs], nan where a run diverged."""
    keys = [Key("runs", setting.name, system, lr, seed) for seed in plan.seeds]
    return np.array([store.records[key][curve] for key in keys], dtype=np.float64)


def draw_line(axis: Axes, values: Array, label: str, style: dict[str, Any], band: bool) -> None:
    """The mean over the seeds, in a band from the lowest to the highest."""
    epochs = np.arange(1, values.shape[1] + 1)
    if band and len(values) > 1:
        low, high = values.min(0), values.max(0)
        axis.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
    marker = "o" if len(epochs) == 1 else None
    axis.plot(epochs, values.mean(0), label=label, marker=marker, **style)


def set_scale(axis: Axes, values: Array, *, logarithmic: bool) -> None:
    """Room for the epochs that decide: the first tenth may leave the panel."""
    settled = values[:, values.shape[1] // 10 :]
    settled = settled[np.isfinite(settled)]
    if settled.size == 0:
        return
    low, high = float(settled.min()), float(settled.max())
    if not logarithmic:
        axis.set_ylim(low - 0.02 * (high - low) - 0.1, high + 0.02 * (high - low) + 0.1)
    elif low > 0.0:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.1, high * 1.1)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    """With a palette, so that a picture can be kept under version control."""
    full = io.BytesIO()
    figure.savefig(full, format="png")
    small = io.BytesIO()
    image = Image.open(full).convert("RGB").quantize(PALETTE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()
