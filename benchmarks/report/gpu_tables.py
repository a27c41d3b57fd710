"""The tables of benchmarks.step --device cuda."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.markdown import NONE, table
from benchmarks.report.tables import GROUPS
from benchmarks.rows.providers import BASELINE, Row

Result = dict[str, Any]

HEADER = [
    "provider",
    "cold us",
    "warm us",
    "host us",
    "bytes",
    "GB/s",
    "of copy",
    "launches",
    "ratio",
]


def line(name: str, row: Result) -> list[str]:
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


def step_table(result: Result, rows: Sequence[Row]) -> str:
    """Times, bandwidth, share of the copy's, launches and ratio, in groups."""
    lines: list[list[str]] = []
    for kind, title in GROUPS.items():
        members = [row.name for row in rows if row.kind == kind and row.name in result["rows"]]
        if members:
            lines.append([f"**{title}**", *[""] * (len(HEADER) - 1)])
            lines += [line(name, result["rows"][name]) for name in members]
    return table(HEADER, lines)


def heading(result: Result) -> str:
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


def tables(
    description: dict[str, str | int | float], results: Sequence[Result], rows: Sequence[Row]
) -> str:
    """Everything that is printed."""
    parts = [
        ", ".join(f"{name}: {value}" for name, value in description.items()),
        f"Medians of one process, each row interleaved with {BASELINE} with momentum and weight "
        "decay, which its ratio is to; both from the cold time, GB/s without that of an empty "
        "kernel; launches are kernels, also those of a graph; host time on an idle device",
    ]
    for result in results:
        if result["rows"]:
            parts += [heading(result), step_table(result, rows)]
        else:
            parts.append(f"{result['model']}: not measured")
        parts += [f"skipped: {name} ({why})" for name, why in result["skipped"].items()]
        parts += [f"**WRONG: {name}, not timed**" for name in result["wrong"]]
    return "\n\n".join(parts)
