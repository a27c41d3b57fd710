"""What the formulas predict for the processes of `scaling_measure`, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.report.markdown import table
from studies.scaling.collectives import Link, ring_all_reduce
from studies.scaling.processes import ALL_REDUCE, PARAMETERS, PERIODS, SIZES, Figures
from studies.scaling.strategies import FLOAT32
from studies.scaling.tables import milliseconds

NAMES = {
    "whole": "step of ResNet-18",
    "whole, EMA": "the same with an EMA",
    "shard": "step of a share of it",
    "shard, EMA": "the same with an EMA",
    "alone": "training step, no exchange",
    "DDP": "training step, DDP",
}
FITTED = (2**16, 2**24)  # bytes; every other size is predicted


def fitted(figures: Figures, world: int) -> Link:
    """The link with which `ring_all_reduce` gives the medians of the two sizes of FITTED.

    Raises:
        ValueError: if the larger size did not take longer.
    """
    small, large = FITTED
    low, high = (median(figures[f"{ALL_REDUCE}{size}"]) for size in FITTED)
    if high <= low:
        raise ValueError(f"{large} bytes took {high} s, {small} bytes {low} s")
    bandwidth = 2 * (world - 1) / world * (large - small) / (high - low)
    latency = low / (2 * (world - 1)) - small / world / bandwidth
    return Link(bandwidth, latency)


def predicted(figures: Figures, world: int, link: Link) -> dict[str, float | None]:
    """Seconds of each item, or None where the item itself is what is predicted from."""
    whole, alone = median(figures["whole"]), median(figures["alone"])
    with_ema = 1 + FLOAT32.sampled() / FLOAT32.step()
    exchange = ring_all_reduce(world, 4 * PARAMETERS, link)
    return {
        **{
            f"{ALL_REDUCE}{size}": None if size in FITTED else ring_all_reduce(world, size, link)
            for size in SIZES
        },
        "whole": None,
        "whole, EMA": whole * with_ema,
        "shard": whole / world,
        "shard, EMA": whole * with_ema / world,
        "alone": None,
        "DDP": alone + exchange,
        **{f"every {k}": alone + exchange / k for k in PERIODS},
    }


def shown(name: str) -> str:
    """A row's name."""
    if name in NAMES:
        return NAMES[name]
    if not name.startswith(ALL_REDUCE):
        return f"training step, averaged {name}"
    size = int(name.removeprefix(ALL_REDUCE))
    return ALL_REDUCE + (f"of {size // 2**20} MiB" if size >= 2**20 else f"of {size // 2**10} KiB")


def compared(world: int, figures: Figures) -> str:
    """The table of so many processes."""
    link = fitted(figures, world)
    rows = []
    for name, seconds in predicted(figures, world, link).items():
        own = figures[name]
        middle = median(own)
        rows.append(
            [
                shown(name),
                "-" if seconds is None else milliseconds(seconds),
                milliseconds(middle),
                f"{milliseconds(min(own))} to {milliseconds(max(own))}",
                "-" if seconds is None else f"{middle / seconds:.2f}",
            ]
        )
    header = [f"{world} processes, ms", "predicted", "measured", "range", "ratio"]
    return table(header, rows)


def agreement(results: dict[str, Figures]) -> str:
    """The smallest and the largest ratio of each kind of row."""

    def size(name: str) -> int:
        return int(name.removeprefix(ALL_REDUCE)) if name.startswith(ALL_REDUCE) else -1

    kinds: dict[str, Callable[[str], bool]] = {
        "all-reduce, 1 MiB and more": lambda name: size(name) >= 2**20,
        "all-reduce, less": lambda name: 0 <= size(name) < 2**20,
        "the EMA in the step": lambda name: name == "whole, EMA",
        "a share of the step": lambda name: name.startswith("shard"),
        "training steps": lambda name: name == "DDP" or name.startswith("every"),
    }
    rows = []
    for kind, belongs in kinds.items():
        cells = []
        for world, figures in results.items():
            told = predicted(figures, int(world), fitted(figures, int(world)))
            own = [
                median(figures[name]) / seconds
                for name, seconds in told.items()
                if seconds is not None and belongs(name)
            ]
            several = len(own) > 1
            cells.append(f"{min(own):.2f} to {max(own):.2f}" if several else f"{own[0]:.2f}")
        rows.append([kind, *cells])
    return table(["measured / predicted", *(f"{world} processes" for world in results)], rows)


def links(results: dict[str, Figures]) -> str:
    """What the fits say."""
    rows = []
    for world, figures in results.items():
        link = fitted(figures, int(world))
        rows.append(
            [f"{world} processes", milliseconds(link.latency), f"{link.bandwidth / 1e9:.2f}"]
        )
    return table(["fitted", "latency, ms", "GB/s"], rows)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Everything that ``--measure`` prints, by name."""
    worlds: dict[str, Figures] = results["seconds"]
    return {
        "machine": ", ".join(f"{key}: {value}" for key, value in results["machine"].items()),
        "links": links(worlds),
        "agreement": agreement(worlds),
        **{f"processes-{world}": compared(int(world), own) for world, own in worlds.items()},
    }
