"""The formulas of collectives.py beside simulations of the same operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.report.markdown import table
from studies.scaling import collectives as on_paper
from studies.scaling import ring
from studies.scaling.collectives import Levels, Link

LINK = Link(bandwidth=50e9, latency=14e-6)
NVLINK = Link(bandwidth=450e9, latency=3.4e-6)
QUARTER = Link(LINK.bandwidth / 4, LINK.latency)
A_NODE = 4
LEVELS = Levels(A_NODE, NVLINK, LINK)
RANKS = 8
NUMBERS = 1_000_000  # float64
ITEM = 8  # bytes
SIZE = ITEM * NUMBERS

Programs = Mapping[int, ring.Program]


@dataclass(frozen=True)
class Case:
    """An all-reduce by events, and what is known on paper; seconds. Where the formula is exact,
    both bounds are equal to it."""

    name: str
    simulated: ring.Outcome
    formula: float
    least: float
    most: float

    @property
    def exact(self) -> bool:
        return self.least == self.most


def _exact(name: str, programs: Programs, link_of: ring.LinkOf, formula: float) -> Case:
    return Case(name, ring.summed(programs, NUMBERS, link_of), formula, formula, formula)


def exact_cases() -> list[Case]:
    """Formulas that must be met to rounding."""
    even, whole, ranks = ring.uniform(LINK), (0, NUMBERS), range(RANKS)
    return [
        _exact(
            f"ring, {RANKS} ranks",
            ring.ring_all_reduce(ranks, whole),
            even,
            on_paper.ring_all_reduce(RANKS, SIZE, LINK),
        ),
        _exact(
            f"halving and doubling, {RANKS} ranks",
            ring.halving_and_doubling(ranks, whole),
            even,
            2 * on_paper.halving(RANKS, SIZE, LINK),
        ),
        _exact(
            f"tree, {RANKS} ranks",
            ring.tree_all_reduce(ranks, whole),
            even,
            on_paper.tree_all_reduce(RANKS, SIZE, LINK),
        ),
        _exact(
            f"by levels, 4 nodes of {A_NODE}",
            ring.all_reduce_by_levels(4 * A_NODE, A_NODE, whole),
            ring.two_levels(LEVELS),
            2 * on_paper.gather_by_levels(4 * A_NODE, SIZE, LEVELS, rings=True),
        ),
    ]


def through_all() -> Case:
    """One of the rings through 4 nodes: it has its share of the vector and of the links inside the
    nodes, and a link between nodes for itself."""
    ranks = 4 * A_NODE
    share = Levels(A_NODE, Link(NVLINK.bandwidth / A_NODE, NVLINK.latency), LINK)
    found = ring.summed(
        ring.ring_all_reduce(range(ranks), (0, NUMBERS // A_NODE)),
        NUMBERS // A_NODE,
        ring.two_levels(share),
    )
    slowest = min(NVLINK.bandwidth, A_NODE * LINK.bandwidth)
    return Case(
        f"rings through all, 4 nodes of {A_NODE}",
        found,
        2 * on_paper.gather_through_all(ranks, SIZE, LEVELS),
        2 * on_paper.sent(ranks, SIZE) / slowest,
        on_paper.ring_all_reduce(ranks, SIZE, Link(slowest, LINK.latency)),
    )


def bounded_cases() -> list[Case]:
    """Formulas that are approximations, with their bounds."""
    even, ranks = ring.uniform(LINK), range(RANKS)

    def uneven(rows: int, row: int, name: str) -> Case:
        numbers = rows * row
        formula = on_paper.ring_all_reduce(RANKS, ITEM * numbers, LINK)
        largest = ITEM * row * -(-rows // RANKS)
        return Case(
            f"ring, {RANKS} ranks, {name}",
            ring.summed(ring.ring_all_reduce(ranks, (0, numbers), row), numbers, even),
            formula,
            formula,
            on_paper.ring_all_reduce(RANKS, RANKS * largest, LINK),
        )

    formula = on_paper.ring_all_reduce(RANKS, SIZE, LINK)
    one_slow = Case(
        f"ring, {RANKS} ranks, one link a quarter as fast",
        ring.summed(
            ring.ring_all_reduce(ranks, (0, NUMBERS)),
            NUMBERS,
            ring.but_one(LINK, slow=QUARTER, rank=3),
        ),
        formula,
        formula,
        on_paper.ring_all_reduce(RANKS, SIZE, QUARTER),
    )
    odd = Case(
        "tree, 7 ranks",
        ring.summed(ring.tree_all_reduce(range(7), (0, NUMBERS)), NUMBERS, even),
        on_paper.tree_all_reduce(7, SIZE, LINK),
        on_paper.tree_all_reduce(4, SIZE, LINK),
        on_paper.tree_all_reduce(7, SIZE, LINK),
    )
    rows = uneven(RANKS + 1, NUMBERS // RANKS, f"{RANKS + 1} whole rows")
    few = uneven(RANKS - 1, 1, f"{RANKS - 1} numbers")
    return [through_all(), rows, few, one_slow, odd]


def simulations() -> str:
    """The table."""

    def us(seconds: float) -> str:
        return f"{1e6 * seconds:.3f}"

    rows = [
        [
            case.name,
            us(case.formula),
            "exact" if case.exact else f"{us(case.least)} to {us(case.most)}",
            us(case.simulated.seconds),
        ]
        for case in (*exact_cases(), *bounded_cases())
    ]
    return table(["all-reduce, µs", "formula", "bounds", "simulated"], rows)
