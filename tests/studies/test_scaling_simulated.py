"""The formulas of collectives.py, and the simulation that knows none of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")

from studies.scaling import collectives as on_paper
from studies.scaling import ring, simulated
from studies.scaling.collectives import Levels, Link
from studies.scaling.tables import H200

LINK = Link(bandwidth=1e9, latency=1e-5)
LEVELS = Levels(4, Link(4e9, 1e-6), LINK)


@pytest.mark.parametrize("case", simulated.exact_cases(), ids=lambda case: case.name)
def test_a_simulation_takes_as_long_as_an_exact_formula_says(case: simulated.Case) -> None:
    assert case.exact
    assert case.simulated.seconds == pytest.approx(case.formula, rel=1e-12)


@pytest.mark.parametrize("case", simulated.bounded_cases(), ids=lambda case: case.name)
def test_a_simulation_keeps_the_bounds_of_an_approximation_and_differs_from_it(
    case: simulated.Case,
) -> None:
    assert case.least * (1 - 1e-12) <= case.simulated.seconds <= case.most * (1 + 1e-12)
    assert case.least <= case.formula <= case.most
    assert case.simulated.seconds != pytest.approx(case.formula, rel=1e-7)


@pytest.mark.parametrize("members", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("numbers", [1, 7, 240])
def test_every_rank_ends_with_the_sum(members: int, numbers: int) -> None:
    for operation in (ring.ring_all_reduce, ring.tree_all_reduce):
        ring.summed(operation(range(members), (0, numbers)), numbers, ring.uniform(LINK))


def test_a_wrong_sum_is_noticed() -> None:
    programs = ring.ring_all_reduce(range(4), (0, 8))
    programs[2][1] = replace(programs[2][1], adds=False)
    with pytest.raises(ArithmeticError, match="wrong sum"):
        ring.summed(programs, 8, ring.uniform(LINK))


def test_ranks_that_wait_for_nobody_are_noticed() -> None:
    programs = ring.ring_all_reduce(range(4), (0, 8))
    programs[1].pop()
    with pytest.raises(RuntimeError, match="nobody sends"):
        ring.summed(programs, 8, ring.uniform(LINK))


@pytest.mark.parametrize("latency", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("members", [2, 4, 8])
def test_ring_and_halving_agree_in_bytes_and_time(members: int, latency: float) -> None:
    link, numbers = Link(1e9, latency), 64 * members
    exact = {
        ring.ring_all_reduce: on_paper.ring,
        ring.halving_and_doubling: on_paper.halving,
    }
    for operation, formula in exact.items():
        found = ring.summed(operation(range(members), (0, numbers)), numbers, ring.uniform(link))
        assert found.seconds == pytest.approx(2 * formula(members, 8 * numbers, link), rel=1e-12)
        assert [own["link"] for own in found.sent] == [
            2 * on_paper.sent(members, 8 * numbers)
        ] * members


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_levels_agree_in_bytes_and_time(nodes: int) -> None:
    n, numbers = 4 * nodes, 4 * nodes * 30
    programs = ring.all_reduce_by_levels(n, 4, (0, numbers))
    found = ring.summed(programs, numbers, ring.two_levels(LEVELS))
    seconds = 2 * on_paper.gather_by_levels(n, 8 * numbers, LEVELS, rings=True)
    assert found.seconds == pytest.approx(seconds, rel=1e-12)
    between = 2 * on_paper.sent_between_nodes(n, 8 * numbers, LEVELS)
    assert [own["outer"] for own in found.sent] == [between] * n
    assert [own["inner"] for own in found.sent] == [2 * on_paper.sent(4, 8 * numbers)] * n


def test_messages_of_one_rank_share_its_link() -> None:
    both = [ring.Step(to=1, sends=(0, 10)), ring.Step(to=2, sends=(0, 10))]
    programs = [both, *([ring.Step(source=0, receives=(0, 10))] for _ in range(2))]
    arrays = [np.full(10, float(rank)) for rank in range(3)]
    found = ring.simulate(programs, arrays, ring.uniform(LINK))
    assert found.ends == pytest.approx([160e-9, 80e-9 + 1e-5, 160e-9 + 1e-5])
    assert all((array == 0.0).all() for array in arrays)


def test_a_step_is_done_when_its_message_has_left_and_the_other_has_come() -> None:
    large, small = (0, 1000), (0, 1)  # 8 us and 8 ns
    first = [ring.Step(1, large, 1, small), ring.Step(to=1, sends=small)]
    other = [ring.Step(0, small, 0, large), ring.Step(source=0, receives=small)]
    link = Link(1e9, 1e-6)
    found = ring.simulate([first, other], [np.zeros(1000), np.ones(1000)], ring.uniform(link))
    assert found.ends == pytest.approx([8e-6 + 8e-9, 8e-6 + 8e-9 + 1e-6])


# ---- the formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks_", [2, 8, 64, 512, 4096])
@pytest.mark.parametrize("size", [1.0, 1e6, 16e9])
def test_no_collective_beats_its_bytes_or_one_latency(ranks_: int, size: float) -> None:
    levels = H200.levels
    inside, nodes = levels.split(ranks_)
    out = on_paper.sent_between_nodes(ranks_, size, levels) / levels.outer.bandwidth
    within = on_paper.sent(inside, size) / levels.inner.bandwidth
    least = max(out, within, levels.outer.latency if nodes > 1 else levels.inner.latency)
    found = on_paper.gather_anywhere(ranks_, size, levels)
    ways = on_paper.gather_by_levels, on_paper.gather_through_all
    assert found == min(way(ranks_, size, levels) for way in ways) >= least
    assert on_paper.gather_anywhere(ranks_, size, levels, pieces=10) >= found


def test_ranks_that_a_formula_is_not_for_are_refused() -> None:
    with pytest.raises(ValueError, match="no power of two"):
        on_paper.halving(6, 1e6, LINK)
    with pytest.raises(ValueError, match="do not fill nodes"):
        LEVELS.split(6)
    assert on_paper.gather(6, 1e6, LINK) == on_paper.ring(6, 1e6, LINK)
