"""Draws docs/tables.png: the four tables of a step, as a real optimizer has them.

python docs/draw_tables.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import nn

import rbwa_fused as rf
from rbwa_fused.engine import segments
from rbwa_fused.rules import COLUMNS, Kind, Sampling

OUT = Path(__file__).parent / "tables.png"
POINTS = {"row": "#cfe3f7", "sampling": "#f7e3cf", "shape": "#dcefd5"}


def optimizer() -> rf.FusedSGD:
    """Three parameters in two groups, the first with an average, after two steps."""
    weight, bias, head = (nn.Parameter(torch.ones(shape)) for shape in ((64, 32), (64,), (10, 64)))
    groups = [
        {"params": [weight, bias], "average": rf.ema(0.99)},
        {"params": [head], "lr": 0.01, "momentum": 0.0},
    ]
    opt = rf.FusedSGD(groups, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.0005)
    for p in (weight, bias, head):
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    return opt


def number(value: float) -> str:
    return f"{value:.4g}"


def draw(
    axes: Axes,
    title: str,
    columns: list[str],
    rows: list[list[str]],
    labels: list[str],
    colours: dict[str, str],
) -> None:
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    table = axes.table(cellText=rows, colLabels=columns, rowLabels=labels, loc="upper center")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.25)
    for (row, column), cell in table.get_celld().items():
        cell.set_linewidth(0.4)
        name = columns[column] if column >= 0 else "index"
        if name in colours:
            cell.set_facecolor(colours[name])
        if row == 0:
            cell.set_text_props(fontweight="bold")


def main(out: Path = OUT) -> int:
    """Draws the picture."""
    opt = optimizer()
    ((table, _),) = opt.engine.tables.launches
    told = table.table(*opt.engine.tables.plan.tensors)
    columns, shapes, ages = told.segments, told.shapes, told.ages
    rows, samplings = told.rows, told.samplings
    names = ["length", "row", "sampling", "shape", "dims", "dtype"]
    kept = ["momentum_buffer", "average"]
    places = [segments.COLUMN_OF[segments.SLOT_OF[name]] for name in kept]
    cells = [
        [*map(str, line[: segments.FIRST_STREAM]), *(str(line[at]) for at in places), str(age)]
        for line, age in zip(columns.tolist(), ages.tolist(), strict=True)
    ]
    figure, axes = plt.subplots(4, 1, figsize=(9, 6.2), height_ratios=[3, 2, 4, 4])
    draw(
        axes[0],
        "segments: one line a parameter; where its streams are in `state` (-1: nowhere), "
        f"and {len(segments.SLOTS) - 2} streams more",
        [*names, "momentum", "average", "(age)"],
        cells,
        ["weight", "bias", "head"],
        POINTS,
    )
    sizes = [str(value) for value in shapes.tolist()]
    draw(
        axes[1],
        "shapes: sizes, then strides, of each parameter",
        [str(i) for i in range(len(sizes))],
        [sizes],
        [""],
        {str(line[3]): POINTS["shape"] for line in columns.tolist()},
    )
    draw(
        axes[2],
        "rows: two a param group, the second for a parameter's first step with momentum (age 0)",
        [name.rstrip("_") for name in COLUMNS],
        [[Kind(int(kind)).name.lower(), *map(number, line)] for kind, *line in rows.tolist()],
        [str(i) for i in range(len(rows))],
        {"index": POINTS["row"]},
    )
    draw(
        axes[3],
        "samplings: two a policy and count, the second where the average is the parameter itself",
        list(Sampling._fields),
        [list(map(number, line)) for line in samplings.tolist()],
        [str(i) for i in range(len(samplings))],
        {"index": POINTS["sampling"]},
    )
    note = (
        "a coloured column names a line of the table of its colour; ages are a table of their own"
    )
    figure.text(0.99, 0.01, note, ha="right")
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
