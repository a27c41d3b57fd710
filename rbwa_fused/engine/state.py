"""The state of some parameters: what is taken over, what is given, what no step has followed yet.

`opt.state` belongs to everybody. A tensor in it that a kernel can step is stepped where it lies.
What a parameter comes to need is given before the step that needs it; whatever fails then, another
attempt comes to the same, because allocation fails before anything is changed, and because what was
given and not used is known here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from operator import setitem
from typing import Any

import torch
from torch import Tensor

from rbwa_fused.engine import checks, memory
from rbwa_fused.engine.doors import Call, Grads
from rbwa_fused.engine.held import NOTHING, Held, Standing
from rbwa_fused.engine.rows import GroupPlan, Plan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import beside, is_sharded_as, local, shard_of
from rbwa_fused.rules import Rule
from rbwa_fused.streams import AVERAGES, FROM_THE_WEIGHTS, MASTER, STEP, STREAMS, followed

State = MutableMapping[Tensor, Any]
Change = tuple[dict[str, Any], str, Tensor | None]  # of a parameter's state: a key and its value
Untouched = tuple[Tensor, dict[str, Any], str]  # a parameter, its state, and a key of it
Given = dict[str, dict[int, Tensor]]  # by streams and segments


class ParameterState:
    """The state of the parameters of some tables: of a group that has none of its own, in what all
    others share.

    Attributes:
        held: what stood in the state when the tables were made for it.
        beside: the same of what groups have for their own.
        lost: whether some average was missing then that had samples. It starts again as a copy,
            which is a change of the state.
    """

    def __init__(self, plan: Plan, rule: Rule, state: State) -> None:
        self.held: Standing = Held(state)
        self.beside: list[tuple[State, Standing]] = []
        self.lost = False
        self._plan = plan
        self._rule = rule
        self._state = state
        self._made: dict[int, Tensor] = {}  # by their ids, the tensors that `give` has made

    def of(self, group: GroupPlan, param: Tensor) -> dict[str, Any]:
        """A parameter's state, or an empty one."""
        held = self._where(group).get(param)
        return {} if held is None else held

    def _where(self, group: GroupPlan) -> State:
        return self._state if group.state is None else group.state

    def stands(self, state: State) -> bool:
        """Whether this is the same state, with the same in it, and so is what groups have of their
        own."""
        return self.held.stands(state) and all(held.stands(own) for own, held in self.beside)

    def look(self) -> None:
        """From now on the state is what it is then."""
        self.held = Held(self._state)
        own = [plan.state for plan in self._plan.groups if plan.state is not None]
        self.beside = [(one, Held(one)) for one in own]

    # ---- taken over ----------------------------------------------------------------------------

    def check(self, groups: Iterable[dict[str, Any]]) -> None:
        """Raises for param groups whose state is to be taken over, and cannot be."""
        for group in groups:
            checks.parts(group, self._state, self._rule)

    def forget(self) -> None:
        """Until `hold`, no state is what the tables were made for."""
        self.held = NOTHING

    def hold(self, changes: Iterable[Change]) -> None:
        """Makes the changes; from now on the state is what it is then."""
        for held, stream, tensor in changes:
            if tensor is None:
                held.pop(stream, None)
            else:
                held[stream] = tensor
        plans = self._plan.groups
        self.lost = any(
            self._is_lost(plan, p, key)
            for plan in plans
            for p in plan.params
            for key in plan.averages
        )
        self.look()

    def take_over(self, table: Segments, new: set[Tensor], taken: memory.Spans) -> list[Change]:
        """Gives a table the state that there is of new parameters.

        A tensor that no kernel can step is replaced by a copy that can be. Returns what the state
        is to hold instead of what it holds.
        """
        changes: list[Change] = []
        pairs = zip(table.params, table.groups, strict=True)
        standing = {key for p, g in pairs if p in new for key in self.of(self._plan.groups[g], p)}
        averages = [key for key in AVERAGES if key in standing]
        for stream in (*averages, MASTER, *self._rule.streams):
            tensors: dict[int, Tensor] = {}
            for i, p in enumerate(table.params):
                group = self._plan.groups[table.groups[i]]
                held = self.of(group, p) if p in new else {}
                value = held.get(stream)
                gone = not group.has_master(p) if stream == MASTER else False
                if stream in averages:
                    gone = not group.has_buffer(p, stream)
                if stream in held and (gone or value is None):
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
                        own.copy_(shard_of(value, p).detach())
                        changes.append((held, stream, beside(own, p)))
                    tensors[i] = own
            table.attach(stream, tensors)
            if stream in self._rule.streams[:1]:
                ages = table.ages
                for i in tensors:
                    ages[i] = 1
                table.set_ages(ages)
        if self._rule.counts:
            table.attach(STEP, self._steps(table, new, taken, changes))
        return changes

    def _steps(
        self, table: Segments, new: set[Tensor], taken: memory.Spans, changes: list[Change]
    ) -> dict[int, Tensor]:
        """The tensors that count the steps of new parameters. A number, as older versions of torch
        have it, and a tensor on another device become one that the host counts in."""
        steps: dict[int, Tensor] = {}
        for i, p in enumerate(table.params):
            held = self.of(self._plan.groups[table.groups[i]], p) if p in new else {}
            value = held.get(STEP)
            if STEP in held and value is None:
                changes.append((held, STEP, None))
            elif value is not None:
                usable = (
                    type(value) is Tensor
                    and value.dtype == torch.float32
                    and memory.lies_as(value, torch.empty((), device="cpu"))
                    and taken.add(value)
                )
                if not usable:
                    value = _count(float(value))
                    changes.append((held, STEP, value))
                steps[i] = value
        return steps

    # ---- given ---------------------------------------------------------------------------------

    def give(self, table: Segments, grads: Grads, *, on_device: bool = False) -> list[Call]:
        """Gives parameters what they come to need. Returns what is to be done behind the step.
        A device that counts knows by itself what a step begins with."""
        given: Given = defaultdict(dict)
        lacking: list[int] = []
        behind: list[Call] = []
        if not on_device:
            self._refresh(table)
        for i, p in enumerate(table.params):
            group = self._plan.groups[table.groups[i]]
            state = self._where(group)
            if group.policy is not None and state.get(p) is None:
                # torch.distributed.checkpoint takes a step with an optimizer without any state.
                state[p] = {}
            if self._allocate(table, i, group, grads[i] is not None, given):
                lacking.append(i)
            if grads[i] is not None and group.kept:
                behind.append((group.memory.update, self._rule.remember(group.group)))
            for key, sampler in group.averages.items():
                if sampler.due and self._is_lost(group, p, key):
                    behind += self._started_again(table, i, group, key, given)
        self._put(table, given)
        table.lacking = lacking
        return behind

    def _allocate(
        self, table: Segments, i: int, group: GroupPlan, moves: bool, given: Given
    ) -> bool:
        """Makes what a segment lacks, as far as this step needs it. Returns whether it will lack
        something once it has a gradient."""
        p = table.params[i]
        held = self.of(group, p)

        def give(stream: str, value: Tensor | None) -> None:
            tensor = memory.laid_out(table.memory[i], group.dtype_of(stream, p))
            given[stream][i] = tensor.zero_() if value is None else tensor.copy_(value)

        first = self._rule.streams[0] if self._rule.streams else None
        lacks_kept = len(group.kept) > 0 and first not in held
        lacks_master = group.has_master(p) and MASTER not in held
        if lacks_master and (moves or first in held):
            give(MASTER, local(p).detach())
            lacks_master = False
        lacks_late = any(s in group.kept and s not in held for s in self._rule.late)
        if moves:
            for stream in group.kept:
                if lacks_kept or (stream in self._rule.late and stream not in held):
                    start = None
                    if stream in FROM_THE_WEIGHTS:
                        start = self._weights(p, held, given[MASTER].get(i))
                    give(stream, start)
            if self._rule.counts and (lacks_kept or STEP not in held):
                given[STEP][i] = _count(0.0)
        for key in group.averages:
            if group.has_buffer(p, key) and key not in held and not self._is_lost(group, p, key):
                give(key, local(p).detach())
        return not moves and (lacks_kept or lacks_late or lacks_master)

    def _weights(self, param: Tensor, held: dict[str, Any], made: Tensor | None = None) -> Tensor:
        """What a step finds: the parameter, or its master where nobody has written to it since."""
        return followed(local(held[MASTER]) if MASTER in held else made, local(param).detach())

    def _refresh(self, table: Segments) -> None:
        """What starts as the weights, and was given for a step that was not taken, becomes the
        weights as they are by now."""
        for stream in self._rule.streams[:1]:
            if stream in FROM_THE_WEIGHTS:
                for i, age in enumerate(table.ages):
                    p = table.params[i]
                    held = self.of(self._plan.groups[table.groups[i]], p)
                    if age == 0 and id(local(held.get(stream, p))) in self._made:
                        local(held[stream]).copy_(self._weights(p, held))

    def _started_again(
        self, table: Segments, i: int, group: GroupPlan, key: str, given: Given
    ) -> list[Call]:
        """A lost average is a copy of the weights as the step leaves them."""
        p = table.params[i]
        held = self.of(group, p)
        average = memory.laid_out(table.memory[i], group.dtype_of(key, p))
        master = given[MASTER].get(i, held.get(MASTER))
        weights = local(p if master is None else master).detach()
        return [(average.copy_, weights), (setitem, held, key, beside(average, p))]

    def copies(self, group: GroupPlan, key: str) -> list[Call]:
        """What makes a group's weights one of the averages in buffers that there are of them."""
        calls: list[Call] = []
        for p in group.params:
            held = self.of(group, p)
            if key in held:
                calls.append((local(held[key]).copy_, local(held.get(MASTER, p)).detach()))
        return calls

    def _put(self, table: Segments, given: Given) -> None:
        """Puts what was made into the state, in torch's order, and then into the table."""
        given = {stream: given[stream] for stream in (STEP, *STREAMS) if stream in given}
        for tensors in given.values():
            self._made.update((id(tensor), tensor) for tensor in tensors.values())
        for stream, tensors in given.items():
            for i, tensor in tensors.items():
                p, group = table.params[i], self._plan.groups[table.groups[i]]
                held = self.of(group, p)
                held[stream] = tensor if stream == STEP else beside(tensor, p)
                self._where(group)[p] = held
        for stream, tensors in given.items():
            table.attach(stream, tensors)
        if any(given.values()) or not self.stands(self._state):
            self.look()

    def _is_lost(self, group: GroupPlan, param: Tensor, key: str) -> bool:
        """Whether an average is missing that its group has taken samples of: it starts again, as a
        copy, at the next one. One that is written back at each sample is what the weights are."""
        policy = group.averages[key].policy
        return (
            group.samples(key) > 0
            and group.has_buffer(param, key)
            and policy is not None
            and policy.write_back_every != 1
            and key not in self.of(group, param)
        )

    def untouched(self, tables: Iterable[Segments], *, averages: bool) -> list[Untouched]:
        """Parameters and their streams that `give` has made and no step has followed; with
        averages, before the first step."""
        found = []
        for table in tables:
            # One may be half added.
            for p, age, number in zip(table.params, table.ages, table.groups, strict=False):
                streams = () if age > 0 else (*self._rule.streams, STEP)
                held = self.of(self._plan.groups[number], p)
                for stream in (*streams, *AVERAGES) if averages else streams:
                    tensor = held.get(stream)
                    if isinstance(tensor, Tensor) and id(local(tensor)) in self._made:
                        found.append((p, held, stream))
        return found


def _count(steps: float) -> Tensor:
    """A ``step`` of a parameter's state, which programs read as torch.optim.Adam's."""
    with torch.inference_mode(False):
        return torch.full((), steps, dtype=torch.float32, device="cpu")
