"""One problem on a GPU: every row proves itself, is timed, and is freed.

Rows are taken in groups that fit into the device's memory together, the baseline in each of them,
and a ratio is to the baseline of its own group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks import shapes
from benchmarks.device import Device
from benchmarks.gpu_timing import copy_bandwidth, interleaved
from benchmarks.problem import Problem
from benchmarks.provider import Provider, check
from benchmarks.providers import BASELINE, Row

LIMIT = 8.0  # seconds of timing for a group of rows
USABLE = 0.9  # of the free memory; the rest goes to the allocator's gaps
TEMPORARY_COPIES = 3  # of the parameters, by passes that do not work in place

Proven = TypeVar("Proven")


CANNOT = (RuntimeError, ImportError, ValueError)  # of a row that cannot be built or captured


class WrongError(Exception):
    """A row does not compute what it says."""


@dataclass
class Skipped:
    """Rows that are not timed, and why; `wrong` are those of ours that did not prove themselves."""

    reasons: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def copies(row: Row, dtype: torch.dtype) -> int:
    """Copies of the parameters that a row keeps at most: weights, momentum, an average, which ours
    keeps in float32; and what two captured graphs hold for their temporaries."""
    average = 2 if dtype.itemsize == 2 else 1
    return 2 + average + (2 if row.captured else 0)


def in_groups(
    rows: Sequence[Row], dtype: torch.dtype, numel: int, free: int
) -> tuple[list[list[Row]], list[Row]]:
    """The rows but the baseline in groups that fit beside it into free bytes, and those that
    fit into none."""
    capacity = math.floor(USABLE * free / (numel * dtype.itemsize)) - TEMPORARY_COPIES
    baseline, *others = rows
    alone = copies(baseline, dtype)
    groups: list[list[Row]] = [[]] if not others and alone <= capacity else []
    too_large = []
    used = capacity
    for row in others:
        size = copies(row, dtype)
        if alone + size > capacity:
            too_large.append(row)
            continue
        if used + size > capacity:
            groups.append([])
            used = alone
        groups[-1].append(row)
        used += size
    return groups, too_large


def reason(error: BaseException) -> str:
    """The first line of what went wrong first: ending a capture that failed fails once more."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def proven(row: Row, problem: Problem) -> Provider:
    """A row's provider, after its first steps were right.

    Raises:
        WrongError: if they were not.
        RuntimeError, ImportError, ValueError: if it cannot be built or captured.
    """
    provider = row.build(problem, row.name)
    wrong = check(provider, problem)
    if wrong is not None:
        raise WrongError(wrong)
    return provider


def prepared(rows: Sequence[Row], problem: Problem, skipped: Skipped) -> list[Provider]:
    """The providers of those rows that can be timed."""
    return each(rows, lambda row: proven(row, problem), skipped)


def each(rows: Sequence[Row], prove: Callable[[Row], Proven], skipped: Skipped) -> list[Proven]:
    """What `prove` makes of those rows that can be timed."""
    kept = []
    for row in rows:
        try:
            kept.append(prove(row))
        except (WrongError, *CANNOT) as error:
            if row.name == BASELINE:
                raise
            skipped.reasons[row.name] = reason(error)
            if isinstance(error, WrongError) and row.kind == "ours":
                skipped.wrong.append(row.name)
    return kept


def figures(
    times: dict[str, Any], provider: Provider, numel: int, copy: float, baseline_ms: float
) -> dict[str, Any]:
    """What a row's JSON says: its times, and what follows from them."""
    moved = provider.bytes_per_element()
    bandwidth = None if moved is None else moved * numel / times["cold ms"] / 1e6
    return {
        **times,
        "ratio": times["cold ms"] / baseline_ms,
        "bytes per parameter": moved,
        "state bytes per parameter": provider.state_bytes() / numel,
        "GB/s": bandwidth,
        "of copy": None if bandwidth is None else bandwidth / copy,
        "launches": None,
    }


def measure(
    device: Device,
    layout: shapes.Layout,
    dtype: torch.dtype,
    rows: Sequence[Row],
    rounds: int,
    done: Callable[[int], object] = lambda count: None,
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Times the rows on one problem, all but their launches. `rows` begin with the baseline."""
    numel, skipped = layout.numel, Skipped()
    result: dict[str, Any] = {
        "parameters": numel,
        "tensors": len(layout.parameters),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": {},
        "baseline cold ms": [],
        "skipped": skipped.reasons,
        "wrong": skipped.wrong,
    }
    for row in rows:
        if not row.available():
            skipped.reasons[row.name] = f"{row.needs} is not installed"
    present = [row for row in rows if row.available()]
    own = 3 * numel * dtype.itemsize  # weights and two sets of gradients
    groups, too_large = in_groups(present, dtype, numel, device.free_bytes() - own)
    for row in too_large:
        skipped.reasons[row.name] = f"does not fit into {device.free_bytes() / 1e9:.0f} GB"
    if not groups:
        return result
    result["copy GB/s"] = copy = copy_bandwidth(device)
    problem = shapes.problem(layout, dtype, device.device)
    found: dict[str, Any] = {}
    for seed, group in enumerate(groups):
        device.release()
        providers = prepared([present[0], *group], problem, skipped)
        times = interleaved(device, providers, rounds, seed, limit)
        baseline_ms = times[BASELINE]["cold ms"]
        result["baseline cold ms"].append(baseline_ms)
        for provider in providers:
            row_figures = figures(times[provider.name], provider, numel, copy, baseline_ms)
            found.setdefault(provider.name, {**row_figures, "group": seed})
        del providers, provider
        done(len(group))
    result["rows"] = {row.name: found[row.name] for row in present if row.name in found}
    return result


def count_launches(
    device: Device, layout: shapes.Layout, rows: Sequence[Row], result: dict[str, Any]
) -> None:
    """Puts the launches of a step into a result's rows, one row in memory at a time."""
    problem = shapes.problem(layout, getattr(torch, result["dtype"]), device.device)
    for row in rows:
        if row.name in result["rows"]:
            device.release()
            provider = row.build(problem, row.name)
            for _ in range(provider.eager_steps + 2):  # captured for both sets of gradients
                provider.prepare()
                provider.step()
            provider.prepare()
            result["rows"][row.name]["launches"] = device.launches(provider.step)
            del provider
