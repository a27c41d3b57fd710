"""The figures of whole training steps, and their table."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.report.markdown import NONE, table
from benchmarks.report.tables import facts_line, left_out
from benchmarks.rows import decoder
from benchmarks.rows.providers import IN_BACKWARD


@dataclass(frozen=True)
class Sample:
    """Seconds of one whole training step and of the optimizer's step, and whether a thread of the
    process lost its core in between."""

    whole: float
    step: float
    disturbed: bool


Samples = dict[str, list[Sample]]


@dataclass(frozen=True)
class Measured:
    """What a process has found: the samples of each row, one a round; why others were not timed;
    and those of ours that were wrong."""

    machine: dict[str, str | int | float]
    parameters: int
    samples: Samples
    skipped: dict[str, str]
    wrong: list[str]


def calm_pairs(own: Sequence[Sample], base: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Samples of the same rounds, but those in which a core was lost."""
    pairs = list(zip(own, base, strict=True))
    calm = [(a, b) for a, b in pairs if not (a.disturbed or b.disturbed)]
    return calm if len(calm) > len(pairs) // 4 else pairs


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median; nan of a single value."""
    if len(values) < 2:
        return math.nan, math.nan
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (np.array(values),), np.median, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def milliseconds(samples: Sequence[Sample], part: str) -> float:
    """Median of the samples in which no core was lost, if there are enough."""
    calm = [s for s in samples if not s.disturbed]
    kept = calm if len(calm) > len(samples) // 4 else samples
    return 1e3 * median(getattr(s, part) for s in kept)


def middle(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4)
    return first, third


def figures(results: Sequence[Samples], name: str) -> dict[str, Any]:
    """What the table says of a row: medians over processes of medians of each. The overheads'
    range is that of the processes, or the quartiles over the rounds of a single one. The baseline
    is the first row."""
    steps, wholes, overheads, ratios = [], [], [], []
    for result in results:
        own, base = result[name], result[next(iter(result))]
        steps.append(milliseconds(own, "step"))
        wholes.append(milliseconds(own, "whole"))
        difference = steps[-1] - milliseconds(base, "step")
        overheads.append(100 * difference / milliseconds(base, "whole"))
        ratios += [a.whole / b.whole for a, b in calm_pairs(own, base)]
    ends = min(overheads), max(overheads)
    if len(results) == 1:
        whole = milliseconds(base, "whole")
        first, third = middle([1e5 * (a.step - b.step) / whole for a, b in calm_pairs(own, base)])
        ends = min(first, *ends), max(third, *ends)  # the medians' difference may lie outside
    low, high = interval(ratios)
    within = name.endswith(IN_BACKWARD)
    return {
        "step ms": None if within else median(steps),
        "whole ms": median(wholes),
        "overhead": None if within else median(overheads),
        "overheads": None if within else ends,
        "ratio": median(ratios),
        "interval": (low, high),
        "pairs": len(ratios),
    }


def timed_rows(results: Sequence[Measured]) -> list[str]:
    """Rows that every process has timed."""
    return [name for name in results[0].samples if all(name in r.samples for r in results)]


def title(args: argparse.Namespace, results: Sequence[Measured]) -> str:
    """What was trained, how, and how often."""
    rounds = median(len(own) for result in results for own in result.samples.values())
    processes = "1 process" if len(results) == 1 else f"{len(results)} fresh processes"
    spread = "quartiles of the rounds" if len(results) == 1 else "that of the processes"
    return (
        f"{args.model} on {args.device}, {results[0].parameters / 1e6:.1f}M parameters, "
        f"{how(args)}, batches of {samples_of(args)}; {processes} of {rounds:g} rounds; "
        f"range: {spread}; against {next(iter(results[0].samples))}"
    )


def samples_of(args: argparse.Namespace) -> str:
    """What a batch holds."""
    if args.model == decoder.NAME:
        return f"{args.batch_size} sequences of {decoder.TOKENS} bytes"
    return f"{args.batch_size} {args.side}x{args.side} images"


def how(args: argparse.Namespace) -> str:
    """In which precision and layout, and whether under a CUDA graph."""
    parts = {
        "float32": True,
        "bfloat16 autocast": args.amp,
        "channels_last": args.channels_last,
        "CUDA graph": args.graph,
    }
    return ", ".join(part for part, chosen in parts.items() if chosen)


def results(args: argparse.Namespace, measured: Sequence[Measured]) -> dict[str, Any]:
    """What the suite's JSON says of a run."""
    samples = [result.samples for result in measured]
    return {
        "model": args.model,
        "batch size": args.batch_size,
        "baseline": next(iter(samples[0])),
        "how": how(args),
        "rows": {name: figures(samples, name) for name in timed_rows(measured)},
        "skipped": not_timed(measured),
        "wrong": wrong_rows(measured),
    }


def report(args: argparse.Namespace, results: Sequence[Measured], peaks: dict[str, float]) -> str:
    """The table."""
    rows = []
    for name in timed_rows(results):
        found = figures([result.samples for result in results], name)
        timed = found["overheads"] is not None
        rows.append(
            [
                name,
                f"{found['step ms']:.3f}" if timed else NONE,
                f"{found['whole ms']:.2f}",
                f"{found['overhead']:+.2f} %" if timed else NONE,
                "{:+.2f} to {:+.2f}".format(*found["overheads"]) if timed else NONE,
                f"{found['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*found["interval"]),
                str(found["pairs"]),
                f"{peaks[name]:.0f}" if name in peaks else NONE,
            ]
        )
    header = ["row", "step ms", "whole ms", "overhead", "range", "ratio", "95 %", "pairs"]
    return "\n\n".join(
        [
            facts_line(results[0].machine),
            title(args, results),
            table([*header, "peak MB"], rows),
            *left_out(not_timed(results), wrong_rows(results)),
        ]
    )


def not_timed(results: Sequence[Measured]) -> dict[str, str]:
    """Why rows were not timed."""
    return {name: why for result in results for name, why in result.skipped.items()}


def wrong_rows(results: Sequence[Measured]) -> list[str]:
    """Rows of ours that computed something else, in any process."""
    return sorted({name for result in results for name in result.wrong})
