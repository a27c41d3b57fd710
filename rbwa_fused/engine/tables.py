"""The tables of some param groups: which memory each launch sees, and which rows.

They hold for as long as groups, parameters and state stay what they were made for, which
`describes` says; then the engine makes others.

A parameter's first step with momentum passes through these hands: `give_state` gives it a buffer
and points its segment at the group's first-step row, the kernel runs, `first_steps_taken` points it
back. A segment that is to have momentum or a master but has had no gradient yet waits in
`Segments.lacking`. Where the device counts, its `marks` say all this instead (counters.py).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbwa_fused.engine import backends, checks, memory
from rbwa_fused.engine.rows import GroupPlan, Plan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import local, shard_of
from rbwa_fused.rules import Rule
from rbwa_fused.streams import STREAMS

Group = dict[str, Any]
State = MutableMapping[Tensor, Any]
Grads = list[Tensor | None]
Launch = tuple[Segments, backends.Backend]
Held = tuple[dict[str, Any], str, Tensor | None]  # a parameter's state, a key and its value in it


class Options(NamedTuple):
    """What an engine is told once; FusedSGD's arguments of these names."""

    backend: str = "auto"
    flatten: bool = True
    capturable: bool = False
    master_weights: bool = False
    in_backward: bool = False  # a launch for each parameter


class Counts(NamedTuple):
    """What is counted for a param group beside the steps."""

    n_averaged: int = 0
    beta: float | None = None  # of implicit RSGDM, the momentum of its first step


class Tables:
    """The segments and rows of some param groups, for their state.

    Attributes:
        plan: the rows of the groups, and what belongs to each beside its hyperparameters.
        launches: the segments and their backends, in the order of their launches.
        alone: the parameters that share memory with no other.
        backend: the name of what runs.
        device_may_count: whether all backends and policies can do without the host's counters.
        kernels_check: whether all backends refuse gradients that do not fit.
    """

    def __init__(self, rule: Rule, options: Options, state: State) -> None:
        self.plan = Plan(rule, options.master_weights)
        self.launches: list[Launch] = []
        self.alone: set[Tensor] = set()
        self.backend = ""
        self.device_may_count = self.kernels_check = True
        self._rule = rule
        self._options = options
        self._segments: dict[tuple[torch.device, int], Segments] = {}
        self._state = state
        self._size = len(state)

    @torch._disable_dynamo
    def add(
        self,
        groups: Sequence[Group],
        counts: Sequence[Counts] | None = None,
        *,
        move: bool = False,
    ) -> None:
        """Adds groups, and takes over the state that there is of their parameters.

        Args:
            counts: of each group (default: nothing is counted so far).
            move: parameters on the CPU into flat buffers, where their memory is theirs.
        """
        plan, options = self.plan, self._options
        known = [p for table in self._segments.values() for p in table.params]
        known_turns = [turn for (_, turn), table in self._segments.items() for _ in table.params]
        new = [p for group in groups for p in group["params"]]
        turns, alone = memory.launch_order(known + new, known_turns)
        if options.in_backward:
            turns = list(range(len(turns)))
        turn_of = dict(zip(known + new, turns, strict=True))
        if move:
            memory.move([p for p, own in zip(new, alone[len(known) :], strict=True) if own])
        self.alone = {p for p, own in zip(known + new, alone, strict=True) if own}
        for group, counted in zip(groups, counts or [Counts()] * len(groups), strict=True):
            group_plan = plan.add(group, *counted)
            for index, p in enumerate(group["params"]):
                table = self._segments.setdefault((p.device, turn_of[p]), Segments())
                row, sampling = group_plan.row(first=False), group_plan.sampling(p)
                table.add(p, group_plan.index, index, row, sampling)
        if not new:
            self.backend = backends.choose(options.backend, torch.device("cpu")).name
        launches: list[Launch] = []
        held: list[Held] = []
        for (device, _), table in self._segments.items():  # a turn's comes after those before it
            launches.append((table, backends.choose(options.backend, device)))
            held += self._take_over_state(table, set(new))
        self.launches = launches
        if launches:
            self.backend = launches[-1][1].name
        custom = any(p.policy is not None and p.policy.custom for p in plan.groups)
        self.device_may_count = not custom and all(
            backend.advance is not None for _, backend in self.launches
        )
        self.kernels_check = all(backend.checks for _, backend in self.launches)
        plan.state_is_due = True
        for state, stream, tensor in held:  # nothing has been changed until here
            if tensor is None:
                state.pop(stream, None)
            else:
                state[stream] = tensor
        self._size = len(self._state)

    def describes(self, groups: Sequence[Group], state: State) -> bool:
        """Whether groups, parameters and state are those that the tables were made for."""
        if (
            state is not self._state
            or len(state) != self._size
            or not self.describes_groups(groups)
        ):
            return False
        return all(table.holds_state() and table.holds_shards() for table, _ in self.launches)

    def describes_groups(self, groups: Sequence[Group]) -> bool:
        """Whether these are the groups that there are, with the parameters in them."""
        plans = self.plan.groups
        return len(plans) == len(groups) and all(map(GroupPlan.describes, plans, groups))

    def follows(self, state: State) -> bool:
        """Whether the state has as many parameters as it had, in the same mapping."""
        return state is self._state and len(state) == self._size

    def were_cleared(self, state: State) -> bool:
        """Whether the state is empty, which once was not."""
        return not state and self._size > 0

    def holds(self, stream: str, param: Tensor) -> bool:
        """Whether a parameter has a stream in its state."""
        return stream in self._state.get(param, {})

    def known(self, group: Group) -> GroupPlan | None:
        """What belongs to the group that has had a parameter of this one."""
        plan_of = {p: plan for plan in self.plan.groups for p in plan.params}
        return next((plan_of[p] for p in group["params"] if p in plan_of), None)

    def _take_over_state(self, table: Segments, new: set[Tensor]) -> list[Held]:
        """What the state of new parameters is to hold: tensors in the table's buffers, or nothing
        any more."""
        held: list[Held] = []
        for stream in STREAMS:
            values: dict[int, Tensor | None] = {}
            for i, p in enumerate(table.params):
                state = self._state.get(p, {}) if p in new else {}
                group = self.plan.groups[table.groups[i]]
                gone = {"average": not group.has_buffer(p), "master_param": not group.has_master(p)}
                if gone.get(stream):
                    held.append((state, stream, None))  # model.float() leaves no need of a master
                elif state.get(stream) is not None:
                    values[i] = shard_of(state[stream], p)
            views = self._attach(table, stream, values)
            held += [(self._state[table.params[i]], stream, view) for i, view in views.items()]
        return held

    def _attach(
        self, table: Segments, stream: str, values: dict[int, Tensor | None]
    ) -> dict[int, Tensor]:
        groups = self.plan.groups
        dtypes = {i: groups[table.groups[i]].dtype_of(stream, table.params[i]) for i in values}
        return table.attach(stream, values, dtypes)

    def give_state(self, table: Segments, grads: Grads, *, marked: bool) -> None:
        """Gives parameters the state they come to need; momentum's absence marks its first step.

        `marked` says that a device's marks tell first steps.
        """
        averages: dict[int, Tensor | None] = {}
        masters: dict[int, Tensor | None] = {}
        momentum: dict[int, Tensor | None] = {}
        table.lacking = []
        for i, p in enumerate(table.params):
            group = self.plan.groups[table.groups[i]]
            held = self._state[p] if group.policy is not None else self._state.get(p, {})
            if group.has_buffer(p) and "average" not in held:
                averages[i] = local(p).detach()
            moving = group.has_momentum and "momentum_buffer" not in held
            mastering = group.has_master(p) and "master_param" not in held
            if mastering and (grads[i] is not None or "momentum_buffer" in held):
                masters[i] = local(p).detach()
                mastering = False
            if grads[i] is None:
                if moving or mastering:
                    table.lacking.append(i)
            elif moving:
                momentum[i] = None
                if not marked:
                    table.set_row(i, group.row(first=True))
                    table.first.append(i)
                if self._rule.constant_momentum:
                    group.beta = float(group.group["momentum"])
        given = {"average": averages, "master_param": masters}
        given |= dict.fromkeys(self._rule.streams, momentum)
        for stream, values in given.items():
            for i, view in self._attach(table, stream, values).items():
                self._state[table.params[i]][stream] = view
        self._size = len(self._state)

    def first_steps_taken(self, table: Segments) -> None:
        """Points the segments that took their first step with momentum at their usual rows."""
        for i in table.first:
            table.set_row(i, self.plan.groups[table.groups[i]].row(first=False))
        table.first = []

    def fit(self, table: Segments, grads: Grads) -> bool:
        """Checks gradients in full; see checks.fit."""
        return checks.fit(table, grads, [plan.group for plan in self.plan.groups])
