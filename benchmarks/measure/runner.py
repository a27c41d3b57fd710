"""One problem on a GPU: every row proves itself, is timed beside the baseline, and is freed.

A ratio is to the baseline in the same rounds. What is known is handed on after every row, since a
row may hang, or leave the device in a state in which no other can run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.measure.check import check
from benchmarks.measure.clock import Device
from benchmarks.measure.gpu_timing import copy_bandwidth, empty_ms, interleaved
from benchmarks.rows import shapes
from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Provider
from benchmarks.rows.providers import BASELINE, Row

LIMIT = 1.0  # seconds of timing for a row
USABLE = 0.9  # of the free memory; the rest goes to the allocator's gaps
TEMPORARY_COPIES = 3  # of the parameters, by passes that do not work in place

Proven = TypeVar("Proven")


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


def fits(rows: Sequence[Row], dtype: torch.dtype, numel: int, free: int) -> bool:
    """Whether rows fit into free bytes together."""
    needed = TEMPORARY_COPIES + sum(copies(row, dtype) for row in rows)
    return needed * numel * dtype.itemsize <= USABLE * free


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
        Exception: if it cannot be built or captured; of Triton's compiler, which knows no better.
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
        except Exception as error:  # each library has its own; a broken device is seen later
            if row.name == BASELINE:
                raise
            skipped.reasons[row.name] = reason(error)
            if isinstance(error, WrongError) and row.kind == "ours":
                skipped.wrong.append(row.name)
    return kept


def figures(
    times: dict[str, Any],
    provider: Provider,
    numel: int,
    copy: float,
    empty: float,
    baseline_ms: float,
) -> dict[str, Any]:
    """What a row's JSON says: its times, and what follows from them. The bandwidth is that of the
    time beyond an empty kernel's (`empty`, ms), None where there is none."""
    moved, net = provider.bytes_per_element(), times["cold ms"] - empty
    bandwidth = None if moved is None or net <= 0 else moved * numel / net / 1e6
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
    done: Callable[[dict[str, Any]], object] = lambda result: None,
    limit: float = LIMIT,
) -> dict[str, Any]:
    """Times the rows on one problem, all but their launches. `rows` begin with the baseline.

    Ours come first, and `done` gets the result so far after every row but the baseline.

    Raises:
        RuntimeError: if the device does nothing any more after a row.
    """
    numel, skipped = layout.numel, Skipped()
    found: dict[str, Any] = {}
    result: dict[str, Any] = {
        "parameters": numel,
        "tensors": len(layout.parameters),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": found,
        "baseline cold ms": [],
        "skipped": skipped.reasons,
        "wrong": skipped.wrong,
    }
    for row in rows:
        if not row.available():
            skipped.reasons[row.name] = f"{row.needs} is not installed"
    baseline, *others = (row for row in rows if row.available())
    own = 3 * numel * dtype.itemsize  # weights and two sets of gradients
    free = device.free_bytes() - own
    for row in others:
        if not fits([baseline, row], dtype, numel, free):
            skipped.reasons[row.name] = f"does not fit into {device.free_bytes() / 1e9:.0f} GB"
    if not fits([baseline], dtype, numel, free):
        return result
    result["copy GB/s"] = copy = copy_bandwidth(device)
    result["empty ms"] = empty = empty_ms(device)
    problem = shapes.problem(layout, dtype, device.device)
    base = proven(baseline, problem)
    alone = interleaved(device, [base], rounds, 0, limit)[BASELINE]
    found[BASELINE] = figures(alone, base, numel, copy, empty, alone["cold ms"])
    result["baseline cold ms"].append(alone["cold ms"])
    others = [row for row in others if row.name not in skipped.reasons]
    for seed, row in enumerate(sorted(others, key=lambda row: row.kind != "ours"), 1):
        device.release()
        for provider in prepared([row], problem, skipped):
            times = interleaved(device, [base, provider], rounds, seed, limit)
            baseline_ms = times[BASELINE]["cold ms"]
            result["baseline cold ms"].append(baseline_ms)
            found[row.name] = figures(times[row.name], provider, numel, copy, empty, baseline_ms)
            del provider
        device.synchronize()  # raises after an error that nothing on this device survives
        done(result)
    result["rows"] = {row.name: found[row.name] for row in rows if row.name in found}
    return result


def count_launches(
    device: Device,
    layout: shapes.Layout,
    rows: Sequence[Row],
    result: dict[str, Any],
    done: Callable[[], object] = lambda: None,
) -> None:
    """Puts the launches of a step into a result's rows, one row in memory at a time; a row of which
    they cannot be counted has none."""
    problem = shapes.problem(layout, getattr(torch, result["dtype"]), device.device)
    for row in rows:
        if row.name in result["rows"]:
            device.release()
            with suppress(RuntimeError):  # of a profiler that this machine does not let look
                result["rows"][row.name]["launches"] = launches(device, problem, row)
            done()


def launches(device: Device, problem: Problem, row: Row) -> int | None:
    """Kernels of a row's step."""
    provider = row.build(problem, row.name)
    for _ in range(provider.eager_steps + 2):  # captured for both sets of gradients
        provider.prepare()
        provider.step()
    provider.prepare()
    return device.launches(provider.step)
