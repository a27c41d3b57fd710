"""The tables of some param groups: which memory each launch sees, and which rows.

They hold for as long as groups, parameters and state stay what they were made for, which
`describes` says; then the engine makes others.

A parameter's first step with momentum is one of age 0 (segments.py): it is given zeros (state.py),
and the kernel, which reads the first-step row then, makes it older. A segment that is to have
momentum or a master but has had no gradient yet waits in `Segments.lacking`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rbwa_fused.engine import backends, checks, memory
from rbwa_fused.engine.doors import Backend, Grads
from rbwa_fused.engine.rows import Dtypes, GroupPlan, Plan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import local
from rbwa_fused.engine.state import Change, ParameterState, State, Untouched
from rbwa_fused.rules import Memory, Rule

Group = dict[str, Any]
Served = tuple[Segments, Backend]  # segments, and the backend that steps them


class Options(NamedTuple):
    """What an engine is told once; FusedSGD's arguments of these names."""

    backend: str = "auto"
    flatten: bool = True
    capturable: bool = False
    master_weights: bool = False
    in_backward: bool = False  # a launch for each parameter
    state_dtype: str = "float32"  # of 16-bit parameters, where their rule is wide; or "param"

    @property
    def dtypes(self) -> Dtypes:
        """What 16-bit parameters have in float32."""
        return Dtypes(self.master_weights, self.state_dtype == "param")


class Counts(NamedTuple):
    """What is counted for a param group beside the steps."""

    n_averaged: int = 0
    memory: Memory | None = None  # that its first step has left, see rules.Rule
    further: tuple[int, ...] = ()  # samples of its averages beside the first


class Beside(Protocol):
    """What is averaged beside the parameters and moved by no optimizer, such as a model's buffers.

    Attributes:
        group: its tensors, names and policy, as of the last look.
        state: of each tensor a dict of streams.
    """

    group: Group
    state: dict[Tensor, dict[str, Any]]

    def changed(self) -> bool:
        """Whether it has become something else since the last look."""

    def follow(self) -> None:
        """Looks."""

    def heirs(self) -> dict[Tensor, Tensor]:
        """What stands in the places of tensors that are gone since the last look."""


class Tables:
    """The segments and rows of some param groups, for their state.

    Attributes:
        plan: the rows of the groups, and what belongs to each beside its hyperparameters.
        state: what the parameters have, and come to need.
        launches: the segments and their backends, in the order of their launches.
        alone: the parameters that share memory with no other.
        backend: the name of what runs.
        device_may_count: whether all backends and policies can do without the host's counters.
        kernels_check: whether all backends refuse gradients that do not fit.
        averages: whether some group has a policy.
        scheduled: whether the rule counts its steps in the groups.
    """

    def __init__(self, rule: Rule, options: Options, state: State, steps: int = 0) -> None:
        self.plan = Plan(rule, options.dtypes)
        self.plan.counts[0] = steps
        self.launches: list[Served] = []
        self.alone: set[Tensor] = set()
        self.backend = ""
        self.device_may_count = self.kernels_check = True
        self.averages = False
        self.scheduled = rule.scheduled is not None
        self._options = options
        self._segments: dict[tuple[torch.device, int], Segments] = {}
        self._sharded: list[Segments] = []
        self.state = ParameterState(self.plan, rule, state)
        self._beside: list[tuple[Beside, GroupPlan]] = []

    @torch._disable_dynamo
    def add(
        self,
        groups: Sequence[Group],
        counts: Sequence[Counts] | None = None,
        *,
        move: bool = False,
        beside: Beside | None = None,
    ) -> None:
        """Adds groups, and takes over the state that there is of their parameters.

        Args:
            counts: of each group (default: nothing is counted so far).
            move: parameters on the CPU into flat buffers, where their memory is theirs.
            beside: whose group this is, if it is none of the param groups.
        """
        plan, options = self.plan, self._options
        if beside is None:
            self.state.check(groups)
        self.state.forget()  # until the end: where this fails, the tables describe nothing
        known = [p for table in self._segments.values() for p in table.params]
        known_turns = [turn for (_, turn), table in self._segments.items() for _ in table.params]
        new = [p for group in groups for p in group["params"]]
        turns, alone = memory.launch_order(known + new, known_turns)
        if options.in_backward:
            turns = list(range(len(turns)))
        turn_of = dict(zip(known + new, turns, strict=True))
        new_ones = set(new)
        if move:
            memory.move([p for p, own in zip(new, alone[len(known) :], strict=True) if own])
        self.alone = {p for p, own in zip(known + new, alone, strict=True) if own}
        for group, counted in zip(groups, counts or [Counts()] * len(groups), strict=True):
            group_plan = plan.add(group, *counted, beside=None if beside is None else beside.state)
            if beside is not None:
                self._beside.append((beside, group_plan))
            for index, p in enumerate(group["params"]):
                table = self._segments.setdefault((p.device, turn_of[p]), Segments())
                rows = group_plan.row, group_plan.sampling(p)
                further = group_plan.further_samplings
                table.add(p, group_plan.index, index, *rows, further, steps=beside is None)
        if not new:
            self.backend = backends.choose(options.backend, torch.device("cpu")).name
        launches: list[Served] = []
        changes: list[Change] = []
        taken = memory.Spans(map(local, known + new))
        for (device, _), table in self._segments.items():  # a turn's comes after those before it
            launches.append((table, backends.choose(options.backend, device)))
            changes += self.state.take_over(table, new_ones, taken)
        self.launches = launches
        self._sharded = [table for table, _ in launches if table.shards]
        if launches:
            self.backend = launches[-1][1].name
        policies = [sampler.policy for sampler in plan.samplers]
        custom = any(policy is not None and policy.custom for policy in policies)
        self.averages = any(policy is not None for policy in policies)
        self.device_may_count = not custom and all(
            backend.advance is not None for _, backend in self.launches
        )
        self.kernels_check = all(backend.checks for _, backend in self.launches)
        plan.state_is_due = True
        self.state.hold(changes)  # nothing has been changed until here

    def describes(self, groups: Sequence[Group], state: State) -> bool:
        """Whether groups, parameters and state are those that the tables were made for."""
        if not self.describes_state(state) or not self.describes_groups(groups):
            return False
        return not self._sharded or all(map(Segments.holds_shards, self._sharded))

    def describes_groups(self, groups: Sequence[Group]) -> bool:
        """Whether these are the groups that there are, with the parameters in them."""
        plans = self.of_groups
        return len(plans) == len(groups) and all(map(GroupPlan.describes, plans, groups))

    def describes_state(self, state: State) -> bool:
        """Whether the state is what the tables were made for."""
        if not self._beside:
            return self.state.held.stands(state)
        return self.state.stands(state) and all(
            not own.changed() and plan.describes(own.group) for own, plan in self._beside
        )

    @property
    def of_groups(self) -> list[GroupPlan]:
        """The plans of the param groups, in their order."""
        if not self._beside:
            return self.plan.groups
        return [plan for plan in self.plan.groups if plan.state is None]

    def were_cleared(self, state: State) -> bool:
        """Whether the state is empty, which once was not."""
        return not state and not self.state.held.empty

    def known(self, group: Group) -> GroupPlan | None:
        """What belongs to the group that has had a parameter of this one."""
        plan_of = {p: plan for plan in self.plan.groups for p in plan.params}
        return next((plan_of[p] for p in group["params"] if p in plan_of), None)

    def untouched(self, *, averages: bool) -> list[Untouched]:
        """See ParameterState.untouched."""
        return self.state.untouched((table for table, _ in self.launches), averages=averages)

    def fit(self, table: Segments, grads: Grads) -> bool:
        """Checks gradients in full; see checks.fit."""
        return checks.fit(table, grads, [plan.group for plan in self.plan.groups])
