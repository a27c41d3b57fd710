"""The table that ends a comparison, and how to read it."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from statistics import mean, stdev

from studies.digits.data import TEST_IMAGES
from studies.digits.methods import CONTROLS, KEPT, METHODS
from studies.digits.options import Settings
from studies.digits.timing import BASELINE, ROUNDS, Time
from studies.digits.training import Run

HEADER = ("method", "test accuracy %", "test loss", "training loss", "step ms", "ratio")


def table(runs: Sequence[Run], times: dict[str, Time]) -> str:
    """One row a method, after the last epoch, over the seeds."""
    rows = [HEADER]
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        rows.append(
            (
                name,
                spread([run["test_accuracy"][-1] for run in own], 2),
                spread([run["test_loss"][-1] for run in own], 4),
                spread([run["train_loss"][-1] for run in own], 5),
                f"{times[name]['ms']:.4f}",
                f"{times[name]['ratio']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation; the mean alone of one run."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def caption(settings: Settings, runs: Sequence[Run], times: dict[str, Time], size: int) -> str:
    """How to read the table."""
    seeds = len(settings.seeds)
    faster = settings.lr / (1 - settings.momentum)
    text = f"""\
{settings.epochs} epochs of {settings.steps_per_epoch} steps, {seeds} seed{"s" * (seeds > 1)}: \
mean ± standard deviation, losses in nats an image. One of the {TEST_IMAGES} test images is \
{100 / TEST_IMAGES:.2f} points. Learning rate {settings.lr:g}, momentum {settings.momentum:g}; \
sgd and rsgdm take {faster:g}, which is the same pace. Averages start after epoch \
{settings.start_epoch} (lookahead's at once) and are tested with BatchNorm re-estimated where they \
are kept in a buffer ({names(settings, KEPT)}); elsewhere the live weights are tested. \
Step: median of {ROUNDS} `opt.step()` taken in turns; ratio to {BASELINE}, \
{times[BASELINE]["ms"]:.4f} ms in the same run. The network is small ({size:,} parameters), so \
this is mostly host time, and a median sees no step that samples only once in a while."""
    gaps = [
        f"{method} and {control} at most {100 * gap(runs, method, control):.2g} %"
        for method, control in CONTROLS.items()
        if method in settings.methods and control in settings.methods
    ]
    if gaps:
        text += (
            f" Test losses of a seed differ for {' and '.join(gaps)}: {settings.dtype} rounding, "
            f"which grows in training while the learning rate is full."
        )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def names(settings: Settings, family: str) -> str:
    """The methods of a family that were compared."""
    return ", ".join(n for n in settings.methods if METHODS[n].family == family) or "none here"


def gap(runs: Sequence[Run], method: str, control: str) -> float:
    """Largest relative difference of the final test losses of the same seed."""
    final = {(run["method"], run["seed"]): run["test_loss"][-1] for run in runs}
    return max(
        abs(loss - final[control, seed]) / max(loss, sys.float_info.min)
        for (name, seed), loss in final.items()
        if name == method
    )
