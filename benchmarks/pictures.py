"""The suite's four pictures, drawn from its results alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks import report
from benchmarks.providers import BASELINE, IN_BACKWARD, ROWS

Results = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = {"baseline": "#8A8A8A", "ours": "#0072B2", "today": "#D55E00", "ceiling": "#009E73"}
KINDS = {row.name: row.kind for row in ROWS}
MARKS = ("o", "s", "^", "D", "v")


def kind_of(name: str) -> str:
    return KINDS.get(name, "ours")


def draw(results: Results, stem: Path) -> list[Path]:
    """Writes ``stem``-step.png, -bandwidth.png, -sizes.png and -training.png."""
    pictures = {
        "step": step_times(results),
        "bandwidth": bandwidth(results),
        "sizes": sizes(results),
        "training": training(results),
    }
    files = []
    for name, figure in pictures.items():
        file = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(file, dpi=90)
        files.append(file)
    return files


def subtitle(results: Results) -> str:
    machine = results["machine"]
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
        [title for kind, title in report.GROUPS.items() if kind in shown],
        frameon=False,
        fontsize="small",
    )


def step_times(results: Results) -> Figure:
    """(a) Milliseconds of a step, fastest first; lines reach from the fastest process to the
    slowest."""
    step = results["step"]
    processes = step["processes"]
    times = {name: report.of_each(processes, "step", name) for name in processes[0]["step"]}
    names = sorted(times, key=lambda name: median(times[name]))
    figure, axes = bars(
        len(names), f"One optimizer step, {step['model']}, {step['dtype']}", results
    )
    values = [median(times[name]) for name in names]
    named_bars(axes, names, values, [(min(times[n]), max(times[n])) for n in names])
    axes.set_xscale("log")
    axes.set_xlim(0.6 * min(values), 1.6 * max(max(own) for own in times.values()))
    axes.set_xlabel(f"ms a step (log), median and range of {len(processes)} processes")
    return figure


def bandwidth(results: Results) -> Figure:
    """(b) Bytes that a step's mathematics reads and writes over its time, beside a copy's."""
    processes = results["step"]["processes"]
    facts, count = processes[0]["facts"], processes[0]["parameters"]
    reached = {
        name: [
            fact["bytes per parameter"] * count / ms / 1e6
            for ms in report.of_each(processes, "step", name)
        ]
        for name, fact in facts.items()
        if fact["bytes per parameter"]
    }
    names = sorted(reached, key=lambda name: -median(reached[name]))
    figure, axes = bars(len(names), "Memory bandwidth that a step reaches", results)
    values = [median(reached[name]) for name in names]
    named_bars(axes, names, values, [(min(reached[n]), max(reached[n])) for n in names])
    copied = results["copy GB/s"]
    axes.axvline(copied, color="black", linestyle="--")
    axes.text(copied, 0.5, f" b.copy_(a): {copied:.0f}", fontsize="small")
    axes.set_xlim(0.0, 1.1 * max(copied, *(max(own) for own in reached.values())))
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
    for mark, name in zip(MARKS, next(iter(found.values())), strict=False):
        shades = {BASELINE: "#8A8A8A", "EMA": "#56B4E9", "RBWA": "#009E73"}
        axes.plot(
            counts,
            [1e3 * figures[name]["ms"] for figures in found.values()],
            marker=mark,
            label=name,
            color=shades.get(name, COLORS[kind_of(name)]),
        )
    memory = [20.0 * count / results["copy GB/s"] / 1e3 for count in counts]
    axes.plot(counts, memory, "k:", label="20 bytes a parameter at the copy's speed")
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="µs a step")
    axes.set_ylim(bottom=5.0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def training(results: Results) -> Figure:
    """(d) What each row adds to a whole training step, against torch's fused SGD."""
    measured = results["training"]
    names = [
        name for name in measured[0]["rows"] if name != BASELINE and not name.endswith(IN_BACKWARD)
    ]
    figure, axes = bars(len(names) + 2, "What a row adds to a whole training step", results)
    places = range(len(names), 0, -1)
    for mark, run, shift in zip(MARKS, measured, (0.16, -0.16, 0.32, -0.32), strict=False):
        for place, name in zip(places, names, strict=True):
            own = run["rows"][name]
            low, high = own["overheads"]
            axes.errorbar(
                own["overhead"],
                place + shift,
                xerr=[[own["overhead"] - low], [high - own["overhead"]]],
                fmt=mark,
                color=COLORS[kind_of(name)],
                alpha=1.0 if shift > 0 else 0.55,
                label=f"batch size {run['batch size']}" if place == len(names) else None,
            )
    axes.axvline(0.0, color="#333333", linewidth=1.0)
    axes.set_xscale("symlog", linthresh=5.0)
    axes.set_xticks([-5, 0, 5, 10, 20, 50, 100], ["-5", "0", "5", "10", "20", "50", "100"])
    axes.set_yticks(places, names, fontsize="small")
    axes.set_xlabel(
        f"% of the training step with {BASELINE}, {measured[0]['model']}; range of the processes"
    )
    axes.legend(frameon=False)
    return figure
