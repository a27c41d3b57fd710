"""The tables of some param groups: which memory each launch sees, and which rows.

They hold for as long as groups, parameters and state stay what they were made for, which
`describes` says; then the engine makes others.

A parameter's first step with momentum is one of age 0 (segments.py): `give_state` gives it zeros,
and the kernel, which reads the first-step row then, makes it older. A segment that is to have
momentum or a master but has had no gradient yet waits in `Segments.lacking`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from operator import setitem
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbwa_fused.engine import backends, checks, memory
from rbwa_fused.engine.doors import Backend, Call, Grads
from rbwa_fused.engine.held import NOTHING, Held, Standing
from rbwa_fused.engine.rows import GroupPlan, Plan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import beside, is_sharded_as, local, shard_of
from rbwa_fused.rules import Kind, Rule
from rbwa_fused.streams import AVERAGE, MASTER, STREAMS

Group = dict[str, Any]
State = MutableMapping[Tensor, Any]
Served = tuple[Segments, Backend]  # segments, and the backend that steps them
Change = tuple[dict[str, Any], str, Tensor | None]  # of a parameter's state: a key and its value


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


def _of(state: State, param: Tensor) -> dict[str, Any]:
    """A parameter's state, or an empty one."""
    held = state.get(param)
    return {} if held is None else held


class Tables:
    """The segments and rows of some param groups, for their state.

    Attributes:
        plan: the rows of the groups, and what belongs to each beside its hyperparameters.
        launches: the segments and their backends, in the order of their launches.
        alone: the parameters that share memory with no other.
        lost: whether some average was removed that had samples, and has not started again.
        backend: the name of what runs.
        device_may_count: whether all backends and policies can do without the host's counters.
        kernels_check: whether all backends refuse gradients that do not fit.
    """

    def __init__(self, rule: Rule, options: Options, state: State, steps: int = 0) -> None:
        self.plan = Plan(rule, options.master_weights)
        self.plan.counts[0] = steps
        self.launches: list[Served] = []
        self.alone: set[Tensor] = set()
        self.backend = ""
        self.device_may_count = self.kernels_check = True
        self.lost = False
        self._rule = rule
        self._options = options
        self._segments: dict[tuple[torch.device, int], Segments] = {}
        self._sharded: list[Segments] = []
        self._made: dict[int, Tensor] = {}  # by their ids, the tensors that `give_state` has made
        self._state = state
        self._held: Standing = Held(state)

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
        self._held = NOTHING  # until the end: where this fails, the tables describe nothing
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
            group_plan = plan.add(group, *counted)
            for index, p in enumerate(group["params"]):
                table = self._segments.setdefault((p.device, turn_of[p]), Segments())
                table.add(p, group_plan.index, index, group_plan.row, group_plan.sampling(p))
        if not new:
            self.backend = backends.choose(options.backend, torch.device("cpu")).name
        launches: list[Served] = []
        held: list[Change] = []
        taken = memory.Spans(map(local, known + new))
        for (device, _), table in self._segments.items():  # a turn's comes after those before it
            launches.append((table, backends.choose(options.backend, device)))
            held += self._take_over_state(table, new_ones, taken)
        self.launches = launches
        self._sharded = [table for table, _ in launches if table.shards]
        if launches:
            self.backend = launches[-1][1].name
        custom = any(p.policy is not None and p.policy.custom for p in plan.groups)
        self.device_may_count = not custom and all(
            backend.advance is not None for _, backend in self.launches
        )
        self.kernels_check = all(backend.checks for _, backend in self.launches)
        self.lost = any(self._is_lost(group, p) for group in plan.groups for p in group.params)
        plan.state_is_due = True
        for state, stream, tensor in held:  # nothing has been changed until here
            if tensor is None:
                state.pop(stream, None)
            else:
                state[stream] = tensor
        self._held = Held(self._state)

    def describes(self, groups: Sequence[Group], state: State) -> bool:
        """Whether groups, parameters and state are those that the tables were made for."""
        if not self._held.stands(state) or not self.describes_groups(groups):
            return False
        return not self._sharded or all(map(Segments.holds_shards, self._sharded))

    def describes_groups(self, groups: Sequence[Group]) -> bool:
        """Whether these are the groups that there are, with the parameters in them."""
        plans = self.plan.groups
        return len(plans) == len(groups) and all(map(GroupPlan.describes, plans, groups))

    def describes_state(self, state: State) -> bool:
        """Whether the state is what the tables were made for."""
        return self._held.stands(state)

    def were_cleared(self, state: State) -> bool:
        """Whether the state is empty, which once was not."""
        return not state and not self._held.empty

    def holds(self, stream: str, param: Tensor) -> bool:
        """Whether a parameter has a stream in its state."""
        return _of(self._state, param).get(stream) is not None

    def known(self, group: Group) -> GroupPlan | None:
        """What belongs to the group that has had a parameter of this one."""
        plan_of = {p: plan for plan in self.plan.groups for p in plan.params}
        return next((plan_of[p] for p in group["params"] if p in plan_of), None)

    def _take_over_state(
        self, table: Segments, new: set[Tensor], taken: memory.Spans
    ) -> list[Change]:
        """Gives a table the state that there is of new parameters.

        A tensor that a kernel can step is stepped where it lies; any other is replaced by a copy
        that can be. Returns what the state is to hold instead of what it holds.
        """
        changes: list[Change] = []
        for stream in STREAMS:
            tensors: dict[int, Tensor] = {}
            for i, p in enumerate(table.params):
                held = _of(self._state, p) if p in new else {}
                value = held.get(stream)
                group = self.plan.groups[table.groups[i]]
                gone = {AVERAGE: not group.has_buffer(p), MASTER: not group.has_master(p)}
                if stream in held and (gone.get(stream) or value is None):
                    changes.append((held, stream, None))  # after model.float(): no master
                elif value is not None:
                    dtype = group.dtype_of(stream, p)
                    own = local(value)
                    if not (
                        type(own) is Tensor
                        and own.dtype == dtype
                        and is_sharded_as(value, p)
                        and memory.lies_as(own, table.memory[i])
                        and taken.add(own)
                    ):
                        own = memory.laid_out(table.memory[i], dtype)
                        own.copy_(shard_of(value, p))
                        changes.append((held, stream, beside(own, p)))
                    tensors[i] = own
            table.attach(stream, tensors)
            if stream in self._rule.streams[:1]:
                ages = table.ages
                for i in tensors:
                    ages[i] = 1
                table.set_ages(ages)
        return changes

    def give_state(self, table: Segments, grads: Grads) -> list[Call]:
        """Gives parameters the state they come to need. Returns what is to be done behind the step.

        Whatever fails, another attempt comes to the same: allocation fails before anything is
        changed, and `untouched` tells what a later rebuild is to make anew.
        """
        given: dict[str, dict[int, Tensor]] = {stream: {} for stream in STREAMS}
        lacking: list[int] = []
        behind: list[Call] = []

        def give(stream: str, i: int, value: Tensor | None) -> None:
            tensor = memory.laid_out(table.memory[i], group.dtype_of(stream, p))
            given[stream][i] = tensor.zero_() if value is None else tensor.copy_(value)

        for i, p in enumerate(table.params):
            group = self.plan.groups[table.groups[i]]
            if group.policy is not None:
                # torch.distributed.checkpoint takes a step with an optimizer without any state.
                self._state.setdefault(p, {})
            held = _of(self._state, p)
            lacks_kept = group.kind != Kind.PLAIN and self._rule.streams[0] not in held
            lacks_master = group.has_master(p) and MASTER not in held
            if lacks_master and (grads[i] is not None or self._rule.streams[0] in held):
                give(MASTER, i, local(p).detach())
                lacks_master = False
            if grads[i] is None:
                if lacks_kept or lacks_master:
                    lacking.append(i)
            elif lacks_kept:
                for stream in self._rule.streams:
                    give(stream, i, None)
            takes_momentum = grads[i] is not None and group.kind != Kind.PLAIN
            if takes_momentum and self._rule.constant_momentum and group.beta is None:
                behind.append((setattr, group, "beta", float(group.group["momentum"])))
            if self._is_lost(group, p):
                self.lost = True
                if group.sampler.due:
                    tensor = memory.laid_out(table.memory[i], group.dtype_of(AVERAGE, p))
                    master = given[MASTER].get(i, held.get(MASTER))
                    weights = local(p if master is None else master).detach()
                    behind.append((tensor.copy_, weights))
                    behind.append((setitem, held, AVERAGE, beside(tensor, p)))
            elif group.has_buffer(p) and AVERAGE not in held:
                give(AVERAGE, i, local(p).detach())
        for tensors in given.values():
            self._made.update((id(tensor), tensor) for tensor in tensors.values())
        for stream, tensors in given.items():
            for i, tensor in tensors.items():
                p = table.params[i]
                held = _of(self._state, p)
                held[stream] = beside(tensor, p)
                self._state[p] = held
        for stream, tensors in given.items():
            table.attach(stream, tensors)
        table.lacking = lacking
        if any(given.values()) or not self._held.stands(self._state):
            self._held = Held(self._state)
        return behind

    def _is_lost(self, group: GroupPlan, param: Tensor) -> bool:
        """Whether an average is missing that its group has taken samples of: it starts again, as a
        copy, at the next one. One that is written back at each sample is what the weights are."""
        return (
            group.n_averaged > 0
            and group.has_buffer(param)
            and group.policy is not None
            and group.policy.write_back_every != 1
            and AVERAGE not in _of(self._state, param)
        )

    def untouched(self, *, averages: bool) -> list[tuple[Tensor, str]]:
        """Parameters and their streams that `give_state` has made and no step has followed; with
        averages, before the first step."""
        found = []
        for table, _ in self.launches:
            for p, age in zip(
                table.params, table.ages, strict=False
            ):  # `add` may have failed midway
                streams = () if age > 0 else self._rule.streams
                for stream in (*streams, AVERAGE) if averages else streams:
                    tensor = _of(self._state, p).get(stream)
                    if isinstance(tensor, Tensor) and id(local(tensor)) in self._made:
                        found.append((p, stream))
        return found

    def fit(self, table: Segments, grads: Grads) -> bool:
        """Checks gradients in full; see checks.fit."""
        return checks.fit(table, grads, [plan.group for plan in self.plan.groups])
