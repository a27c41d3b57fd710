"""Collective operations carried out message by message, to check the formulas of collectives.py.

Ranks have arrays, and programs of what to send to whom and what to receive from whom. Time passes
by events: a message leaves when its rank has come to it, keeps the rank and its link for bytes /
bandwidth, and arrives a latency later; what arrives is added to the array or stored in it. So the
sums are real, and nothing here knows a formula.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from studies.scaling.collectives import Levels, Link, doublings

Array = NDArray[np.float64]
Part = tuple[int, int]  # the elements [begin, end)
Kind = str  # of a link
LinkOf = Callable[[int, int], tuple[Kind, Link]]


@dataclass(frozen=True)
class Step:
    """What a rank does at once: it is done when its message has left and the other has come."""

    to: int | None = None
    sends: Part = (0, 0)
    source: int | None = None
    receives: Part = (0, 0)
    adds: bool = False


Program = list[Step]


@dataclass
class Outcome:
    """When each rank was done, in seconds, and the bytes that it sent over links of each kind."""

    ends: list[float]
    sent: list[dict[Kind, int]]

    @property
    def seconds(self) -> float:
        return max(self.ends)


def simulate(programs: Sequence[Program], arrays: Sequence[Array], link_of: LinkOf) -> Outcome:
    """Runs a program on each rank, changing its array.

    Args:
        link_of: the kind of the link between two ranks, and the link.

    Raises:
        RuntimeError: if ranks wait for messages that nobody sends.
    """
    ranks = range(len(programs))
    events: list[tuple[float, int, int, int, Array]] = []  # time, number, rank, source, data
    number = count()
    mail: dict[tuple[int, int], deque[tuple[float, Array]]] = defaultdict(deque)
    outcome = Outcome([0.0 for _ in ranks], [defaultdict(int) for _ in ranks])
    at = [0 for _ in ranks]  # the step that each rank is in
    left: list[float | None] = [None for _ in ranks]  # when that step's message has left

    def start(rank: int, now: float) -> None:
        """Sends the message of the rank's present step."""
        step = programs[rank][at[rank]]
        left[rank] = now
        if step.to is not None:
            kind, link = link_of(rank, step.to)
            data = arrays[rank][slice(*step.sends)].copy()
            gone = left[rank] = now + data.nbytes / link.bandwidth
            outcome.sent[rank][kind] += data.nbytes
            heappush(events, (gone + link.latency, next(number), step.to, rank, data))

    def proceed(rank: int) -> None:
        """Ends as many steps of the rank as have all they need."""
        while at[rank] < len(programs[rank]):
            step = programs[rank][at[rank]]
            now = left[rank]
            assert now is not None
            if step.source is not None:
                if not mail[rank, step.source]:
                    return
                came, data = mail[rank, step.source].popleft()
                part = arrays[rank][slice(*step.receives)]
                part[...] = part + data if step.adds else data
                now = max(now, came)
            at[rank] += 1
            outcome.ends[rank] = now
            if at[rank] < len(programs[rank]):
                start(rank, now)

    for rank in ranks:
        if programs[rank]:
            start(rank, 0.0)
    for rank in ranks:
        proceed(rank)
    while events:
        now, _, rank, source, message = heappop(events)
        mail[rank, source].append((now, message))
        proceed(rank)
    stuck = [rank for rank in ranks if at[rank] < len(programs[rank])]
    if stuck:
        raise RuntimeError(f"ranks {stuck} wait for messages that nobody sends")
    return outcome


def chunks(part: Part, pieces: int, row: int = 1) -> list[Part]:
    """Cuts a part into chunks of whole rows, as equal as can be, larger ones first."""
    size, larger = divmod((part[1] - part[0]) // row, pieces)
    ends = [part[0] + row * (size * i + min(i, larger)) for i in range(pieces + 1)]
    return list(pairwise(ends))


def ring_reduce_scatter(members: Sequence[int], part: Part, row: int = 1) -> dict[int, Program]:
    """Each member ends with the sum of its own chunk; chunk i is the i-th member's."""
    size, cut = len(members), chunks(part, len(members), row)
    return {
        rank: [
            Step(
                members[(i + 1) % size],
                cut[(i - s - 1) % size],
                members[(i - 1) % size],
                cut[(i - s - 2) % size],
                adds=True,
            )
            for s in range(size - 1)
        ]
        for i, rank in enumerate(members)
    }


def ring_all_gather(members: Sequence[int], part: Part, row: int = 1) -> dict[int, Program]:
    """Each member begins with its own chunk and ends with all of them."""
    size, cut = len(members), chunks(part, len(members), row)
    return {
        rank: [
            Step(
                members[(i + 1) % size],
                cut[(i - s) % size],
                members[(i - 1) % size],
                cut[(i - s - 1) % size],
            )
            for s in range(size - 1)
        ]
        for i, rank in enumerate(members)
    }


def halving_and_doubling(members: Sequence[int], part: Part) -> dict[int, Program]:
    """An all-reduce of a power of two of members: halves are exchanged and added, then gathered."""
    programs: dict[int, Program] = {}
    for i, rank in enumerate(members):
        own, down, up = part, [], []
        for bit in reversed([1 << b for b in range(doublings(len(members)))]):
            other = members[i ^ bit]
            low, high = chunks(own, 2)
            keep, give = (high, low) if i & bit else (low, high)
            down.append(Step(other, give, other, keep, adds=True))
            up.append(Step(other, keep, other, give))
            own = keep
        programs[rank] = [*down, *reversed(up)]
    return programs


def tree_all_reduce(members: Sequence[int], part: Part) -> dict[int, Program]:
    """Binomial trees: everything is added up at the first member and handed down again."""
    programs: dict[int, Program] = {}
    for i, rank in enumerate(members):
        program: Program = []
        for bit in (1 << b for b in range(doublings(len(members)))):
            if i & bit:
                program.append(Step(to=members[i - bit], sends=part))
                break
            if i + bit < len(members):
                program.append(Step(source=members[i + bit], receives=part, adds=True))
        down = [
            Step(source=step.to, receives=part)
            if step.to is not None
            else Step(to=step.source, sends=part)
            for step in reversed(program)
        ]
        programs[rank] = program + down
    return programs


def ring_all_reduce(members: Sequence[int], part: Part, row: int = 1) -> dict[int, Program]:
    """A reduce-scatter and an all-gather."""
    first, then = ring_reduce_scatter(members, part, row), ring_all_gather(members, part, row)
    return {rank: first[rank] + then[rank] for rank in members}


def all_reduce_by_levels(ranks: int, a_node: int, part: Part) -> dict[int, Program]:
    """Reduce-scatter within nodes, all-reduce between them, all-gather within; rings all."""
    nodes = [range(first, first + a_node) for first in range(0, ranks, a_node)]
    programs: dict[int, Program] = {rank: [] for rank in range(ranks)}

    def then(more: dict[int, Program]) -> None:
        for rank, program in more.items():
            programs[rank] += program

    for node in nodes:
        then(ring_reduce_scatter(node, part))
    for place, own in enumerate(chunks(part, a_node)):
        then(ring_all_reduce([node[place] for node in nodes], own))
    for node in nodes:
        then(ring_all_gather(node, part))
    return programs


def uniform(link: Link) -> LinkOf:
    """The same link everywhere."""
    return lambda source, to: ("link", link)


def but_one(link: Link, *, slow: Link, rank: int) -> LinkOf:
    """The same link everywhere, but for the way out of one rank."""
    return lambda source, to: ("link", slow if source == rank else link)


def two_levels(levels: Levels) -> LinkOf:
    """One kind of link within a node, another between nodes."""

    def link_of(source: int, to: int) -> tuple[Kind, Link]:
        same = source // levels.a_node == to // levels.a_node
        return ("inner", levels.inner) if same else ("outer", levels.outer)

    return link_of


def summed(programs: Mapping[int, Program], elements: int, link_of: LinkOf) -> Outcome:
    """Runs an all-reduce of numbers that differ by rank and place.

    Raises:
        ArithmeticError: if a rank does not end with the sum, exactly (integers add exactly).
    """
    ranks = len(programs)
    arrays = [np.arange(elements, dtype=np.float64) + 1000.0 * rank for rank in range(ranks)]
    expected = np.sum(arrays, axis=0)
    outcome = simulate([programs[rank] for rank in range(ranks)], arrays, link_of)
    for rank, array in enumerate(arrays):
        if not np.array_equal(array, expected):
            raise ArithmeticError(f"rank {rank} has a wrong sum")
    return outcome
