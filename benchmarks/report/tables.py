"""The tables of benchmarks.step, as markdown that reads in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.measure.timing import LEAST_KEPT
from benchmarks.report.markdown import NONE, table
from benchmarks.rows.provider import over_period
from benchmarks.rows.providers import BASELINE, HOST_GROUP_ROWS, HOST_ROWS, ROWS

Result = dict[str, Any]

GROUPS = {
    "baseline": "PyTorch",
    "ours": "rbwa_fused",
    "today": "what users write today",
    "ceiling": "ceiling",
}
BUSY = 0.2  # share of disturbed samples


def of_each(results: Sequence[Result], section: str, name: str) -> list[float]:
    """A row's milliseconds in each process."""
    return [result[section][name]["ms"] for result in results]


def ratios(results: Sequence[Result], section: str, name: str) -> list[float]:
    """A row's time over the baseline's, in each process."""
    times = of_each(results, section, name)
    baseline = of_each(results, section, BASELINE)
    return [t / b for t, b in zip(times, baseline, strict=True)]


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def shares(results: Sequence[Result], name: str) -> list[float]:
    """The ceiling's time over a row's, in each process; empty where no ceiling has its streams."""
    facts = results[0]["facts"]
    of_bytes = {
        facts[row.name]["moved"][0]: row.name
        for row in ROWS
        if row.kind == "ceiling" and row.name in facts
    }
    without, with_sample = facts[name]["moved"]
    if without not in of_bytes or with_sample not in of_bytes:
        return []
    light = of_each(results, "step", of_bytes[without])
    heavy = of_each(results, "step", of_bytes[with_sample])
    period = facts[name]["period"]
    return [
        over_period(a, b, period) / t
        for a, b, t in zip(light, heavy, of_each(results, "step", name), strict=True)
    ]


def step_table(results: Sequence[Result]) -> str:
    """Time, bandwidth, ratio and share of the ceiling, in groups."""
    rows: list[list[str]] = []
    measured = [row for row in ROWS if row.name in results[0]["step"]]
    for kind, title in GROUPS.items():
        members = [row for row in measured if row.kind == kind]
        if members:
            rows.append([f"**{title}**", *[""] * 6])
        for row in members:
            ms = median(of_each(results, "step", row.name))
            moved = results[0]["facts"][row.name]["bytes per parameter"]
            ratio = ratios(results, "step", row.name)
            comparable = kind == "ours" or row.name == BASELINE
            share = shares(results, row.name) if comparable else []
            bandwidth = moved and moved * results[0]["parameters"] / ms / 1e6
            rows.append(
                [
                    row.name,
                    f"{ms:.2f}",
                    f"{moved:g}" if moved else NONE,
                    f"{bandwidth:.1f}" if moved else NONE,
                    f"{median(ratio):.2f}",
                    spread(ratio),
                    f"{median(share):.0%}" if share else NONE,
                ]
            )
    header = ["provider", "ms", "bytes", "GB/s", "ratio", "range", "of ceiling"]
    return table(header, rows)


def host_table(results: Sequence[Result], section: str, names: Sequence[str]) -> str:
    """Host time of a step."""
    rows = []
    for name in names:
        us = 1e3 * median(of_each(results, section, name))
        ratio = ratios(results, section, name)
        rows.append([name, f"{us:.1f}", f"{median(ratio):.2f}", spread(ratio)])
    return table(["provider", "us", "ratio", "range"], rows)


def memory_table(results: Sequence[Result]) -> str:
    """What each provider keeps beside weights and gradients, counted in its state."""
    facts = results[0]["facts"]
    rows = [
        [row.name, f"{facts[row.name]['state bytes per parameter']:.2f}"]
        for row in ROWS
        if row.name in facts and row.kind != "ceiling"
    ]
    return table(["provider", "state bytes per parameter"], rows)


def disturbed(results: Sequence[Result]) -> str:
    """How many samples were dropped. Long steps are disturbed more often than short ones, so on a
    busy machine what is left of them does not compare."""
    rows = [row for result in results for row in result["step"].values()]
    total = sum(row["samples"] for row in rows)
    bad = sum(row["disturbed"] for row in rows)
    text = (
        f"{bad} of {total} samples had an involuntary context switch and were dropped "
        f"(kept where a row of a process would have had fewer than {LEAST_KEPT} others)."
    )
    if bad > BUSY * total:
        text += " **This machine is busy: measure again before quoting anything.**"
    return text


def tables(description: Result, model: str, dtype: str, results: Sequence[Result]) -> str:
    """Everything that is printed."""
    count = results[0]["parameters"]
    parts = [
        ", ".join(f"{name}: {value}" for name, value in description.items()),
        f"{model}, {count / 1e6:.1f}M parameters, {dtype}; ratio to {BASELINE} with momentum and "
        f"weight decay, median and range over {len(results)} fresh processes; bytes read and "
        "written for each parameter",
        step_table(results),
        disturbed(results),
    ]
    if "host" in results[0]:
        groups = "31 groups of 2 eight-element tensors, each group with its own lr"
        parts += [
            "Host time of step(): 62 eight-element tensors",
            host_table(results, "host", HOST_ROWS),
            f"Host time of step(): {groups}",
            host_table(results, "host, groups", HOST_GROUP_ROWS),
        ]
    parts += ["Memory beside weights and gradients", memory_table(results)]
    return "\n\n".join(parts)
