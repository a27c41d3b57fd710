"""The picture of README.md: time of a step against the number of GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from studies.scaling.strategies import strategies
from studies.scaling.tables import FEW_TOKENS, GROUP, NETWORKS, SMALL, K

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#8A8A8A", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73")
MARKS = ("o", "s", "^", "D", "v", "P")
MOST = 12  # doublings of one GPU
TICKS = (0.1, 0.2, 0.5, 1, 2, 5)  # seconds


def draw(file: Path) -> None:
    """Writes the picture: a column for each network, a row for each number of tokens."""
    tokens = (SMALL.tokens, FEW_TOKENS)
    figure = Figure(figsize=(10.0, 7.6), layout="constrained")
    figure.suptitle("A training step of 8B on paper: H200, RBWA, collectives behind the passes")
    panels = figure.subplots(len(tokens), len(NETWORKS), sharex=True, sharey="row")
    counts = [2**i for i in range(MOST + 1)]
    for row, count in zip(panels, tokens, strict=True):
        training = replace(SMALL, tokens=count)
        for axes, (network, machine) in zip(row, NETWORKS.items(), strict=True):
            for (name, strategy), color, mark in zip(
                strategies(GROUP, K).items(), COLORS, MARKS, strict=True
            ):
                seconds = [strategy(machine, training, n).seconds for n in counts]
                axes.plot(counts, seconds, color=color, marker=mark, markersize=4, label=name)
            alone = training.compute(machine)
            axes.axhline(alone, color="black", linestyle=":", label="the passes alone")
            axes.set(xscale="log", yscale="log", title=f"{network}, {count:,} tokens a GPU")
            axes.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
            axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.set_ylim(0.9 * alone, 6.0)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        row[0].set_ylabel("seconds a step")
    for axes in panels[-1]:
        axes.set_xlabel("GPUs")
    panels[0][0].legend(frameon=False)
    figure.savefig(file, dpi=90)
