"""Upkeep: the tables of some param groups and what is counted, between steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import setitem
from typing import Protocol

from torch import Tensor

from rbwa_fused import rules
from rbwa_fused.engine import backends, checks, doors
from rbwa_fused.engine.doors import Call
from rbwa_fused.engine.on_device import OnDevice
from rbwa_fused.engine.rows import GroupPlan
from rbwa_fused.engine.state import State
from rbwa_fused.engine.tables import Beside, Counts, Group, Options, Tables

Kept = tuple[GroupPlan, str]  # an average: of a group, and its key in its parameters' state
NONE = Counts()
MIDWAY = "between a backward pass and the step() that ends it (in_backward=True)"


class Swapped(Protocol):
    """Averages that stand in the place of the weights."""

    @property
    def over(self) -> bool:
        """Whether nobody is inside any more, and yet some weights are missing."""

    def refuse(self, what: str) -> None:
        """Raises RuntimeError where this cannot be done now."""

    def restore(self) -> RuntimeError | None:
        """Tries to bring the weights back. Returns the error that says what is missing still."""


class Places(Protocol):
    """What knows the names of some groups' parameters."""

    def heirs(self, groups: Sequence[Group]) -> dict[Tensor, Tensor]:
        """What stands in the places of parameters that are gone."""


class Upkeep:
    """What an engine has: tables, counters, and what forbids a step.

    Attributes:
        tables: of the groups as they were built, or rebuilt, with what is counted.
        device_counters: where the devices count; else None.
        began, builds: the steps that a run had taken when its tables were built or loaded, and how
            often they were.
        swapped: inside averaged(), or after one that could not be undone; else None.
        beside: what is averaged beside the parameters, in the same launch; else None.
        followed: what follows the parameters by their names; else None.
        stepped: the parameters that a backward pass has stepped (in_backward.py), up to the end of
            that step; else None.
    """

    device_counters: OnDevice | None = None
    began = 0
    builds = 0
    swapped: Swapped | None = None
    beside: Beside | None = None
    followed: Places | None = None
    stepped: set[Tensor] | None = None
    _warned = False  # that the reference runs

    def __init__(self, rule: rules.Rule, options: Options, steps: int = 0) -> None:
        self.rule = rule
        self.options = options
        self.tables = Tables(rule, options, {}, steps)

    @property
    def steps(self) -> int:
        """Steps taken so far; where the device counts, as of the last `read_back`."""
        return self.tables.plan.counts[0]

    # ---- tables --------------------------------------------------------------------------------

    def build(
        self,
        groups: Sequence[Group],
        state: State,
        steps: int = 0,
        counts: Sequence[Counts] | None = None,
        *,
        move: bool = False,
        beside: Counts = NONE,
        follows: bool = False,
    ) -> None:
        """Makes the tables anew, for a run that has got so far; where that fails, they are what
        they were. ``beside`` are the samples of what is beside; what only ``follows`` is the same
        run. See Tables.add."""
        tables = Tables(self.rule, self.options, state, steps)
        tables.add(groups, counts, move=move)
        if self.beside is not None:
            self.beside.follow()
            tables.add([self.beside.group], [beside], beside=self.beside)
        self.__dict__.update(tables=tables, device_counters=None)  # both, or neither
        if not follows:
            self.began, self.builds = steps, self.builds + 1
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

    def rebuild(self, groups: Sequence[Group], state: State, *, same: bool = False) -> None:
        """Follows parameters that were converted, groups and state that were replaced.

        Args:
            same: the groups are those that there were, in their order, whatever is in them now.

        Raises:
            ValueError: for averages that were assigned before the first step.
        """
        self.read_back()
        counted = self.counted
        for _, held, stream in self.tables.untouched(averages=not counted):
            held.pop(stream, None)
        if not counted:
            checks.refuse_uncounted(state)
        counts = self.counts(groups, state, same=same) if counted else None
        beside = self.beside_count(state)
        self.build(groups, state, self.steps, counts, beside=beside, follows=True)

    @property
    def counted(self) -> bool:
        """Whether there was a step, or a sample before the first."""
        return self.steps > 0 or any(n > 0 for n in self.tables.plan.counts[1:])

    def starting(self, *, behind: bool = False) -> list[Kept]:
        """The averages that begin with the weights before the step to come
        (``initial="current"`` and ``"now"``), or with those ``behind`` it."""
        waiting = [
            (group, key, sampler.index, sampler.policy.begins)
            for group in self.tables.plan.groups
            for key, sampler in group.averages.items()
            if sampler.policy is not None and sampler.policy.begins < math.inf
        ]
        if not behind and any(group.samples(key) == 0 for group, key, _, _ in waiting):
            self.read_back()  # the host knows no other way where that step is
        counts = self.tables.plan.next_counts if behind else self.tables.plan.counts
        return [
            (group, key)
            for group, key, index, begins in waiting
            if begins <= counts[0] and counts[index] == 0
        ]

    def prepare(self, averages: Sequence[Kept]) -> None:
        """Makes the averages that are missing, before a step that others take. Some of them have
        the weights of now as their first sample."""
        tables = self.tables
        for table, _ in tables.launches:
            tables.state.give(table, [None] * len(table.params))
        doors.in_turn(self.beginning(averages))
        if averages:
            self.device_counters = None  # the next step hands the counters over anew

    def beginning(self, averages: Sequence[Kept]) -> list[Call]:
        """What makes the weights the first sample of these averages, which there are already."""
        tables = self.tables
        calls = [call for group, key in averages for call in tables.state.copies(group, key)]
        indices = dict.fromkeys(group.averages[key].index for group, key in averages)
        return calls + [(setitem, tables.plan.counts, index, 1) for index in indices]

    def refuse_midway(self, what: str) -> None:
        """Raises where a step has begun in the backward pass and not ended."""
        if self.stepped is not None:
            raise RuntimeError(f"{what}() {MIDWAY}")

    # ---- counters ------------------------------------------------------------------------------

    def counts(self, groups: Sequence[Group], state: State, *, same: bool = False) -> list[Counts]:
        """Of each group, as counted for the group that has had its parameters, or its place where
        they are the ``same``. Where the state was cleared, averages in buffers start again."""
        cleared = self.tables.were_cleared(state)
        counts = []
        for i, group in enumerate(groups):
            plan = self.tables.of_groups[i] if same else self.tables.known(group)
            if plan is None:
                counts.append(Counts())
                continue
            starts_again = cleared and any(plan.has_buffer(p) for p in plan.params)
            n_averaged = 0 if starts_again else plan.n_averaged
            further = () if cleared else plan.further_samples
            counts.append(Counts(n_averaged, None if cleared else dict(plan.memory), further))
        return counts

    def beside_count(self, state: State) -> Counts:
        """The samples of what is beside. Where the state of the parameters was cleared, it starts
        again with them."""
        plans = [plan for plan in self.tables.plan.groups if plan.state is not None]
        if not plans or self.tables.were_cleared(state):
            return Counts()
        return Counts(plans[0].n_averaged, None, plans[0].further_samples)

    def read_back(self) -> None:
        """Reads the device's counters, if it counts."""
        if self.device_counters is not None:
            self.device_counters.read_back()

    def waiting(self) -> dict[Tensor, set[str]]:
        """The streams of parameters that were made for a step that was not taken, so far. A state
        dict leaves them out."""
        self.read_back()
        found: dict[Tensor, set[str]] = {}
        for p, _, stream in self.tables.untouched(averages=False):
            found.setdefault(p, set()).add(stream)
        return found
