"""The engine: one pass over memory for the parameters of some param groups.

It owns the tables that the kernels read and the counters (upkeep.py), makes the launches, and knows
no torch.optim. A step begins with `begin`, which brings the rows up to date. `launch`, `finish` and
`end` say what is to be done, and `run` does it: `step` for all launches at once, the step in the
backward pass (in_backward.py) for one parameter after the other. Groups and state are their
owner's, who hands them over at each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from operator import is_, setitem

import torch
from torch import Tensor

from rbwa_fused.engine import checks, doors
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.doors import Call, Grads
from rbwa_fused.engine.on_device import OnDevice
from rbwa_fused.engine.rows import GroupPlan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.state import State
from rbwa_fused.engine.tables import Group, Served
from rbwa_fused.engine.upkeep import Upkeep

ALL = slice(None)


class Engine(Upkeep):
    """Steps and averages the parameters of some groups."""

    def step(
        self,
        groups: Sequence[Group],
        state: State,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip: Tensor | None = None,
        after: Sequence[Call] = (),
    ) -> bool:
        """Takes a step with the gradients that the parameters have.

        Args:
            grad_scale, found_inf: GradScaler's, of one element: the gradients' scale, and whether
                the step is to be skipped.
            clip: a float64 that multiplies the gradients; not together with a scale.
            after: what is to be done together with the step, or not at all.

        Returns:
            False, with nothing changed, where the tables must be rebuilt first.
        """
        tables = self.tables
        if not tables.describes(groups, state):
            return False
        plan, launches = tables.plan, tables.launches
        gathered: list[tuple[Served, Grads]] = []
        absent = present = negated = False
        if len(launches) > 1:
            plan.state_is_due = True
        for launch in launches:
            table = launch[0]
            grads, some_absent, some_present, some_negated = (
                doors.described(table.gradients())
                if table.shards
                else doors.gradients(table.stepped)
            )
            absent = absent or some_absent
            present = present or some_present
            negated = negated or some_negated
            if table.lacking and any(grads[i] is not None for i in table.lacking):
                plan.state_is_due = True
            gathered.append((launch, grads))
        if not present:
            return True
        return self._take(gathered, absent, negated, grad_scale, found_inf, after, clip=clip)

    def sample(
        self,
        groups: Sequence[Group],
        state: State,
        found_inf: Tensor | None = None,
        after: Sequence[Call] = (),
        *,
        unseen: bool = False,
    ) -> bool:
        """Counts a step that somebody else has taken; the averages sample the weights as they are.

        Args:
            after: what is to be done together with it, or not at all.
            unseen: nobody will see the weights before the next step: averages that begin with them
                take them now.

        Returns:
            False, with nothing changed, where the tables must be rebuilt first.
        """
        if not self.tables.describes(groups, state):
            return False
        if unseen and self.device_counters is not None:
            self.read_back()  # the host counts again: no scaler skips these steps
            self.device_counters = None
        gathered: list[tuple[Served, Grads]] = [
            (launch, [None] * len(launch[0].params)) for launch in self.tables.launches
        ]
        return self._take(gathered, True, False, None, found_inf, after, unseen)

    def _take(
        self,
        gathered: Sequence[tuple[Served, Grads]],
        absent: bool,
        negated: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        after: Sequence[Call] = (),
        unseen: bool = False,
        clip: Tensor | None = None,
    ) -> bool:
        """`step`, or `sample`, with gradients that were gathered."""
        tables, plan = self.tables, self.tables.plan
        on_device = not tables.state.lost and (
            self.device_counters is not None
            or (tables.device_may_count and (self.options.capturable or found_inf is not None))
        )
        scale = 1.0
        if on_device:
            plan.update(scale, on_device=True, lr_on_device=self.options.capturable)
            if self.device_counters is None:
                self.device_counters = OnDevice(tables)
        elif found_inf is not None and found_inf.item() != 0:
            return True
        else:
            scale = 1.0 if grad_scale is None else float(grad_scale.item())
            self.begin(scale)
        behind: list[Call] = []
        if plan.state_is_due or negated or not tables.kernels_check:
            if not all(tables.fit(table, grads) for (table, _), grads in gathered):
                return False
            for (table, _), grads in gathered:
                behind += tables.state.give(table, grads, on_device=on_device)
            behind.append((setattr, plan, "state_is_due", tables.state.lost))
        calls: list[Call] = []
        moved: set[int] = set()
        if tables.scheduled:
            moved = {
                number
                for (table, _), grads in gathered
                for number, g in zip(table.groups, grads, strict=True)
                if g is not None
            }
        if self.device_counters is not None and on_device:
            told = self.options.capturable, grad_scale, found_inf, moved
            launching = self.launch if clip is None else partial(self.launch, clip=clip)
            calls += self.device_counters.calls(gathered, launching, *told)
        else:
            for launch, grads in gathered:
                calls += self.launch(launch, grads, clip=clip)
            calls.append(self.end())
            if tables.scheduled:
                calls += self.moved(moved)
        for (table, _), grads in gathered:
            calls += self.finish(table, grads, absent, scale)
        if unseen:
            behind += self.beginning(self.starting(behind=True))
        return self.run(gathered, [*calls, *behind, *after])

    def begin(self, scale: float = 1.0) -> None:
        """Brings the rows up to date for the step to come; gradients are ``scale`` times theirs.

        Raises:
            RuntimeError: for what the host counts, an average or a rule's steps, while a CUDA graph
                is captured.
        """
        plan = self.tables.plan
        if self.tables.scheduled:
            checks.captured("step() of a schedule-free optimizer", "capturable=True")
        if self.tables.averages and plan.rule.moves:
            checks.captured("step() of an average", "capturable=True")
        plan.sample()
        plan.update(scale)

    def launch(
        self,
        launch: Served,
        grads: Grads,
        counters: DeviceCounters | None = None,
        clip: Tensor | None = None,
    ) -> list[Call]:
        """What steps one table."""
        table, backend = launch
        tables = table.table(*self.tables.plan.tensors)
        if clip is None:
            call = backend.call(table.memory, grads, tables, counters)
        else:
            clip = clip.to(table.params[0].device)
            call = backend.call(table.memory, grads, tables, counters, clip)
        if not table.copies:
            return [call]
        before = [(copy.copy_, param) for param, copy in table.copies]
        return [*before, call, *((param.copy_, copy) for param, copy in table.copies)]

    def end(self) -> Call:
        """What counts the step."""
        plan = self.tables.plan
        return setitem, plan.counts, ALL, plan.next_counts

    def moved(self, groups: Iterable[int]) -> list[Call]:
        """What leaves in groups whose parameters have moved what their rule counts there."""
        plans = self.tables.plan.groups
        return [(plans[i].group.update, plans[i].left) for i in groups]

    def run(self, gathered: Sequence[tuple[Served, Grads]], calls: list[Call]) -> bool:
        """Makes the calls, the launches first. False, with nothing changed, where a parameter was
        converted."""
        for (table, _), _ in gathered:
            if table.copies and not all(map(table.fits, range(len(table.params)))):
                return False  # the kernel would see the copy alone, in its old dtype
        try:
            doors.in_turn(calls)
        except RuntimeError:
            refused = [grads.copy() for _, grads in gathered]
            if not all(self.tables.fit(table, grads) for (table, _), grads in gathered):
                return False  # or it says what is wrong
            if all(all(map(is_, g, r)) for (_, g), r in zip(gathered, refused, strict=True)):
                raise  # what fitted was launched, perhaps in part: a second step would be one more
            doors.in_turn(calls)
        return True

    def finish(self, table: Segments, grads: Grads, absent: bool, scale: float = 1.0) -> list[Call]:
        """What comes behind a launch: versions, unscaled gradients.

        Args:
            absent: whether some gradient is None.
            scale: what gradients are divided by, as GradScaler wants to find them.
        """
        groups = self.tables.plan.groups
        written = table.params
        if absent:
            written = [
                p
                for p, g, group in zip(written, grads, table.groups, strict=True)
                if g is not None or self._writes_back(groups[group], p)
            ]
        calls: list[Call] = [(torch._C._increment_version, written)]
        if scale != 1.0:
            # A tensor: a number would be rounded to 16 bits before it multiplies 16-bit gradients.
            inverse = torch.tensor(1.0 / scale, dtype=torch.float64, device="cpu")
            for p, g in zip(table.params, grads, strict=True):
                if g is not None and p.grad is not None:
                    grad = p.grad if p.grad.dim() > 0 else p.grad.view(1)
                    calls.append((grad.mul_, inverse))
        return calls

    def _writes_back(self, group: GroupPlan, param: Tensor) -> bool:
        """Whether this step may write the average to a parameter that has no gradient."""
        if self.device_counters is not None:
            return group.policy is not None and group.policy.write_back_every > 0
        return group.sampler.written_back and group.has_buffer(param)

    def refuse_inside_averaged(self, what: str) -> None:
        """Raises inside averaged(), and after one that could not bring back all weights."""
        if self.swapped is not None:
            self.swapped.refuse(what)
