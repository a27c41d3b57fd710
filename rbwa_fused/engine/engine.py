"""The engine: one pass over memory for the parameters of some param groups.

It owns where parameters and state lie, the rows that the kernels read, the counters and the
launches, and knows no torch.optim. A step is `begin`, `run` for each launch, `end`: `step` does
so for all launches, the step in the backward pass (in_backward.py) for one parameter after the
other. Groups and state are their owner's; the tables hold for as long as those stay what they
were made for, which `describes` says, and `rebuild` makes them anew.

A parameter's first step with momentum passes through these hands: `give_state` gives it a buffer
and points its segment at the group's first-step row, the kernel runs, `finish` points it back.
A segment that is to have momentum or a master but has had no gradient yet waits in
`Segments.lacking`. Where the device counts, its `marks` say all this instead (counters.py).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rbwa_fused import rules
from rbwa_fused.engine import backends, checks, memory
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.rows import GroupPlan, Plan
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import local, shard_of
from rbwa_fused.streams import STREAMS

Group = dict[str, Any]
State = MutableMapping[Tensor, Any]
Grads = list[Tensor | None]
Launch = tuple[Segments, backends.Backend]


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
        steps: taken so far; where the device counts, as of the last `read_back`.
        groups: what belongs to each param group beside its hyperparameters.
        launches: the tables of segments and their backends, in the order of their launches.
        alone: the parameters that share memory with no other.
        backend: the name of what runs.
        device_counters: of each device, where the host does not count; else None.
        swapped: inside averaged(), or after one that could not be undone; else None.
    """

    steps = 0
    backend = ""
    device_counters: dict[torch.device, DeviceCounters] | None = None
    swapped: Swapped | None = None
    _warned = False  # that the reference runs

    def __init__(self, rule: rules.Rule, options: Options) -> None:
        self.rule = rule
        self.options = options
        self.launches: list[Launch] = []
        self.alone: set[Tensor] = set()
        self._plan = Plan(rule, options.master_weights)
        self._tables: dict[tuple[torch.device, int], Segments] = {}
        self._state: State = {}
        self._size = 0  # of the state

    @property
    def groups(self) -> list[GroupPlan]:
        return self._plan.groups

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The coefficient tables, `rows` and `samplings`."""
        return self._plan.tensors

    # ---- tables --------------------------------------------------------------------------------

    # dynamo cannot follow a table's making; torch hides its own `add_param_group` from it, too.
    @torch._disable_dynamo
    def build(
        self,
        groups: Sequence[Group],
        state: State,
        counts: Sequence[Counts] | None = None,
        *,
        move: bool = False,
    ) -> None:
        """Makes tables and rows anew and takes over the state that there is.

        Args:
            counts: of each group (default: nothing is counted so far).
            move: parameters on the CPU into flat buffers, where their memory is theirs.
        """
        self._plan = Plan(self.rule, self.options.master_weights)
        self.device_counters = None
        self._tables = {}
        self._state = state
        self.add(groups, counts, move=move)

    @torch._disable_dynamo
    def add(
        self,
        groups: Sequence[Group],
        counts: Sequence[Counts] | None = None,
        *,
        move: bool = False,
    ) -> None:
        """Adds groups to the tables. See `build`."""
        plan, options = self._plan, self.options
        known = [p for table in self._tables.values() for p in table.params]
        known_turns = [turn for (_, turn), table in self._tables.items() for _ in table.params]
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
                table = self._tables.setdefault((p.device, turn_of[p]), Segments())
                row, sampling = group_plan.row(first=False), group_plan.sampling(p)
                table.add(p, group_plan.index, index, row, sampling)
        self.backend = backends.choose(options.backend, torch.device("cpu")).name if not new else ""
        self.launches = []
        for (device, _), table in self._tables.items():  # each turn's is made after those before it
            backend = backends.choose(options.backend, device)
            self.backend = backend.name
            self.launches.append((table, backend))
            if self.backend == "reference" and options.backend == "auto" and not self._warned:
                self._warned = True
                backends.warn_of_reference(device)
            self._take_over_state(table, set(new))
        custom = any(p.policy is not None and p.policy.custom for p in plan.groups)
        self._device_may_count = not custom and all(
            backend.advance is not None for _, backend in self.launches
        )
        self._kernels_check = all(backend.checks for _, backend in self.launches)
        plan.state_is_due = True
        self._size = len(self._state)

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
            for held in state.values():  # all steps so far were skipped
                held.pop("average", None)
        if counts is None:
            counts = self.counts(groups, state)
        for p in waiting:
            for stream in self.rule.streams:
                state.get(p, {}).pop(stream, None)
        self.build(groups, state, counts)

    def restart(
        self, groups: Sequence[Group], state: State, steps: int, counts: Sequence[Counts]
    ) -> None:
        """Goes on with another run's state and counts, whoever has counted here so far."""
        self.device_counters = None
        self.steps = steps
        self.build(groups, state, counts)

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
        plans = self._plan.groups
        return len(plans) == len(groups) and all(map(GroupPlan.describes, plans, groups))

    def follows(self, state: State) -> bool:
        """Whether the state has as many parameters as it had, in the same mapping."""
        return state is self._state and len(state) == self._size

    def _take_over_state(self, table: Segments, new: set[Tensor]) -> None:
        for stream in STREAMS:
            values: dict[int, Tensor | None] = {}
            for i, p in enumerate(table.params):
                held = self._state.get(p, {}) if p in new else {}
                group = self._plan.groups[table.groups[i]]
                gone = {"average": not group.has_buffer(p), "master_param": not group.has_master(p)}
                if gone.get(stream):
                    held.pop(stream, None)  # after model.float() a parameter needs no master
                if held.get(stream) is not None:
                    values[i] = shard_of(held[stream], p)
            self._attach(table, stream, values)

    def _attach(self, table: Segments, stream: str, values: dict[int, Tensor | None]) -> None:
        groups = self._plan.groups
        dtypes = {i: groups[table.groups[i]].dtype_of(stream, table.params[i]) for i in values}
        for i, view in table.attach(stream, values, dtypes).items():
            self._state[table.params[i]][stream] = view

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
        if not self.describes(groups, state):
            return False
        plan = self._plan
        gathered: list[tuple[Launch, Grads]] = []
        absent = present = negated = False
        if len(self.launches) > 1:
            plan.state_is_due = True
        for launch in self.launches:
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
            self._device_may_count and (self.options.capturable or found_inf is not None)
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
        if plan.state_is_due or negated or not self._kernels_check:
            if not all(self.fit(table, grads) for (table, _), grads in gathered):
                return False
            for (table, _), grads in gathered:
                self.give_state(table, grads)
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
        self._plan.sample(self.steps + 1)
        self._plan.update(scale)

    def end(self) -> None:
        """Counts the step that was taken."""
        self.steps += 1
        self._plan.commit()

    @property
    def state_is_due(self) -> bool:
        """Whether some parameter may still need a state tensor; see Plan."""
        return self._plan.state_is_due

    def all_state_given(self) -> None:
        """Says that `give_state` has looked at every parameter."""
        self._plan.state_is_due = False

    def fit(self, table: Segments, grads: Grads) -> bool:
        """Checks gradients in full; see checks.fit."""
        return checks.fit(table, grads, [plan.group for plan in self._plan.groups])

    def give_state(self, table: Segments, grads: Grads) -> None:
        """Gives parameters the state they come to need; momentum's absence marks its first step."""
        averages: dict[int, Tensor | None] = {}
        masters: dict[int, Tensor | None] = {}
        momentum: dict[int, Tensor | None] = {}
        table.lacking = []
        for i, p in enumerate(table.params):
            group = self._plan.groups[table.groups[i]]
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
                if self.device_counters is None:  # else its mark says it
                    table.set_row(i, group.row(first=True))
                    table.first.append(i)
                if self.rule.constant_momentum:
                    group.beta = float(group.group["momentum"])
        self._attach(table, "average", averages)
        self._attach(table, "master_param", masters)
        for stream in self.rule.streams:
            self._attach(table, stream, momentum)
        self._size = len(self._state)

    def run(self, launch: Launch, grads: Grads, counters: DeviceCounters | None = None) -> bool:
        """Steps one table. False, with nothing changed, where a parameter was converted."""
        table, backend = launch
        if table.copies and not all(map(table.fits, range(len(table.params)))):
            return False  # the kernel would see the copy alone, in its old dtype
        for param, copy in table.copies:
            copy.copy_(param)
        tables = (table.memory, grads, table.state, *table.tensors(), *self._plan.tensors)
        try:
            backend.step(*tables, deferred=counters)
        except RuntimeError:
            refused = grads.copy()
            if not self.fit(table, grads):  # or it says what is wrong
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
        groups = self._plan.groups
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
            advance = next(b.advance for t, b in self.launches if t.params[0].device == device)
            assert advance is not None
            advance(counters)
        return True

    def finish(self, table: Segments, grads: Grads, absent: bool, scale: float = 1.0) -> None:
        """Behind a launch: first-step rows, versions, unscaled gradients.

        Args:
            absent: whether some gradient is None.
            scale: what gradients are divided by, as GradScaler wants to find them.
        """
        for i in table.first:
            group = self._plan.groups[table.groups[i]]
            table.set_row(i, group.row(first=False))
        table.first = []
        written = table.params
        if absent:
            written = [
                p
                for p, g, group in zip(written, grads, table.groups, strict=True)
                if g is not None or self._writes_back(self._plan.groups[group], p)
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
        cleared = not state and self._size > 0
        counts = []
        for group in groups:
            plan = self.known(group)
            if plan is None:
                counts.append(Counts())
                continue
            starts_again = cleared and any(plan.has_buffer(p) for p in plan.params)
            n_averaged = 0 if starts_again else plan.n_averaged
            counts.append(Counts(n_averaged, None if cleared else plan.beta))
        return counts

    def known(self, group: Group) -> GroupPlan | None:
        """What belongs to the group that has had a parameter of this one."""
        plan_of = {p: plan for plan in self._plan.groups for p in plan.params}
        return next((plan_of[p] for p in group["params"] if p in plan_of), None)

    def read_back(self) -> list[Tensor]:
        """Reads the device's counters, if it counts. Returns parameters whose momentum buffers have
        not had their first step, since all steps so far were skipped."""
        if self.device_counters is None:
            return []
        counters = next(iter(self.device_counters.values()))
        self.steps, *samples = counters.counts.tolist()
        for sampler, n_averaged in zip(self._plan.samplers, samples, strict=True):
            sampler.n_averaged = n_averaged
        waiting = []
        marks = {device: d.marks[:, 0].tolist() for device, d in self.device_counters.items()}
        for table, _ in self.launches:
            for p in table.params:
                # No kernel marks what is empty; but before the first step nothing can have started.
                if not marks[p.device].pop(0) and (local(p).numel() > 0 or self.steps == 0):
                    waiting.append(p)
        return waiting

    def _count_on_device(self) -> dict[torch.device, DeviceCounters]:
        """Hands the counters over to the devices, for as long as the tables stay as they are."""
        plan = self._plan
        plan.sample(self.steps + 1)
        started: dict[torch.device, list[bool]] = {}
        for table, _ in self.launches:
            started.setdefault(table.params[0].device, []).extend(
                "momentum_buffer" in self._state.get(p, {}) for p in table.params
            )
        samplings = plan.tensors[1]
        return {
            device: DeviceCounters.of(plan.samplers, samplings, self.steps, marks, device)
            for device, marks in started.items()
        }
