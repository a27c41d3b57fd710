"""Flatness in a table and a picture."""

from __future__ import annotations

import csv
import io
import math
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.papers.curves import COLORS, DASHES, png
from studies.papers.flatness import doubling
from studies.papers.plan import Plan
from studies.papers.report import conditions, fill, machine, rates
from studies.papers.settings import Setting
from studies.papers.store import Store
from studies.papers.systems import SYSTEMS

Array = npt.NDArray[np.float64]
LOSSES = (("test_loss", "test loss"), ("train_loss", "training loss"))


def records(plan: Plan, store: Store, setting: Setting) -> list[dict[str, Any]]:
    """The plan's runs of a setting."""
    jobs = plan.result_jobs(store)
    return [store.records[job.key] for job in jobs if job.setting == setting]


def distances(plan: Plan, store: Store) -> list[tuple[Setting, str, str, list[float]]]:
    """(setting, system, which loss, where each ray of each seed doubles it)."""
    return [
        (
            setting,
            system,
            loss,
            [
                doubling(record["distances"], ray)
                for record in records(plan, store, setting)
                for ray in record[loss][place]
            ],
        )
        for setting in plan.settings
        for place, system in enumerate(plan.systems)
        for loss, _ in LOSSES
    ]


def markdown(plan: Plan, store: Store) -> str:
    """Median and range of the distances at which a loss doubles."""
    titles = dict(LOSSES)
    lines = [
        "| setting | solution | loss | at the solution | doubles at: median | range | rays |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting, system, loss, found in distances(plan, store):
        place = plan.systems.index(system)
        own = records(plan, store, setting)
        start = median(record[loss][place][0][0] for record in own)
        lines.append(
            f"| {setting.name} | {system} | {titles[loss]} | {start:.4g} | {told(median(found))} | "
            f"{told(min(found))} to {told(max(found))} | {len(found)} |"
        )
    first = plan.settings[0]
    gaps = [record["apart"] for record in records(plan, store, first)]
    norms = [record["norms"] for record in records(plan, store, first)]
    kind = {
        "sphere": "drawn uniformly from the unit sphere of all weights; distances in weight space",
        "filter": "normalised by filter; distances in fractions of the weights",
    }[store.head["directions"]]
    texts = [
        f"Directions {kind}; the same ones around both solutions. BatchNorm is estimated anew at "
        f"every point. {first.title}: the solutions are {median(gaps):.3g} apart (median over "
        f"{len(gaps)} seed{'s' * (len(gaps) > 1)}), their weights' norms "
        + " and ".join(f"{median(pair[k] for pair in norms):.3g}" for k in range(2))
        + ".",
        f"{conditions(plan)} Seeds {', '.join(map(str, plan.seeds))}; losses in nats an image.",
        rates(plan, []),
        machine(store),
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(fill(text) for text in texts) + "\n"


def told(distance: float) -> str:
    return "beyond the rays" if math.isinf(distance) else f"{distance:.3g}"


def as_csv(plan: Plan, store: Store) -> str:
    """A row for each ray."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "system", "loss", "ray", "doubling_distance"])
    for setting, system, loss, found in distances(plan, store):
        for ray, distance in enumerate(found):
            writer.writerow([setting.name, system, loss, ray, distance])
    return text.getvalue()


def draw(plan: Plan, store: Store) -> bytes:
    """Losses along the rays (median, band: lowest to highest) and on the segment between."""
    size = (13.0, 0.6 + 3.8 * len(plan.settings))
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    axes = figure.subplots(len(plan.settings), 3, squeeze=False)
    for row, setting in zip(axes, plan.settings, strict=True):
        own = records(plan, store, setting)
        for axis, (loss, label) in zip(row, LOSSES, strict=False):
            for place, system in enumerate(plan.systems):
                draw_rays(axis, own, loss, place, SYSTEMS[system].about)
            axis.set_xlabel(f"distance ({store.head['directions']})")
            axis.set_ylabel(f"{label} (nats an image)")
            axis.set_yscale("log")
            axis.legend(frameon=False, fontsize="small")
        draw_segment(row[2], own, plan)
        row[1].set_title(setting.title, fontsize="medium")
        for axis in row:
            axis.grid(alpha=0.25)
    return png(figure)


def draw_rays(axis: Axes, own: list[dict[str, Any]], loss: str, place: int, label: str) -> None:
    reach = min(record["distances"][-1] for record in own)
    grid = np.linspace(0.0, reach, 100)
    values = np.array(
        [
            np.interp(grid, record["distances"], as_array(ray))
            for record in own
            for ray in record[loss][place]
        ]
    )
    color = COLORS[place]
    axis.fill_between(grid, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axis.plot(grid, np.median(values, 0), color=color, linestyle=DASHES[place], label=label)


def draw_segment(axis: Axes, own: list[dict[str, Any]], plan: Plan) -> None:
    """0 is the first solution, 1 the second."""
    positions = own[0]["segment"]
    for k, (loss, label) in enumerate(LOSSES):
        values = np.array([as_array(record[f"segment_{loss}"]) for record in own])
        color = COLORS[k + 2]
        axis.fill_between(
            positions, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0
        )
        axis.plot(positions, np.median(values, 0), color=color, linestyle=DASHES[k], label=label)
    axis.set_yscale("log")
    axis.set_xticks([0.0, 1.0], plan.systems)
    for place in (0.0, 1.0):
        axis.axvline(place, color="#555555", linestyle=":", linewidth=1.0)
    axis.set_xlabel("on the line through both solutions")
    axis.legend(frameon=False, fontsize="small")


def as_array(values: list[float | None]) -> Array:
    return np.array(values, dtype=np.float64)
