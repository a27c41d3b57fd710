"""The tables of benchmarks.step, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.measure.timing import LEAST_KEPT
from benchmarks.report.markdown import NONE, table
from benchmarks.rows.provider import Row, over_period
from benchmarks.rows.providers import BASELINE, HOST_GROUP_ROWS, HOST_ROWS, ROWS

Result = dict[str, Any]

GROUPS = {
    "baseline": "PyTorch",
    "ours": "rbwa_fused",
    "today": "what users write today",
    "ceiling": "ceiling",
}
GPU_HEADER = [
    *("provider", "cold us", "warm us", "host us", "bytes"),
    *("GB/s", "of copy", "launches", "ratio"),
]
BUSY = 0.2  # share of disturbed samples


def facts_line(description: Mapping[str, object]) -> str:
    """The machine and the versions, which stand above all tables."""
    return ", ".join(f"{name}: {value}" for name, value in description.items())


def left_out(skipped: Mapping[str, str], wrong: Sequence[str]) -> list[str]:
    """Lines for rows that were not timed, and why."""
    return [
        *(f"skipped: {name} ({why})" for name, why in skipped.items()),
        *(f"**WRONG: {name}, not timed**" for name in wrong),
    ]


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


def grouped(header: Sequence[str], rows: Sequence[Row], line: Callable[[str], list[str]]) -> str:
    """A table of these rows under the headings of their groups."""
    lines: list[list[str]] = []
    for kind, title in GROUPS.items():
        members = [row.name for row in rows if row.kind == kind]
        if members:
            lines.append([f"**{title}**", *[""] * (len(header) - 1)])
            lines += [line(name) for name in members]
    return table(header, lines)


def step_table(results: Sequence[Result]) -> str:
    """Time, bandwidth, ratio and share of the ceiling."""
    rows = [row for row in ROWS if row.name in results[0]["step"]]
    comparable = {row.name for row in rows if row.kind == "ours"} | {BASELINE}

    def line(name: str) -> list[str]:
        ms = median(of_each(results, "step", name))
        moved = results[0]["facts"][name]["bytes per parameter"]
        ratio = ratios(results, "step", name)
        share = shares(results, name) if name in comparable else []
        return [
            name,
            f"{ms:.2f}",
            f"{moved:g}" if moved else NONE,
            f"{moved * results[0]['parameters'] / ms / 1e6:.1f}" if moved else NONE,
            f"{median(ratio):.2f}",
            spread(ratio),
            f"{median(share):.0%}" if share else NONE,
        ]

    return grouped(["provider", "ms", "bytes", "GB/s", "ratio", "range", "of ceiling"], rows, line)


def host_table(results: Sequence[Result], section: str, names: Sequence[str]) -> str:
    """Host time of a step, of the rows that these results hold: some files are older than a row."""
    rows = []
    for name in names:
        if name not in results[0][section]:
            continue
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


def cpu_tables(description: Result, model: str, dtype: str, results: Sequence[Result]) -> str:
    """Everything that is printed."""
    count = results[0]["parameters"]
    parts = [
        facts_line(description),
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


def gpu_line(name: str, row: Result) -> list[str]:
    """A row's cells."""

    def cell(key: str, form: str) -> str:
        return NONE if row[key] is None else format(row[key], form)

    return [
        name,
        *(f"{1e3 * row[f'{clock} ms']:.1f}" for clock in ("cold", "warm", "host")),
        cell("bytes per parameter", "g"),
        cell("GB/s", ".0f"),
        cell("of copy", ".0%"),
        cell("launches", "d"),
        cell("ratio", ".2f"),
    ]


def gpu_step_table(result: Result, rows: Sequence[Row]) -> str:
    """Times, bandwidth, share of the copy's, launches and ratio."""
    found = result["rows"]
    timed = [row for row in rows if row.name in found]
    return grouped(GPU_HEADER, timed, lambda name: gpu_line(name, found[name]))


def gpu_heading(result: Result) -> str:
    """What stands above a problem's table."""
    rounds = sorted({row["rounds"] for row in result["rows"].values()})
    made = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    ends = [f"{1e3 * end(result['baseline cold ms']):.1f}" for end in (min, max)]
    return (
        f"{result['model']}, {result['parameters'] / 1e6:.1f}M parameters in {result['tensors']} "
        f"tensors, {result['dtype']}; {made} rounds; a copy on the device "
        f"moves {result['copy GB/s']:.0f} GB/s, an empty kernel takes "
        f"{1e3 * result['empty ms']:.1f} us; {BASELINE}, by itself and beside each row: "
        f"{' to '.join(ends)} us"
    )


def gpu_tables(description: Result, results: Sequence[Result], rows: Sequence[Row]) -> str:
    """Everything that is printed."""
    parts = [
        facts_line(description),
        f"Medians of one process, each row interleaved with {BASELINE} with momentum and weight "
        "decay, which its ratio is to; both from the cold time, GB/s without that of an empty "
        "kernel; launches are kernels, also those of a graph; host time on an idle device",
    ]
    for result in results:
        if result["rows"]:
            parts += [gpu_heading(result), gpu_step_table(result, rows)]
        else:
            parts.append(f"{result['model']}: not measured")
        parts += left_out(result["skipped"], result["wrong"])
    return "\n\n".join(parts)
