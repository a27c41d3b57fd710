"""The suite's pictures, from its results."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.report import tables
from benchmarks.rows.providers import APEX, BASELINE, GPU_TODAY, ROWS

Results = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = {"baseline": "#8A8A8A", "ours": "#0072B2", "today": "#D55E00", "ceiling": "#009E73"}
KINDS = {row.name: row.kind for row in (*ROWS, *GPU_TODAY, APEX)}
MARKS = ("o", "s", "^", "D", "v")
SHIFTS = (0.16, -0.16, 0.32, -0.32)  # of the batch sizes in a row of the last picture


def kind_of(name: str) -> str:
    return KINDS.get(name.removesuffix(", graph"), "ours")


@dataclass(frozen=True)
class Steps:
    """Steps of one model, from a suite on the CPU or on a GPU.

    Attributes:
        times: for each row the milliseconds of a step: median, and two that are about it.
        moved: bytes a parameter that a row's step reads and writes; None where nobody knows.
        copied: GB/s of a copy in the same run; None where that part failed.
        about: what the two are.
    """

    model: str
    dtype: str
    parameters: int
    times: dict[str, tuple[float, float, float]]
    moved: dict[str, float | None]
    copied: float | None
    about: str


def steps_of(results: Results) -> Steps | None:
    """The first model that was stepped."""
    if "step" not in results:
        measured = [problem for problem in results.get("problems", []) if problem["rows"]]
        return steps_on_gpu(measured[0]) if measured else None
    step = results["step"]
    processes = step["processes"]
    times = {name: tables.of_each(processes, "step", name) for name in processes[0]["step"]}
    return Steps(
        step["model"],
        step["dtype"],
        processes[0]["parameters"],
        {name: (median(own), min(own), max(own)) for name, own in times.items()},
        {name: fact["bytes per parameter"] for name, fact in processes[0]["facts"].items()},
        results.get("copy GB/s"),
        f"median and range of {len(processes)} processes",
    )


def steps_on_gpu(problem: Results) -> Steps:
    rows = problem["rows"]
    return Steps(
        problem["model"],
        problem["dtype"],
        problem["parameters"],
        {name: (row["cold ms"], *row["cold quartiles ms"]) for name, row in rows.items()},
        {name: row["bytes per parameter"] for name, row in rows.items()},
        problem["copy GB/s"],
        "caches cold, median and quartiles of the rounds",
    )


def draw(results: Results, stem: Path) -> list[Path]:
    """Writes ``stem``-step.png, -bandwidth.png, -sizes.png, -training.png and -adamw.png, those of
    which there are figures."""
    steps = steps_of(results)
    trained = [run for run in results["training"] if overheads(run)]
    with_sgd = [run for run in trained if baseline_of(run) == BASELINE]
    with_adamw = [run for run in trained if baseline_of(run) != BASELINE]
    pictures = {
        "step": step_times(results, steps) if steps else None,
        "bandwidth": bandwidth(results, steps) if steps else None,
        "sizes": sizes(results) if results["sizes"] else None,
        "training": training(results, with_sgd) if with_sgd else None,
        "adamw": training(results, with_adamw) if with_adamw else None,
    }
    files = []
    for name, figure in pictures.items():
        if figure is None:
            continue
        file = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(file, dpi=90)
        files.append(file)
    return files


def subtitle(results: Results) -> str:
    machine = results["machine"]
    if "gpu" in machine:
        return f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}"
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"


def bars(count: int, title: str, results: Results) -> tuple[Figure, Axes]:
    """A figure for so many horizontal bars."""
    figure = Figure(figsize=(9.0, 1.4 + 0.27 * count), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title)
    axes.set_title(subtitle(results), fontsize="small", color="#555555")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def named_bars(axes: Axes, names: list[str], values: list[float], ends: list[Any]) -> None:
    """Bars in their kind's colour, from the top, with their ranges and values."""
    places = range(len(names), 0, -1)
    axes.barh(places, values, color=[COLORS[kind_of(name)] for name in names], height=0.7)
    errors = [
        [value - low for value, (low, _) in zip(values, ends, strict=True)],
        [high - value for value, (_, high) in zip(values, ends, strict=True)],
    ]
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor="#333333", elinewidth=1.0)
    axes.set_yticks(places, names, fontsize="small")
    axes.set_ylim(0.4, len(names) + 0.6)
    for place, value, (_, high) in zip(places, values, ends, strict=True):
        axes.text(high, place, f"  {value:.3g}", va="center", fontsize="x-small")
    shown = {kind_of(name) for name in names}
    axes.legend(
        [Patch(color=color) for kind, color in COLORS.items() if kind in shown],
        [title for kind, title in tables.GROUPS.items() if kind in shown],
        frameon=False,
        fontsize="small",
    )


def step_times(results: Results, steps: Steps) -> Figure:
    """(a) Milliseconds of a step, fastest first; lines reach from the fastest process to the
    slowest, or over the quartiles."""
    names = sorted(steps.times, key=lambda name: steps.times[name][0])
    figure, axes = bars(len(names), f"One optimizer step, {steps.model}, {steps.dtype}", results)
    values = [steps.times[name][0] for name in names]
    named_bars(axes, names, values, [steps.times[name][1:] for name in names])
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlim(0.6 * min(values), 1.6 * max(high for _, _, high in steps.times.values()))
    axes.set_xlabel(f"ms a step (log), {steps.about}")
    return figure


def bandwidth(results: Results, steps: Steps) -> Figure:
    """(b) Bytes that a step's mathematics reads and writes over its time, beside a copy's."""
    reached = {
        name: [moved * steps.parameters / ms / 1e6 for ms in steps.times[name]]
        for name, moved in steps.moved.items()
        if moved
    }
    names = sorted(reached, key=lambda name: -reached[name][0])
    figure, axes = bars(len(names), "Memory bandwidth that a step reaches", results)
    values = [reached[name][0] for name in names]
    named_bars(axes, names, values, [(min(reached[n]), max(reached[n])) for n in names])
    if steps.copied is not None:
        axes.axvline(steps.copied, color="black", linestyle="--")
        axes.text(steps.copied, 0.5, f" b.copy_(a): {steps.copied:.0f}", fontsize="small")
    axes.set_xlim(0.0, 1.1 * max(steps.copied or 0.0, *(max(own) for own in reached.values())))
    axes.set_xlabel("GB/s of the bytes that each row moves, its own temporaries included")
    return figure


def sizes(results: Results) -> Figure:
    """(c) Time of a step against the number of parameters."""
    found = results["sizes"]
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    axes = figure.subplots()
    figure.suptitle("One optimizer step by number of parameters (62 tensors, float32)")
    axes.set_title(subtitle(results), fontsize="small", color="#555555")
    counts = [int(count) for count in found]
    of_host = False
    for mark, name in zip(MARKS, next(iter(found.values())), strict=False):
        shades = {BASELINE: "#8A8A8A", "EMA": "#56B4E9", "RBWA": "#009E73"}
        color = shades.get(name, COLORS[kind_of(name)])
        own = {int(count): rows[name] for count, rows in found.items() if name in rows}
        times = [1e3 * figures["ms"] for figures in own.values()]
        axes.plot(list(own), times, marker=mark, label=name, color=color)
        if all("host ms" in figures for figures in own.values()):
            of_host = True
            times = [1e3 * figures["host ms"] for figures in own.values()]
            axes.plot(list(own), times, "--", color=color, linewidth=0.8)
    memory = [20.0 * count / results["copy GB/s"] / 1e3 for count in counts]
    axes.plot(counts, memory, "k:", label="20 bytes a parameter at the copy's speed")
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="µs a step")
    if of_host:
        axes.set_ylabel("µs a step: the device's, caches cold; dashed, the host's")
    axes.set_ylim(bottom=1.0 if of_host else 5.0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def baseline_of(run: Results) -> str:
    """What a training run compares with: torch's fused SGD, where it does not say."""
    return str(run.get("baseline", BASELINE))


def overheads(run: Results) -> dict[str, Results]:
    """The rows of a training run whose step is timed by itself, but the baseline."""
    return {
        name: row
        for name, row in run["rows"].items()
        if name != baseline_of(run) and row["overheads"] is not None
    }


def training(results: Results, runs: list[Results]) -> Figure:
    """(d), (e) What each row adds to a whole training step, against its baseline; a panel for each
    model and precision, eager and under a CUDA graph."""
    panels: dict[str, list[Results]] = {}
    for run in runs:
        panels.setdefault(f"{run['model']}, {run.get('how', 'float32')}", []).append(run)
    names = [*dict.fromkeys(name for run in runs for name in overheads(run))]
    columns = min(2, len(panels))
    lines = ceil(len(panels) / columns)
    height = 1.4 + 0.27 * (len(names) + 2)
    figure = Figure(figsize=(9.0 * (1 + columns) / 2, height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    figure.suptitle("What a row adds to a whole training step")
    if len(panels) > 1:
        figure.supxlabel(subtitle(results), fontsize="small", color="#555555")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (how, own) in zip(grid.flat, panels.items(), strict=False):
        panel(axes, names, own)
        axes.set_title(
            subtitle(results) if len(panels) == 1 else how, fontsize="small", color="#555555"
        )
    return figure


def panel(axes: Axes, names: list[str], runs: list[Results]) -> None:
    """Overheads of the rows in runs that differ in their batch size."""
    for mark, run, shift in zip(MARKS, runs, SHIFTS, strict=False):
        for name, row in overheads(run).items():
            low, high = row["overheads"]
            axes.errorbar(
                row["overhead"],
                len(names) - names.index(name) + shift,
                xerr=[[row["overhead"] - low], [high - row["overhead"]]],
                fmt=mark,
                color=COLORS[kind_of(name)],
                alpha=1.0 if shift > 0 else 0.55,
            )
        axes.plot([], [], mark, color="#333333", label=f"batch size {run['batch size']}")
    axes.axvline(0.0, color="#333333", linewidth=1.0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xscale("symlog", linthresh=5.0)
    axes.set_xticks([-5, 0, 5, 10, 20, 50, 100], ["-5", "0", "5", "10", "20", "50", "100"])
    axes.set_yticks(range(len(names), 0, -1), names, fontsize="small")
    axes.set_xlabel(
        f"% of {runs[0]['model']}'s training step with {baseline_of(runs[0])}\n"
        "lines: the table's range"
    )
    axes.legend(frameon=False)
