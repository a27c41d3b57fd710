"""The engine: one pass over memory for the parameters of some param groups.

It owns the tables that the kernels read, the counters and the launches, and knows no torch.optim.
A step is `begin`, `run` for each launch, `end`: `step` does so for all launches, the step in the
backward pass (in_backward.py) for one parameter after the other. Groups and state are their
owner's, who hands them over at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rbwa_fused import rules
from rbwa_fused.engine import backends, checks
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.rows import GroupPlan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import local
from rbwa_fused.engine.tables import Counts, Grads, Group, Launch, Options, State, Tables


class Swapped(Protocol):
    """Averages that stand in the place of the weights."""

    over: bool  # and yet some weights are missing

    def refuse(self, what: str) -> None:
        """Raises RuntimeError: this cannot be done now."""

    def restore(self) -> RuntimeError | None:
        """Tries to bring the weights back. Returns the error that says what is missing still."""


class Engine:
    """Steps and averages the parameters of some groups.

    Attributes:
        tables: of the groups as they were built, or rebuilt.
        steps: taken so far; where the device counts, as of the last `read_back`.
        device_counters: of each device, where the host does not count; else None.
        swapped: inside averaged(), or after one that could not be undone; else None.
    """

    steps = 0
    device_counters: dict[torch.device, DeviceCounters] | None = None
    swapped: Swapped | None = None
    _warned = False  # that the reference runs

    def __init__(self, rule: rules.Rule, options: Options) -> None:
        self.rule = rule
        self.options = options
        self.tables = Tables(rule, options, {})

    # ---- tables --------------------------------------------------------------------------------

    def build(
        self,
        groups: Sequence[Group],
        state: State,
        counts: Sequence[Counts] | None = None,
        *,
        move: bool = False,
    ) -> None:
        """Makes the tables anew; where that fails, they are what they were. See Tables.add."""
        tables = Tables(self.rule, self.options, state)
        tables.add(groups, counts, move=move)
        self.tables, self.device_counters = tables, None
        self._warn_of_reference()

    def add(self, groups: Sequence[Group], *, move: bool = False) -> None:
        """Adds groups to the tables. See Tables.add."""
        self.tables.add(groups, move=move)
        self._warn_of_reference()

    def _warn_of_reference(self) -> None:
        if self.options.backend != "auto" or self._warned:
            return
        for table, backend in self.tables.launches:
            if backend.name == "reference":
                self._warned = True
                backends.warn_of_reference(table.params[0].device)
                return

    def rebuild(
        self, groups: Sequence[Group], state: State, counts: Sequence[Counts] | None = None
    ) -> None:
        """Follows parameters that were converted, groups and state that were replaced.

        Args:
            counts: of each group (default: what this engine has counted).

        Raises:
            ValueError: for averages that were assigned before the first step.
        """
        waiting = self.read_back()
        if counts is None and self.steps == 0:
            if self.device_counters is None:
                checks.refuse_uncounted(state)
            for held in filter(None, state.values()):  # all steps so far were skipped
                held.pop("average", None)
        if counts is None:
            counts = self.counts(groups, state)
        for p in waiting:
            for stream in self.rule.streams:
                (state.get(p) or {}).pop(stream, None)
        self.build(groups, state, counts)

    def restart(
        self, groups: Sequence[Group], state: State, steps: int, counts: Sequence[Counts]
    ) -> None:
        """Goes on with another run's state and counts, whoever has counted here so far."""
        self.device_counters = None
        self.steps = steps
        self.build(groups, state, counts)

    # ---- the step ------------------------------------------------------------------------------

    def step(
        self,
        groups: Sequence[Group],
        state: State,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> bool:
        """Takes a step with the gradients that the parameters have.

        Args:
            grad_scale, found_inf: GradScaler's, of one element: the gradients' scale, and whether
                the step is to be skipped.

        Returns:
            False, with nothing changed, where the tables must be rebuilt first.
        """
        tables = self.tables
        if not tables.describes(groups, state):
            return False
        plan, launches = tables.plan, tables.launches
        gathered: list[tuple[Launch, Grads]] = []
        absent = present = negated = False
        if len(launches) > 1:
            plan.state_is_due = True
        for launch in launches:
            table = launch[0]
            grads, some_absent, some_present, some_negated = (
                backends.described(table.gradients())
                if table.shards
                else backends.gradients(table.params)
            )
            absent = absent or some_absent
            present = present or some_present
            negated = negated or some_negated
            if table.lacking and any(grads[i] is not None for i in table.lacking):
                plan.state_is_due = True
            gathered.append((launch, grads))
        if not present:
            return True
        deferring = self.device_counters is not None or (
            tables.device_may_count and (self.options.capturable or found_inf is not None)
        )
        scale = 1.0
        if deferring:
            plan.update(scale, lr_on_device=self.options.capturable)
            if self.device_counters is None:
                self.device_counters = self._count_on_device()
        elif found_inf is not None and found_inf.item() != 0:
            return True
        else:
            scale = 1.0 if grad_scale is None else float(grad_scale.item())
            self.begin(scale)
        if plan.state_is_due or negated or not tables.kernels_check:
            if not all(tables.fit(table, grads) for (table, _), grads in gathered):
                return False
            for (table, _), grads in gathered:
                tables.give_state(table, grads, marked=deferring)
            plan.state_is_due = False
        if deferring:
            if not self._run_on_device(gathered, grad_scale, found_inf):
                return False
        else:
            for launch, grads in gathered:
                if not self.run(launch, grads):
                    return False
            self.end()
        for (table, _), grads in gathered:
            self.finish(table, grads, absent, scale)
        return True

    def begin(self, scale: float = 1.0) -> None:
        """Brings the rows up to date for the step to come; gradients are ``scale`` times theirs."""
        plan = self.tables.plan
        plan.sample(self.steps + 1)
        plan.update(scale)

    def end(self) -> None:
        """Counts the step that was taken."""
        self.steps += 1
        self.tables.plan.commit()

    def run(self, launch: Launch, grads: Grads, counters: DeviceCounters | None = None) -> bool:
        """Steps one table. False, with nothing changed, where a parameter was converted."""
        table, backend = launch
        if table.copies and not all(map(table.fits, range(len(table.params)))):
            return False  # the kernel would see the copy alone, in its old dtype
        for param, copy in table.copies:
            copy.copy_(param)
        tables = (table.memory, grads, table.state, *table.tensors(), *self.tables.plan.tensors)
        try:
            backend.step(*tables, deferred=counters)
        except RuntimeError:
            refused = grads.copy()
            if not self.tables.fit(table, grads):  # or it says what is wrong
                return False
            if all(map(is_, grads, refused)):
                raise  # what fitted was launched, perhaps in part: a second step would be one more
            backend.step(*tables, deferred=counters)
        for param, copy in table.copies:
            param.copy_(copy)
        return True

    def _run_on_device(
        self,
        gathered: list[tuple[Launch, Grads]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """Steps all tables and lets each device count, or not: nothing waits for it here."""
        assert self.device_counters is not None
        groups = self.tables.plan.groups
        lrs: list[Tensor | None] = [None] * len(groups)
        if self.options.capturable:
            lrs = [rules.lr_on_device(group.group) for group in groups]
        first = dict.fromkeys(self.device_counters, 0)  # segment of a device's next table
        counting = {}
        for device, counters in self.device_counters.items():
            counting[device] = counters.for_step(lrs, grad_scale, found_inf)
        for launch, grads in gathered:
            table = launch[0]
            device, count = table.params[0].device, len(table.params)
            own = counting[device].of_segments(first[device], count)
            first[device] += count
            if not self.run(launch, grads, own):
                return False
            for p, g in zip(table.params, grads, strict=True):
                if grad_scale is not None and g is not None and p.grad is not None:
                    unscaled = local(p.grad)
                    if g is not unscaled:  # but a copy of the parameter's layout
                        unscaled.copy_(g)
        for device, counters in counting.items():
            advance = next(
                b.advance for t, b in self.tables.launches if t.params[0].device == device
            )
            assert advance is not None
            advance(counters)
        return True

    def finish(self, table: Segments, grads: Grads, absent: bool, scale: float = 1.0) -> None:
        """Behind a launch: first-step rows, versions, unscaled gradients.

        Args:
            absent: whether some gradient is None.
            scale: what gradients are divided by, as GradScaler wants to find them.
        """
        self.tables.first_steps_taken(table)
        groups = self.tables.plan.groups
        written = table.params
        if absent:
            written = [
                p
                for p, g, group in zip(written, grads, table.groups, strict=True)
                if g is not None or self._writes_back(groups[group], p)
            ]
        increment_version(written)
        if scale != 1.0:
            # A tensor: a number would be rounded to 16 bits before it multiplies 16-bit gradients.
            inverse = torch.tensor(1.0 / scale, dtype=torch.float64, device="cpu")
            for p in written:
                if p.grad is not None:
                    (p.grad if p.grad.dim() > 0 else p.grad.view(1)).mul_(inverse)

    def _writes_back(self, group: GroupPlan, param: Tensor) -> bool:
        """Whether this step may write the average to a parameter that has no gradient."""
        if self.device_counters is not None:
            return group.policy is not None and group.policy.write_back_every > 0
        return group.sampler.written_back and group.has_buffer(param)

    def refuse_inside_averaged(self, what: str) -> None:
        """Raises where the weights are not the training weights."""
        if self.swapped is not None:
            self.swapped.refuse(what)

    # ---- counters ------------------------------------------------------------------------------

    def counts(self, groups: Sequence[Group], state: State) -> list[Counts]:
        """Of each group, as counted for the group that has had its parameters. Where the state was
        cleared, averages in buffers start again."""
        cleared = self.tables.were_cleared(state)
        counts = []
        for group in groups:
            plan = self.tables.known(group)
            if plan is None:
                counts.append(Counts())
                continue
            starts_again = cleared and any(plan.has_buffer(p) for p in plan.params)
            n_averaged = 0 if starts_again else plan.n_averaged
            counts.append(Counts(n_averaged, None if cleared else plan.beta))
        return counts

    def read_back(self) -> list[Tensor]:
        """Reads the device's counters, if it counts. Returns parameters whose momentum buffers have
        not had their first step, since all steps so far were skipped."""
        if self.device_counters is None:
            return []
        counters = next(iter(self.device_counters.values()))
        self.steps, *samples = counters.counts.tolist()
        for sampler, n_averaged in zip(self.tables.plan.samplers, samples, strict=True):
            sampler.n_averaged = n_averaged
        waiting = []
        marks = {device: d.marks[:, 0].tolist() for device, d in self.device_counters.items()}
        for table, _ in self.tables.launches:
            for p in table.params:
                # No kernel marks what is empty; but before the first step nothing can have started.
                if not marks[p.device].pop(0) and (local(p).numel() > 0 or self.steps == 0):
                    waiting.append(p)
        return waiting

    def _count_on_device(self) -> dict[torch.device, DeviceCounters]:
        """Hands the counters over to the devices, for as long as the tables stay as they are."""
        plan = self.tables.plan
        plan.sample(self.steps + 1)
        started: dict[torch.device, list[bool]] = {}
        for table, _ in self.tables.launches:
            started.setdefault(table.params[0].device, []).extend(
                self.tables.holds("momentum_buffer", p) for p in table.params
            )
        samplings = plan.tensors[1]
        return {
            device: DeviceCounters.of(plan.samplers, samplings, self.steps, marks, device)
            for device, marks in started.items()
        }
