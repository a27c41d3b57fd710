"""One fresh process of a benchmark: builds every provider, checks it, times it.

It is started with its settings as JSON, prints a line after every round, and its result, as JSON
again, in the last line. `in_fresh_process` is the other end of this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch

from benchmarks.measure.check import check
from benchmarks.measure.timing import interleaved
from benchmarks.rows import ceiling
from benchmarks.rows.problem import Problem, small_tensors, with_gradients
from benchmarks.rows.provider import Provider
from benchmarks.rows.providers import HOST_GROUP_ROWS, HOST_ROWS, Row, named
from benchmarks.rows.shapes import network

ROOT = Path(__file__).resolve().parents[2]
TICK = "."  # the line after a round
HOST_STEPS = 50  # of 20 to 600 us, so that a sample is long against the clock's own time
HOST_ROUNDS = 30
HOST_GROUPS = 31
HOST_TICKS = 2  # one for each of the two host measurements


Found = TypeVar("Found")


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

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def prepared(rows: list[Row], problem: Problem) -> list[Provider]:
    """Builds the providers and lets each prove itself.

    Raises:
        ArithmeticError: for a provider that is wrong.
    """
    providers = [row.build(problem, row.name) for row in rows]
    for provider in providers:
        wrong = check(provider, problem)
        if wrong is not None:
            raise ArithmeticError(wrong)
    return providers


def tick() -> None:
    print(TICK, flush=True)


def host_times(rows: tuple[str, ...], groups: int, settings: Settings) -> dict[str, Any]:
    """Host time of a step, on tensors of eight elements."""
    providers = prepared(named(rows), small_tensors(groups=groups))
    times = interleaved(providers, HOST_ROUNDS, HOST_STEPS, settings.seed, lambda: None)
    tick()
    return times


def run(settings: Settings) -> dict[str, Any]:
    """Measures what the settings ask for."""
    torch.set_num_threads(settings.threads)
    if settings.library is not None:
        ceiling.use(Path(settings.library))
    result: dict[str, Any] = {}
    if settings.host:
        result["host"] = host_times(HOST_ROWS, 1, settings)
        result["host, groups"] = host_times(HOST_GROUP_ROWS, HOST_GROUPS, settings)
    whole = with_gradients(network(settings.model, getattr(torch, settings.dtype)))
    providers = prepared(named(settings.rows), whole)
    result["step"] = interleaved(providers, settings.rounds, 1, settings.seed, tick)
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


def fresh(function: Callable[..., Found], *arguments: object) -> Found:
    """A function's result, from a Python of its own.

    Raises:
        RuntimeError: also for a process that was killed. What else the function raises.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_fresh_process(settings: Settings, after_round: Callable[[], object]) -> dict[str, Any]:
    """`run` in a Python of its own.

    Raises:
        RuntimeError: with the last line that the process wrote, if it failed.
    """
    command = [sys.executable, "-m", "benchmarks.measure.process", settings.to_json()]
    last = ""
    with TemporaryFile("w+") as stderr:
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip()
                if last == TICK:
                    after_round()
        stderr.seek(0)
        errors = stderr.read().strip().splitlines()
    if process.returncode != 0:
        raise RuntimeError(errors[-1] if errors else f"a process ended with {process.returncode}")
    result: dict[str, Any] = json.loads(last)
    return result


if __name__ == "__main__":
    print(json.dumps(run(Settings(**json.loads(sys.argv[1])))))
