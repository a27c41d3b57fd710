"""table.md and table.csv: published and measured figures side by side, and how to read them."""

from __future__ import annotations

import csv
import io
import math
import sys
import textwrap
from collections.abc import Callable, Sequence

from studies.papers.datasets import HARD_IMAGES, HARD_NOISE
from studies.papers.plan import Plan
from studies.papers.rows import Row
from studies.papers.settings import LADDER, Setting
from studies.papers.statistics import Difference, Summary, paired
from studies.papers.store import Store
from studies.papers.systems import SYSTEMS, controlled, is_control

WIDTH = 100
CSV = (
    *("setting", "system", "about", "data", "hard", "model", "batch_size", "lr", "own_lr", "seeds"),
    *("accuracy", "accuracy_deviation", "test_loss", "test_loss_deviation"),
    *("train_loss", "train_loss_deviation"),
    *("difference", "difference_low", "difference_high", "p"),
    *("loss_difference", "loss_difference_low", "loss_difference_high", "loss_p"),
    *("published_source", "published_accuracy", "published_train_loss"),
    *("published_gain_low", "published_gain_high"),
)


def markdown(plan: Plan, store: Store, rows: Sequence[Row]) -> str:
    """The table and what one must know to read it."""
    notes = list(dict.fromkeys(str(row.figure) for row in rows if row.figure is not None))
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("setting", lambda row: row.setting.name),
        ("system", lambda row: row.system),
        ("lr", lambda row: f"{row.own_lr:g}"),
        ("paper: accuracy %", lambda row: published_accuracy(row, notes)),
        ("accuracy %", lambda row: spread(row.accuracy, 2)),
        (f"paper: to {plan.baseline}", lambda row: published_gain(row, notes)),
        (f"to {plan.baseline} (95 %)", lambda row: difference(row.difference, 2)),
        ("p", lambda row: p_value(row.difference)),
        ("paper: training loss", published_loss),
        ("training loss", lambda row: spread(row.train_loss, 5)),
        ("test loss", lambda row: spread(row.test_loss, 4)),
        (f"to {plan.baseline} (95 %)", lambda row: difference(row.loss_difference, 4)),
        ("p", lambda row: p_value(row.loss_difference)),
        ("seeds", lambda row: str(row.accuracy.runs)),
    ]
    cells = [[cell(row) for row in rows] for _, cell in columns]
    kept = [k for k, column in enumerate(cells) if any(text not in ("", "-") for text in column)]
    texts = [[columns[k][0], *cells[k]] for k in kept]
    widths = [max(map(len, column)) for column in texts]
    lines = [
        "| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in zip(*texts, strict=True)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    table = "\n".join([lines[0], rule, *lines[1:]])
    sources = [f"[{number}] {note}." for number, note in enumerate(notes, 1)]
    paragraphs = [" ".join(sources), *verdicts(plan, rows), *caption(plan, store, rows)]
    return "\n\n".join([table, *(fill(text) for text in paragraphs if text)]) + "\n"


def fill(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def spread(values: Summary, digits: int) -> str:
    if math.isnan(values.deviation):
        return f"{values.mean:.{digits}f}"
    return f"{values.mean:.{digits}f} ± {values.deviation:.{digits}f}"


def difference(value: Difference | None, digits: int) -> str:
    if value is None:
        return "-"
    middle, low, high = (f"{round(number, digits) + 0.0:+.{digits}f}" for number in value[:3])
    return middle if math.isnan(value.low) else f"{middle} ({low} to {high})"


def p_value(value: Difference | None) -> str:
    if value is None or math.isnan(value.p):
        return "-"
    return "<0.001" if value.p < 0.001 else f"{value.p:.3f}"


def published_accuracy(row: Row, notes: Sequence[str]) -> str:
    if row.figure is None or row.figure.accuracy is None:
        return "-"
    return f"{row.figure.accuracy:.2f} [{notes.index(str(row.figure)) + 1}]"


def published_gain(row: Row, notes: Sequence[str]) -> str:
    """With its source where no accuracy beside it has it."""
    if row.published_gain is None or row.figure is None:
        return "-"
    low, high = row.published_gain
    if row.figure.gain is None:
        return f"{low:+.2f}"
    return f"{low:+.2f} to {high:+.2f} [{notes.index(str(row.figure)) + 1}]"


def published_loss(row: Row) -> str:
    if row.figure is None or row.figure.train_loss is None:
        return "-"
    return f"{row.figure.train_loss:.5f}"


def verdicts(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """For each setting, the highest mean and who is within chance of it."""
    if len(plan.seeds) < 2:
        return []
    texts = []
    for setting in plan.settings:
        own = [row for row in rows if row.setting == setting and math.isfinite(row.test_loss.mean)]
        if not own:
            continue
        first = max(own, key=lambda row: row.accuracy.mean)
        near = []
        for row in own:
            if row is not first:
                apart = paired(row.accuracies, first.accuracies)
                if not apart.high < 0.0:
                    near.append(named(plan, row))
        texts.append(
            f"{setting.title}: highest mean accuracy {named(plan, first)}. Not told from it by the "
            f"95 % interval of the paired difference: {', '.join(near) or 'none'}."
        )
    return texts


def named(plan: Plan, row: Row) -> str:
    return f"{row.system} at lr {row.own_lr:g}" if len(plan.rates) > 1 else row.system


def caption(plan: Plan, store: Store, rows: Sequence[Row]) -> list[str]:
    """What was run with what."""
    text = f"{conditions(plan)} Seeds {', '.join(map(str, plan.seeds))}"
    if len(plan.seeds) > 1:
        text += ": mean ± standard deviation"
    text += (
        "; losses in nats an image. Differences are paired by seed (initial weights and data "
        "order); p is Student's t of one pair of systems, not corrected for the number of rows. "
        "The papers' figures are single runs."
    )
    return [text, controls(rows, plan.settings[0].dtype), rates(plan, rows), machine(store)]


def controls(rows: Sequence[Row], dtype: str) -> str:
    """How far rounding has taken each control from what it is a control of."""
    losses = {(row.setting, row.system, row.lr): row.test_losses for row in rows}
    gaps: dict[str, float] = {}
    for (setting, system, lr), found in losses.items():
        originals = losses.get((setting, controlled(system), lr))
        if is_control(system) and originals is not None:
            each = [
                abs(a - b) / max(b, sys.float_info.min)
                for a, b in zip(found, originals, strict=True)
            ]
            gaps[system] = max(gaps.get(system, 0.0), *each)
    if not gaps:
        return ""
    told = ", ".join(f"{system} {100.0 * gap:.2g} %" for system, gap in gaps.items())
    return (
        f"A control is its system up to rounding, which training at a high rate amplifies. Largest "
        f"difference of a seed's test loss in {dtype}: {told}."
    )


def conditions(plan: Plan) -> str:
    """What the settings of a table have in common."""
    one = plan.settings[0]
    parts = [
        f"After {one.epochs} epochs, averages from epoch {one.start_epoch} on",
        f"momentum {one.momentum:g}, weight decay {one.weight_decay:g}, augmentation "
        f"{one.augment}, {one.dtype}",
    ]
    if one.halve_epochs > 0:
        parts.append(f"learning rate halved every {one.halve_epochs} epochs")
    if {setting.model for setting in plan.settings} & {"resnet18", "resnet50", "vgg16"}:
        parts.append(f"stem {one.stem}")
    if one.hard:
        parts.append(f"{HARD_IMAGES} training images, {100 * HARD_NOISE:g} % of the labels wrong")
    return "; ".join(parts) + "."


def machine(store: Store) -> str:
    versions = store.head["versions"]
    device = store.cpu if store.head["device"] == "cpu" else store.head["device"]
    return f"torch {versions['torch']}, rbwa_fused {versions['rbwa_fused']}, {device}."


def rates(plan: Plan, rows: Sequence[Row]) -> str:
    """How the learning rates were chosen, and where the grid was too narrow to tell."""
    shown = "lr is what the system's own optimizer is given (the rate at a schedule's top)."
    if plan.rates:
        return f"Learning rates as given. {shown}"
    grid = ", ".join(f"{lr:g}" for lr in plan.grid)
    text = (
        f"Learning rates: each system's best on validation images (accuracy, mean of "
        f"{plan.sweeps} seed{'s' * (plan.sweeps > 1)} of its own), of {grid}, "
        f"the next half decade while an end is the best, and the quarter decades beside the best; "
        f"these are for SGD without momentum, "
        f"and where momentum sums gradients the optimizer gets 1 - momentum of them. {shown}"
    )
    edge = [
        f"{row.system} ({row.setting.name})" for row in rows if row.lr in (LADDER[0], LADDER[-1])
    ]
    if edge:
        text += f" At the end of all rates: {', '.join(edge)}."
    return text


def as_csv(plan: Plan, rows: Sequence[Row]) -> str:
    """The same, unrounded, a column for each number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV)
    for row in rows:
        writer.writerow(
            [
                row.setting.name,
                row.system,
                SYSTEMS[row.system].about,
                *facts(row.setting),
                row.lr,
                row.own_lr,
                row.accuracy.runs,
                *row.accuracy[:2],
                *row.test_loss[:2],
                *row.train_loss[:2],
                *(row.difference or [""] * 4),
                *(row.loss_difference or [""] * 4),
                row.figure or "",
                "" if row.figure is None else row.figure.accuracy,
                "" if row.figure is None else row.figure.train_loss,
                *(row.published_gain or ["", ""]),
            ]
        )
    return text.getvalue()


def facts(setting: Setting) -> list[object]:
    return [setting.data, setting.hard, setting.model, setting.batch_size]
