"""python -m studies.scaling --measure: what its processes do, and what is predicted of them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from ranks import RankError, ranks

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")

from rbwa_fused.distributed import Elastic
from studies.scaling import collectives as on_paper
from studies.scaling import predicted, processes
from studies.scaling.collectives import Link


def made_up(world: int, link: Link) -> dict[str, list[float]]:
    """Figures of processes that keep every formula."""
    base = {"whole": [0.02], "alone": [0.01]}
    base |= {
        f"{processes.ALL_REDUCE}{size}": [on_paper.ring_all_reduce(world, size, link)]
        for size in processes.SIZES
    }
    told = predicted.predicted(base, world, link)
    return {name: base.get(name, [seconds or 0.0]) for name, seconds in told.items()}


@pytest.mark.parametrize("world", [2, 4])
def test_a_machine_that_keeps_the_formulas_is_predicted(world: int) -> None:
    link = Link(1.5e9, 3e-4)
    figures = made_up(world, link)
    found = predicted.fitted(figures, world)
    assert (found.bandwidth, found.latency) == pytest.approx((1.5e9, 3e-4))
    table = predicted.compared(world, figures)
    ratios = [line.split("|")[-2].strip() for line in table.splitlines()[2:]]
    assert set(ratios) == {"-", "1.00"} and ratios.count("-") == 4
    agreement = predicted.agreement({str(world): figures})
    assert set(re.findall(r"\d\.\d+", agreement)) == {"1.00"}
    figures["every 4"] = [2 * figures["every 4"][0]]
    assert "2.00" in predicted.compared(world, figures)
    assert "1.00 to 2.00" in predicted.agreement({str(world): figures})
    figures[f"{processes.ALL_REDUCE}{2**24}"] = [0.0]
    with pytest.raises(ValueError, match="bytes took"):
        predicted.fitted(figures, world)


def measure_little() -> dict[str, list[float]]:
    """On a rank: every item once, on the smallest sizes."""
    m = processes
    kept = m.REPEATS, m.SIZES
    m.REPEATS, m.SIZES = 1, (2**12, 2**16, 2**24)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        return {
            **m.timed(m.all_reduces(), 1),
            **m.timed(m.steps(rank, world), 1),
            **m.timed(m.trainings(), 1),
        }
    finally:
        m.REPEATS, m.SIZES = kept


def test_two_processes_measure_what_is_predicted() -> None:
    first, second = ranks(2).run(measure_little)
    assert first == second  # the slowest rank's time, on both
    told = predicted.predicted(first, 2, predicted.fitted(first, 2))
    assert set(first) <= set(told)
    unmeasured = set(told) - set(first)
    assert unmeasured and all(name.startswith(processes.ALL_REDUCE) for name in unmeasured)
    assert all(len(own) == 1 and own[0] > 0 for own in first.values())


def pull_half_way() -> None:
    """On a rank: the check of a pull that does not reach the mean."""
    kept = processes.replica
    processes.replica = lambda network, every: Elastic(network, alpha=0.5, every=every)
    try:
        processes.check_mean(processes.perceptron())
    finally:
        processes.replica = kept


def test_a_pull_that_is_none_is_not_timed() -> None:
    with pytest.raises(RankError, match="not the mean"):
        ranks(2).run(pull_half_way)


def first_writes(rank: int, world: int, file: Path) -> None:
    """What a group's first rank does with its figures."""
    if rank == 0:
        file.write_text(json.dumps({"ranks": [world]}))


def test_the_figures_are_those_of_the_first_process() -> None:
    assert processes.run(2, first_writes) == {"ranks": [2]}


def fails_on_one(rank: int, world: int, file: Path) -> None:
    """What one rank of a group does that another has left."""
    if rank == 1:
        raise SystemExit(3)
    time.sleep(600)


def test_a_process_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="one of 2 processes failed"):
        processes.run(2, fails_on_one)
    assert time.monotonic() - start < 300
