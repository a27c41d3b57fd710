"""The rows of `benchmarks.step` under pytest-benchmark, to compare two commits on one machine:

    pytest benchmarks --benchmark-save=before        # then change something
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

Nothing is asserted about time. `RBWA_BENCHMARK_MODEL` names another model of torchvision.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")

from benchmarks.measure import machine
from benchmarks.measure.check import check
from benchmarks.rows import ceiling
from benchmarks.rows.problem import Problem, small_tensors, torchvision_model, with_gradients
from benchmarks.rows.provider import Row
from benchmarks.rows.providers import HOST_GROUP_ROWS, HOST_ROWS, ROWS, named

MODEL = os.environ.get("RBWA_BENCHMARK_MODEL", "resnet18")
ROUNDS, WARMUP = 30, 3
HOST_STEPS = 50  # of some 20 us, in a round


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    yield
    torch.set_num_threads(threads)


@cache
def whole() -> Problem:
    return with_gradients(torchvision_model(MODEL, torch.float32))


@cache
def host(groups: int) -> Problem:
    return small_tensors(groups=groups)


def run(benchmark: Any, row: Row, problem: Problem, steps: int) -> None:
    """Builds a row, lets it prove itself, and times its steps."""
    if row.slow and benchmark.disabled:
        pytest.skip("slow to build; tests/benchmarks/test_benchmarks.py checks it")
    if not row.available():
        pytest.skip(f"{row.needs} is not installed")
    if row.kind == "ceiling":
        try:
            ceiling.use(ceiling.build(machine.slug()))
        except (RuntimeError, OSError) as error:
            pytest.skip(f"no ceiling here: {error}")
    provider = row.build(problem, row.name)
    wrong = check(provider, problem)
    assert wrong is None, wrong
    rounds = {"rounds": ROUNDS, "warmup_rounds": WARMUP}
    if steps > 1:  # gradients stay as `check` left them
        benchmark.pedantic(provider.step, iterations=steps, **rounds)
        return

    def setup() -> None:  # what it returned would be arguments
        provider.prepare()

    benchmark.pedantic(provider.step, setup=setup, **rounds)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.benchmark(group=f"step, {MODEL}")
def test_step(benchmark: Any, row: Row) -> None:
    run(benchmark, row, whole(), 1)


@pytest.mark.parametrize("row", named(HOST_ROWS), ids=lambda row: row.name)
@pytest.mark.benchmark(group="host time, 62 small tensors")
def test_host_time(benchmark: Any, row: Row) -> None:
    run(benchmark, row, host(1), HOST_STEPS)


@pytest.mark.parametrize("row", named(HOST_GROUP_ROWS), ids=lambda row: row.name)
@pytest.mark.benchmark(group="host time, 31 groups")
def test_host_time_of_many_groups(benchmark: Any, row: Row) -> None:
    run(benchmark, row, host(31), HOST_STEPS)
