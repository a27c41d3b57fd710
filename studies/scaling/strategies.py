"""What one training step costs on many GPUs, on paper: bytes, seconds, memory.

`Machine` and `Training` hold every assumption. A strategy says who holds what, and what is sent
when; `Cost` is what comes of it on one GPU. Bytes and seconds throughout, a GB being 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

from studies.scaling.collectives import Levels, Link, all_reduce, gather_anywhere

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes. Bandwidths are the datasheets', in bytes a second and one direction."""

    memory: float
    hbm: float
    flops: float
    nvlink: float
    network: float  # of one GPU
    a_node: int = 8
    hbm_share: float = 0.9  # of the datasheet's bandwidth that a step reaches
    link_share: float = 0.8
    flops_share: float = 0.4
    nvlink_latency: float = 3.4e-6
    network_latency: float = 14e-6
    reserve: float = 16 * GB  # activations, buckets, the allocator's loss

    @property
    def levels(self) -> Levels:
        return Levels(
            self.a_node,
            Link(self.link_share * self.nvlink, self.nvlink_latency),
            Link(self.link_share * self.network, self.network_latency),
        )

    def pass_over(self, moved: float) -> float:
        """Seconds in which so many bytes of its own memory are read and written."""
        return moved / (self.hbm_share * self.hbm)


@dataclass(frozen=True)
class Precision:
    """Bytes of one element of each stream; no master is 0."""

    parameter: int
    gradient: int
    master: int
    state: int
    average: int

    def step(self, buffers: int = 1) -> int:
        """Bytes a parameter that a step reads and writes without an average.

        The gradient is read; the parameter, its master and each state buffer are read and written.
        """
        written = self.parameter + self.master + buffers * self.state
        return self.gradient + 2 * written

    def sampled(self, every: float = 1) -> float:
        """Bytes a parameter that a fused average adds, sampled every so many steps."""
        return 2 * self.average / every

    @property
    def sampled_apart(self) -> int:
        """The same by a pass of its own, which reads the weights once more."""
        return (self.master or self.parameter) + 2 * self.average

    @property
    def copied_back(self) -> int:
        """What a third pass adds that copies the average to the weights (and master)."""
        return self.average + self.parameter + self.master

    def held(self, *, averaged: bool, buffers: int = 1) -> int:
        """Bytes a parameter that stay in memory."""
        kept = self.parameter + self.gradient + self.master + buffers * self.state
        return kept + (self.average if averaged else 0)

    @property
    def swapped(self) -> int:
        """Bytes a parameter that `averaged()` moves on entry and exit together: a copy set aside,
        the average put in its place, and the copy back."""
        return 5 * self.parameter + self.average


FLOAT32 = Precision(parameter=4, gradient=4, master=0, state=4, average=4)
BFLOAT16 = Precision(parameter=2, gradient=2, master=0, state=2, average=4)
MASTERS = Precision(parameter=2, gradient=2, master=4, state=4, average=4)


@dataclass(frozen=True)
class Training:
    """A model and how it is trained."""

    parameters: float
    layers: int  # that FSDP2 gathers one by one
    tokens: int = 8192  # of one GPU and step
    precision: Precision = MASTERS
    averaged: bool = True  # by an average that is sampled every step
    bucket: float = 25 * 2**20  # bytes of DDP's, torch's default
    weight: int = 4  # bytes of a weight when weights are averaged between GPUs

    def compute(self, machine: Machine) -> float:
        """Seconds of forward and backward: 6 operations a parameter and token, a third forward."""
        work = 6 * self.parameters * self.tokens
        return work / (machine.flops_share * machine.flops)


@dataclass(frozen=True)
class Cost:
    """Of one step on one GPU, in seconds; ``held`` in bytes. ``during_*`` are collectives that can
    hide behind that pass, ``after`` those that cannot, and the pull."""

    compute: float
    step: float
    average: float
    during_forward: float
    during_backward: float
    after: float
    held: float

    @property
    def collectives(self) -> float:
        return self.during_forward + self.during_backward + self.after

    @property
    def seconds(self) -> float:
        """With as much overlap as there can be."""
        forward = max(self.compute / 3, self.during_forward)
        backward = max(2 * self.compute / 3, self.during_backward)
        return forward + backward + self.step + self.average + self.after

    @property
    def one_by_one(self) -> float:
        """Without any overlap."""
        return self.compute + self.collectives + self.step + self.average

    def fits(self, machine: Machine) -> bool:
        return self.held + machine.reserve <= machine.memory


def _cost(
    machine: Machine,
    t: Training,
    owned: float,
    held: float,
    *,
    forward: float = 0.0,
    backward: float = 0.0,
    after: float = 0.0,
) -> Cost:
    """``owned``: parameters that this GPU steps and averages."""
    return Cost(
        compute=t.compute(machine),
        step=machine.pass_over(t.precision.step() * owned),
        average=machine.pass_over(t.precision.sampled() * owned) if t.averaged else 0.0,
        during_forward=forward,
        during_backward=backward,
        after=after,
        held=held,
    )


def _buckets(t: Training) -> int:
    return max(1, round(t.precision.gradient * t.parameters / t.bucket))


def ddp(machine: Machine, t: Training, gpus: int) -> Cost:
    """Everything on every GPU; gradients are all-reduced in buckets during the backward pass."""
    size = t.precision.gradient * t.parameters
    seconds = 2 * gather_anywhere(gpus, size, machine.levels, _buckets(t))
    held = t.precision.held(averaged=t.averaged) * t.parameters
    return _cost(machine, t, t.parameters, held, backward=seconds)


def zero1(machine: Machine, t: Training, gpus: int) -> Cost:
    """Weights and gradients on every GPU, each stepping its share: gradients are reduce-scattered
    during the backward pass, the new weights all-gathered after the step."""
    p, levels = t.precision, machine.levels
    reduce = gather_anywhere(gpus, p.gradient * t.parameters, levels, _buckets(t))
    gather = gather_anywhere(gpus, p.parameter * t.parameters, levels)
    whole = p.parameter + p.gradient
    shared = p.held(averaged=t.averaged) - whole
    held = (whole + shared / gpus) * t.parameters
    return _cost(machine, t, t.parameters / gpus, held, backward=reduce, after=gather)


def sharded(machine: Machine, t: Training, gpus: int) -> Cost:
    """FSDP2, ZeRO-3: each GPU holds, steps and averages its shard. Layer by layer weights are
    all-gathered for the forward and again for the backward pass, gradients reduce-scattered."""
    p = t.precision
    weights, gradients = (
        gather_anywhere(gpus, size * t.parameters, machine.levels, t.layers)
        for size in (p.parameter, p.gradient)
    )
    held = p.held(averaged=t.averaged) * t.parameters / gpus
    if gpus > 1:  # two layers' weights, the one in use and the next, and one layer's gradients
        held += (2 * p.parameter + p.gradient) * t.parameters / t.layers
    return _cost(
        machine, t, t.parameters / gpus, held, forward=weights, backward=weights + gradients
    )


def hybrid(machine: Machine, t: Training, gpus: int, *, group: int) -> Cost:
    """FSDP2 over a two-dimensional mesh: sharded over a group, gradients of the shards all-reduced
    between the groups during the backward pass.

    FSDP2 does that on a stream of its own. Where a group is a node it needs other links than the
    group's own collectives, so the longer of the two counts.
    """
    inside = sharded(machine, t, min(group, gpus))
    groups = max(1, gpus // group)
    size = t.precision.gradient * t.parameters / group
    between = t.layers * all_reduce(groups, size / t.layers, machine.levels.outer)
    own = inside.during_backward
    apart = group <= machine.a_node
    return replace(inside, during_backward=max(own, between) if apart else own + between)


def every_k(machine: Machine, t: Training, gpus: int, *, k: int) -> Cost:
    """Everything on every GPU; no gradient is sent, weights are averaged after every k-th step."""
    alone = ddp(machine, t, 1)
    seconds = 2 * gather_anywhere(gpus, t.weight * t.parameters, machine.levels)
    pull = machine.pass_over(pull_bytes(t) * t.parameters) if gpus > 1 else 0.0
    return replace(alone, after=(seconds + pull) / k)


def replicas(machine: Machine, t: Training, gpus: int, *, k: int, group: int) -> Cost:
    """Models that are each sharded over a group of GPUs, and pulled to their mean after every k-th
    step: each GPU averages its shard with its peers in the other groups."""
    inside = sharded(machine, t, min(group, gpus))
    groups = max(1, gpus // group)
    if groups == 1:
        return inside
    shard = t.parameters / group
    seconds = all_reduce(groups, t.weight * shard, machine.levels.outer)
    pull = machine.pass_over(pull_bytes(t) * shard)
    return replace(inside, after=(seconds + pull) / k)


def pull_bytes(t: Training) -> int:
    """Bytes a weight of a pull, beside the all-reduce: the weight is copied to a buffer; buffer and
    weight are read, the weight is written, and where it is a master the parameter too."""
    p = t.precision
    return 5 * t.weight + (p.parameter if p.master else 0)


Strategy = Callable[[Machine, Training, int], Cost]


def strategies(group: int, k: int) -> dict[str, Strategy]:
    """By name; ``group`` GPUs hold one model where several do."""
    return {
        "DDP": ddp,
        "ZeRO-1": zero1,
        "sharded": sharded,
        "hybrid": partial(hybrid, group=group),
        f"every {k}": partial(every_k, k=k),
        "replicas": partial(replicas, k=k, group=group),
    }


def fewest(strategy: Strategy, machine: Machine, t: Training, most: int = 4096) -> int | None:
    """The smallest number of GPUs, whole nodes above one, that has room; None if none up to `most`
    has."""
    inside = range(1, machine.a_node + 1)
    nodes = range(2 * machine.a_node, most + 1, machine.a_node)
    return next((n for n in (*inside, *nodes) if strategy(machine, t, n).fits(machine)), None)


def hidden_from(strategy: Strategy, machine: Machine, t: Training, gpus: int) -> int:
    """Tokens of a GPU and step from which the collectives during the passes are no longer than the
    passes."""
    c = strategy(machine, replace(t, tokens=1), gpus)
    return ceil(max(3 * c.during_forward, 1.5 * c.during_backward) / c.compute)
