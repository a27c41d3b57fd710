r"""What a collective operation costs on paper: bytes sent, and seconds.

A message of b bytes takes :math:`\alpha + b / B` over a link of latency alpha and bandwidth B, and
a rank sends and receives at the same time. With that model N ranks take

.. math::
    (N-1)\left(\alpha + \frac{b}{N B}\right)

for a ring's all-gather of b bytes in all, as long for its reduce-scatter, and twice that for an
all-reduce, which is one after the other. Recursive halving and doubling send the same bytes in
log2 N messages; a binomial tree sends everything each time.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH", 2005 (ring, halving and doubling, trees); Patarasu and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", 2009 (no all-reduce sends less than 2(N-1)/N b).

Sizes are bytes of the whole vector: what every rank has after an all-gather or an all-reduce, and
before a reduce-scatter. `ring.py` carries these operations out, message by message.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """One rank's way out: bytes a second in one direction, and seconds a message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Levels:
    """Nodes of equal size: ``inner`` joins the ranks of a node, ``outer`` those of the same place
    in different nodes, each over a link of its own."""

    a_node: int
    inner: Link
    outer: Link

    def split(self, ranks: int) -> tuple[int, int]:
        """Ranks in a node, and nodes.

        Raises:
            ValueError: if the ranks fill no whole number of nodes.
        """
        inside = min(ranks, self.a_node)
        if ranks % inside:
            raise ValueError(f"{ranks} ranks do not fill nodes of {self.a_node}")
        return inside, ranks // inside


def is_power_of_two(ranks: int) -> bool:
    return ranks & (ranks - 1) == 0


def doublings(ranks: int) -> int:
    """log2, rounded up."""
    return (ranks - 1).bit_length()


def sent(ranks: int, size: float) -> float:
    """Bytes that a rank sends in an all-gather or a reduce-scatter; twice that in an all-reduce."""
    return (ranks - 1) / ranks * size


def ring(ranks: int, size: float, link: Link) -> float:
    """Seconds of a ring's all-gather or reduce-scatter of equal chunks.

    With unequal chunks it takes no less than this, and no more than with all as large as the
    largest; with unequal links no less, and no more than with all as slow as the slowest.
    """
    return (ranks - 1) * link.latency + sent(ranks, size) / link.bandwidth


def ring_all_reduce(ranks: int, size: float, link: Link) -> float:
    """Seconds of a reduce-scatter and an all-gather by a ring."""
    return 2 * ring(ranks, size, link)


def halving(ranks: int, size: float, link: Link) -> float:
    """Seconds of recursive halving (reduce-scatter) or doubling (all-gather).

    Raises:
        ValueError: if the ranks are no power of two, for which others send more.
    """
    if not is_power_of_two(ranks):
        raise ValueError(f"{ranks} ranks are no power of two")
    return doublings(ranks) * link.latency + sent(ranks, size) / link.bandwidth


def tree_all_reduce(ranks: int, size: float, link: Link) -> float:
    """Seconds of a binomial tree's reduction and broadcast: exact for a power of two; other numbers
    take no more than this, and no less than the power of two below them."""
    return 2 * doublings(ranks) * (link.latency + size / link.bandwidth)


def gather(ranks: int, size: float, link: Link) -> float:
    """Seconds of an all-gather or a reduce-scatter by the faster of ring and halving."""
    own = ring(ranks, size, link)
    return min(own, halving(ranks, size, link)) if is_power_of_two(ranks) else own


def all_reduce(ranks: int, size: float, link: Link) -> float:
    """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather(ranks, size, link)


def gather_by_levels(ranks: int, size: float, levels: Levels, *, rings: bool = False) -> float:
    """Seconds of an all-gather or a reduce-scatter within nodes and between them.

    Between nodes every rank gathers its own part of the vector, size / (ranks in a node) bytes,
    from its peers in the other nodes; then each node gathers within itself, by a ring.

    Args:
        rings: with a ring between nodes, too; else with the faster of ring and halving.
    """
    inside, nodes = levels.split(ranks)
    between = ring if rings else gather
    return between(nodes, size / inside, levels.outer) + ring(inside, size, levels.inner)


def gather_through_all(ranks: int, size: float, levels: Levels) -> float:
    """Seconds of an all-gather or a reduce-scatter by rings through all ranks, node after node: one
    ring for each rank of a node, each leaving the node over another rank's link.

    Every part of the vector passes all hops but one, and bytes pass as fast as over the slowest of
    them. An approximation: no less than the bytes alone take, and no more than with every hop as
    slow as the slowest.
    """
    inside, nodes = levels.split(ranks)
    if nodes == 1:
        return ring(ranks, size, levels.inner)
    bandwidth = min(levels.inner.bandwidth, inside * levels.outer.bandwidth)
    hops = nodes * levels.outer.latency + (ranks - nodes) * levels.inner.latency
    return ring(ranks, size, Link(bandwidth, hops / ranks))


def gather_anywhere(ranks: int, size: float, levels: Levels, pieces: int = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter in equal pieces, one after the other, each in
    the faster of these ways, as a library chooses."""
    ways = (gather_by_levels, gather_through_all)
    return pieces * min(way(ranks, size / pieces, levels) for way in ways)


def sent_between_nodes(ranks: int, size: float, levels: Levels) -> float:
    """Bytes that a rank sends out of its node in `gather_by_levels`; an all-reduce sends twice
    that."""
    inside, nodes = levels.split(ranks)
    return sent(nodes, size / inside)
