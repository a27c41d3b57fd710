"""The coefficient tables: what each param group's rows say at a step.

Rules and averages change for different reasons, so each has a table of its own, and a segment names
its row in both (segments.py). A param group's rows change when a hyperparameter does, which is
seldom; those of averages are in samplers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from numbers import Number
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbwa_fused import rules, streams
from rbwa_fused.average import Average
from rbwa_fused.engine.packed import RowTable
from rbwa_fused.engine.samplers import ROWS_PER_SAMPLER, Sampler
from rbwa_fused.several import Several, averaging, policies_of

Group = dict[str, Any]

C, RHO = rules.COLUMNS.index("c"), rules.COLUMNS.index("rho")
ROWS_PER_GROUP = 2  # the usual row, and that of a parameter of age 0, at its first step


class Dtypes(NamedTuple):
    """What 16-bit parameters have in float32.

    Attributes:
        master_weights: a master.
        narrow_state: nothing else; where a rule is wide, its state is 16-bit, too.
    """

    master_weights: bool = False
    narrow_state: bool = False


class GroupPlan:
    """What belongs to a param group beside its hyperparameters.

    Attributes:
        rule: what its rows are made by.
        state: what its parameters' streams are in, where that is not the state of all.
        sampler, policy: of its first average.
        averages: the sampler of each of its averages, by its key in a parameter's state.
    """

    def __init__(
        self,
        group: Group,
        index: int,
        samplers: Sequence[Sampler],
        counts: list[int],
        memory: rules.Memory,
        dtypes: Dtypes,
        rule: rules.Rule,
        state: Any,
    ) -> None:
        self.rule = rule
        self.state = state
        self.group = group
        self.params = list(group["params"])
        self.index = index
        self.average = group["average"]
        self.sampler = samplers[0]
        self.policy = self.sampler.policy
        self.averages = dict(zip(streams.AVERAGES, samplers, strict=False))
        if self.policy is None:
            self.averages = {}
        self.memory = memory  # that its first step has left, see rules.Rule
        self.kind = rules.Kind.PLAIN  # of its rows
        self.kept: tuple[str, ...] = ()  # the keys of what rows of that kind keep
        self.rule_inputs: tuple[Any, ...] | None = None  # what the rows hold
        self.left: dict[str, Any] = {}  # what the step to come leaves in the group
        self.master_weights = dtypes.master_weights
        self._narrow_state = dtypes.narrow_state or not rule.wide
        self._counts = counts
        self._one_element = any(p.numel() == 1 for p in self.params)

    @property
    def n_averaged(self) -> int:
        """Samples in the group's first average."""
        return self._counts[self.sampler.index]

    def samples(self, key: str) -> int:
        """Samples in one of the group's averages."""
        return self._counts[self.averages[key].index]

    @property
    def further_samples(self) -> tuple[int, ...]:
        """Samples in each of the group's averages but the first."""
        return tuple(self.samples(key) for key in [*self.averages][1:])

    def describes(self, group: Group) -> bool:
        """Whether that is its group still, with the same parameters in it."""
        if group is not self.group:
            return False
        params = group["params"]
        if self._one_element:
            return len(params) == len(self.params) and all(map(is_, params, self.params))
        try:
            # A list compares by identity first, 3 ns each, and then by value.
            return bool(params == self.params) or list(params) == self.params
        except RuntimeError:  # several elements have no one answer: they are not the same
            return False

    def has_master(self, param: Tensor) -> bool:
        """Whether a parameter has a float32 master."""
        return streams.working_dtype(param.dtype, self.master_weights) != param.dtype

    def is_the_weights(self, param: Tensor) -> bool:
        """Whether the average of a parameter is the parameter itself, or its master."""
        if self.policy is None or not self.rule.moves:
            return False
        return self.policy.elided_for(streams.working_dtype(param.dtype, self.master_weights))

    def has_buffer(self, param: Tensor, key: str = streams.AVERAGE) -> bool:
        """Whether a parameter has an average, the first or another, in a buffer of its own."""
        if key != streams.AVERAGE:
            return key in self.averages
        return self.policy is not None and not self.is_the_weights(param)

    def dtype_of(self, stream: str, param: Tensor) -> torch.dtype:
        """The dtype of one of a parameter's state tensors (streams.STREAMS)."""
        working = streams.working_dtype(param.dtype, self.master_weights)
        sampler = self.averages.get(stream)
        if sampler is not None and sampler.policy is not None:
            return sampler.policy.dtype_for(working)
        if stream in self.rule.streams and not self._narrow_state:
            return streams.working_dtype(param.dtype, master_weights=True)
        return working

    @property
    def row(self) -> int:
        """Its usual row; that of a parameter's first step follows."""
        return ROWS_PER_GROUP * self.index

    def sampling(self, param: Tensor) -> int:
        """The row of a parameter in the table of samplings, for its first average."""
        return self.sampler.first_row + self.is_the_weights(param)

    @property
    def further_samplings(self) -> tuple[int, ...]:
        """The rows there of its other averages, which are always in buffers."""
        return tuple(sampler.first_row for sampler in [*self.averages.values()][1:])


class Plan:
    """The tables of all groups, and the groups' counters.

    Args:
        rule: what the groups' rows are made by.
        dtypes: what 16-bit parameters have in float32.

    Attributes:
        counts: steps taken, then the samples of each sampler, as a device's DeviceCounters.counts.
        next_counts: what they will be behind the step to come.
        state_is_due: some parameter may still need a state tensor: the next step looks at all of
            them. It stays so until whoever gives state has done it, whatever fails before.
    """

    def __init__(self, rule: rules.Rule, dtypes: Dtypes) -> None:
        self.groups: list[GroupPlan] = []
        self.samplers: list[Sampler] = []
        self.counts = [0]
        self.next_counts = [1]
        self.state_is_due = True
        self.rule = rule
        self._rows = RowTable(rules.ROW)
        self._samplings = RowTable(rules.SAMPLING)
        self._dtypes = dtypes

    def add(
        self,
        group: Group,
        n_averaged: int = 0,
        memory: rules.Memory | None = None,
        further: Sequence[int] = (),
        beside: Any = None,
    ) -> GroupPlan:
        """Appends a group's rows, and those of its policies where no other group has them. One that
        is only averaged (upkeep.Beside) has a state of its own. ``n_averaged`` and ``further``
        count the samples of its averages, where there are any."""
        policies = policies_of(group["average"]) or (None,)
        samples = chain((n_averaged, *further), repeat(0))
        samplers = [self._sampler(*own) for own in zip(policies, samples, strict=False)]
        index, own = len(self.groups), dict(memory or {})
        how = (self._dtypes, self.rule) if beside is None else (Dtypes(), rules.NONE)
        plan = GroupPlan(group, index, samplers, self.counts, own, *how, beside)
        self._rows.grow(ROWS_PER_GROUP)
        self.groups.append(plan)
        return plan

    def _sampler(self, policy: Average | None, n_averaged: int) -> Sampler:
        for sampler in self.samplers:
            if sampler.policy is policy and self.counts[sampler.index] == n_averaged:
                return sampler
        sampler = Sampler(policy, len(self.counts), len(self._samplings))
        self._samplings.grow(ROWS_PER_SAMPLER)
        self.samplers.append(sampler)
        self.counts.append(n_averaged)
        return sampler

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tables `rows` (2 a group, 14) and `samplings` (2 a sampler, 5) of csrc/step.h."""
        return self._rows.tensor, self._samplings.tensor

    def sample(self) -> None:
        """Brings the samplings up to date for the step to come."""
        counts = self.counts
        step = counts[0] + 1
        next_counts = [step]
        for sampler in self.samplers:
            next_counts.append(sampler.update(step, counts[sampler.index], self._samplings))
        self.next_counts = next_counts

    def update(self, scale: float, *, on_device: bool = False, lr_on_device: bool = False) -> None:
        """Brings the rows up to date; `scale` is the loss scale under AMP, else 1. What a device
        counts there is not packed. A learning rate on a device is not read if the kernel reads it
        there."""
        for plan in self.groups:
            group, rule, known = plan.group, plan.rule, plan.rule_inputs
            if group["average"] is not plan.average:
                _check_policy(plan)
            inputs = (*rule.inputs(group), group.get(rules.DECOUPLED), scale)
            try:
                changed = inputs != known
            except RuntimeError:  # a tensor of several elements; the check will say so
                changed = True
            if changed:
                lr = inputs[0]
                if (
                    known is not None
                    and type(lr) is float
                    and lr >= 0.0
                    and inputs[1:] == known[1:]
                ):
                    self._pack_lr(plan, lr, known)  # as schedulers change it, each at every step
                else:
                    self._pack(plan, inputs, lr_on_device)
            if rule.scheduled is not None and not on_device:
                self._pack_scheduled(plan)

    def _pack_lr(self, plan: GroupPlan, lr: float, known: tuple[Any, ...]) -> None:
        """Another learning rate alone, without a check of all the rest."""
        plan.rule_inputs = None  # until both rows hold it
        if plan.rule.scheduled is None:
            self._rows.pack_last(plan.row, lr)
            self._rows.pack_last(plan.row + 1, lr)
        plan.rule_inputs = (lr, *known[1:])

    def _pack_scheduled(self, plan: GroupPlan) -> None:
        """What is another number at each step."""
        assert plan.rule.scheduled is not None
        (c, alpha, gamma, rho), plan.left = plan.rule.scheduled(plan.group)
        for first in (False, True):
            self._rows.pack_from(plan.row + first, C, c, 0.0, alpha, gamma)  # kappa is between
            self._rows.pack_from(plan.row + first, RHO, rho)

    def _pack(self, plan: GroupPlan, inputs: tuple[Any, ...], lr_on_device: bool) -> None:
        """Lines (1)-(3)."""
        *hyperparameters, scale = inputs
        group = plan.group
        if lr_on_device and rules.lr_on_device(group) is not None:
            group = {**group, "lr": 0.0}
        plan.rule.check(group)
        plan.rule.check_memory(group, plan.memory)
        plan.rule_inputs = None  # until both rows hold them
        for first in (False, True):
            kind, s, *rest = plan.rule.row(group, first)
            if kind != plan.kind:
                self.state_is_due = True
                plan.kind, plan.kept = rules.Kind(int(kind)), plan.rule.streams_of(int(kind))
            self._rows.pack(plan.row + first, kind, s / scale, *rest)
        # A list is compared by a copy of it. A tensor or an array may change its value in place, so
        # that such rows are packed at every step.
        copies = tuple(list(value) if type(value) is list else value for value in inputs)
        values = chain.from_iterable(
            value if isinstance(value, tuple | list) else (value,) for value in hyperparameters
        )
        changes = any(not isinstance(value, Number | None) for value in values)
        plan.rule_inputs = None if changes else copies


def _check_policy(plan: GroupPlan) -> None:
    """Refuses a group that has another average than it was added with."""
    group = plan.group
    several = isinstance(group["average"], list | tuple | dict | Several)
    given = averaging(group["average"]) if several else group["average"] or None
    if given != plan.average or isinstance(group["average"], Average):
        raise ValueError(
            f"Invalid average: {group['average']!r} was assigned to a group that was added with "
            f"{plan.average!r}"
        )
    # torch's ZeroRedundancyOptimizer copies the groups that it was given over ours.
    group["average"] = plan.average
