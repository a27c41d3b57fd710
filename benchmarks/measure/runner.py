"""The rows on one problem: each proves itself, and is timed interleaved with the baseline.

On the CPU all of them are in one process, side by side. A GPU has no room for that: a row is
built, timed beside the baseline, and freed, and a ratio is to the baseline in the same rounds. What
is known is handed on after every row, since a row may hang, or leave the device in a state in which
no other can run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.bandwidth import empty_ms, of_device
from benchmarks.measure.clock import Cuda
from benchmarks.measure.process import tick
from benchmarks.measure.proof import Skipped, all_proven, each, proven
from benchmarks.measure.timing import on_device, on_host
from benchmarks.rows import ceiling, shapes
from benchmarks.rows.problem import Problem, small_tensors, with_gradients
from benchmarks.rows.provider import Provider, Row
from benchmarks.rows.providers import BASELINE, HOST_GROUP_ROWS, HOST_ROWS, named

HOST_STEPS = 50  # of 20 to 600 us, so that a sample is long against the clock's own time
HOST_ROUNDS = 30
HOST_GROUPS = 31
HOST_TICKS = 2  # one for each of the two host measurements
LIMIT = 1.0  # seconds of timing for a row
USABLE = 0.9  # of the free memory; the rest goes to the allocator's gaps
TEMPORARY_COPIES = 3  # of the parameters, by passes that do not work in place


@dataclass(frozen=True)
class Settings:
    """What a process measures. ``rows`` are names, in the table's order."""

    model: str
    dtype: str
    threads: int
    rounds: int
    seed: int
    rows: tuple[str, ...]
    library: str | None
    host: bool


def host_times(rows: tuple[str, ...], groups: int, settings: Settings) -> dict[str, Any]:
    """Host time of a step, on tensors of eight elements."""
    installed = [row for row in named(rows) if row.available()]
    providers = all_proven(installed, small_tensors(groups=groups))
    times = on_host(providers, HOST_ROUNDS, HOST_STEPS, settings.seed)
    tick()
    return times


def side_by_side(settings: Settings) -> dict[str, Any]:
    """Times all rows on the CPU in this process, which should be a fresh one.

    Raises:
        WrongError: for a row that is wrong.
    """
    torch.set_num_threads(settings.threads)
    if settings.library is not None:
        ceiling.use(Path(settings.library))
    result: dict[str, Any] = {}
    if settings.host:
        result["host"] = host_times(HOST_ROWS, 1, settings)
        result["host, groups"] = host_times(HOST_GROUP_ROWS, HOST_GROUPS, settings)
    whole = with_gradients(shapes.network(settings.model, getattr(torch, settings.dtype)))
    providers = all_proven(named(settings.rows), whole)
    result["step"] = on_host(providers, settings.rounds, 1, settings.seed, tick)
    result["facts"] = {
        p.name: {
            "bytes per parameter": p.bytes_per_element(),
            "state bytes per parameter": p.state_bytes() / whole.numel,
            "moved": p.moved(),
            "period": p.period,
        }
        for p in providers
    }
    result["parameters"] = whole.numel
    return result


def copies(row: Row, dtype: torch.dtype) -> int:
    """Copies of the parameters that a row keeps at most: weights, momentum, an average, which ours
    keeps in float32; and what two captured graphs hold for their temporaries."""
    average = 2 if dtype.itemsize == 2 else 1
    return 2 + average + (2 if row.captured else 0)


def fits(rows: Sequence[Row], dtype: torch.dtype, numel: int, free: int) -> bool:
    """Whether rows fit into free bytes together."""
    needed = TEMPORARY_COPIES + sum(copies(row, dtype) for row in rows)
    return needed * numel * dtype.itemsize <= USABLE * free


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


def one_by_one(
    device: Cuda,
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
    result["copy GB/s"] = copy = of_device(device)
    result["empty ms"] = empty = empty_ms(device)
    problem = shapes.problem(layout, dtype, device.device)
    base = proven(baseline, problem)
    alone = on_device(device, [base], rounds, 0, limit)[BASELINE]
    found[BASELINE] = figures(alone, base, numel, copy, empty, alone["cold ms"])
    result["baseline cold ms"].append(alone["cold ms"])
    others = [row for row in others if row.name not in skipped.reasons]
    for seed, row in enumerate(sorted(others, key=lambda row: row.kind != "ours"), 1):
        device.release()
        for provider in each([row], partial(proven, problem=problem), skipped):
            times = on_device(device, [base, provider], rounds, seed, limit)
            baseline_ms = times[BASELINE]["cold ms"]
            result["baseline cold ms"].append(baseline_ms)
            found[row.name] = figures(times[row.name], provider, numel, copy, empty, baseline_ms)
            del provider
        device.synchronize()  # raises after an error that nothing on this device survives
        done(result)
    result["rows"] = {row.name: found[row.name] for row in rows if row.name in found}
    return result


def count_launches(
    device: Cuda,
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


def launches(device: Cuda, problem: Problem, row: Row) -> int | None:
    """Kernels of a row's step."""
    provider = row.build(problem, row.name)
    for _ in range(provider.eager_steps + 2):  # captured for both sets of gradients
        provider.prepare()
        provider.step()
    provider.prepare()
    return device.launches(provider.step)
