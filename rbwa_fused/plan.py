"""The coefficient table: what each param group's rows say at a step.

A row changes for two reasons: a hyperparameter did (seldom), or the average takes its sample with
another weight (at every step of a mean). Its two halves are packed on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rbwa_fused import rules
from rbwa_fused.average import Average, weight_of

Group = dict[str, Any]

# Each group has the usual row and that of a parameter's first step with momentum, for averages
# with a buffer and for averages that are the parameter itself.
ROWS_PER_GROUP = 4


class GroupPlan:
    """What belongs to a param group beside its hyperparameters."""

    def __init__(self, group: Group, index: int) -> None:
        self.group = group
        self.index = index
        self.policy: Average | None = group["average"]
        self.n_averaged = 0
        self.beta: float | None = None  # of implicit RSGDM, fixed at the group's first step
        self.has_momentum = False
        self.takes_current = False  # this step starts the average at the weights before it
        self.written_back = False  # this step writes the average into the weights
        self._elisions = sorted({self.elided(p) for p in group["params"]})
        self._next_n_averaged = 0
        self._lr = 0.0
        self._rule_inputs: tuple[Any, ...] | None = None  # what the rows hold
        self._sampling: tuple[float, bool, bool] | None = None

    def elided(self, param: Tensor) -> bool:
        """Whether the average of a parameter is the parameter itself."""
        return self.policy is not None and self.policy.elided_for(param.dtype)

    def buffered(self, param: Tensor) -> bool:
        """Whether a parameter has an average in a buffer of its own."""
        return self.policy is not None and not self.policy.elided_for(param.dtype)

    def row(self, param: Tensor, first: bool) -> int:
        """The row of a parameter, at its first step with momentum or later."""
        return ROWS_PER_GROUP * self.index + 2 * self.elided(param) + first


class Plan:
    """The rows of all groups, and the groups' counters.

    Args:
        rule: hyperparameters to coefficients (rules.py).
        check: raises for hyperparameters out of range.
        inputs: those hyperparameters of a group that go into its rows.

    Attributes:
        starting: a step is due that looks at every parameter, to give it the state that it comes
            to need. It stays so until whoever gives state has done it, whatever fails before.
    """

    def __init__(
        self,
        rule: rules.Rule,
        check: Callable[[Group], None],
        inputs: Callable[[Group], tuple[Any, ...]],
    ) -> None:
        self.groups: list[GroupPlan] = []
        self.rows = torch.empty(0, dtype=torch.float64)
        self.starting = True
        self._bytes = bytearray()
        self._rule = rule
        self._check = check
        self._inputs = inputs

    def add(self, group: Group) -> GroupPlan:
        """Appends a group's rows."""
        plan = GroupPlan(group, len(self.groups))
        self.groups.append(plan)
        self._bytes = self._bytes + bytearray(ROWS_PER_GROUP * rules.ROW_BYTES)
        rows = torch.frombuffer(self._bytes, dtype=torch.float64)
        self.rows = rows.reshape(-1, rules.ROW_BYTES // 8)
        return plan

    def update(self, step: int, scale: float) -> None:
        """Brings the rows up to date for a step; `scale` is the loss scale under AMP, else 1.

        Rows of a first step with momentum are kept only while `starting`, which is set here where a
        momentum was switched on or off, or an average starts.
        """
        for plan in self.groups:
            policy = plan.policy
            if plan.group["average"] is not policy:
                raise ValueError(
                    f"Invalid average: {plan.group['average']!r} was assigned to a group that was "
                    f"added with {policy!r}"
                )
            n = plan.n_averaged
            w, sample, write_back = 1.0, False, False
            plan.takes_current = False
            if policy is not None and step > policy.start:
                if n == 0 and policy.initial == "current":
                    plan.takes_current = self.starting = True
                    n = 1
                if policy.due(step):
                    sample = True
                    w = weight_of(policy.weight, n, step)
                    write_back = policy.written_back(step)
                    n += 1
            plan._next_n_averaged = n
            plan.written_back = write_back
            inputs = (*self._inputs(plan.group), scale, self.starting)
            try:
                changed = inputs != plan._rule_inputs
            except RuntimeError:  # a tensor of several elements; the check will say so
                changed = True
            if changed:
                self._pack_rule(plan, inputs)
            sampling = (w, sample, write_back)
            if sampling != plan._sampling:
                self._pack_sampling(plan, sampling)

    def commit(self) -> None:
        """Counts the samples of the step that `update` prepared."""
        for plan in self.groups:
            plan.n_averaged = plan._next_n_averaged

    def _pack_rule(self, plan: GroupPlan, inputs: tuple[Any, ...]) -> None:
        """Lines (1)-(3)."""
        *hyperparameters, scale, starting = inputs
        group = plan.group
        self._check(group)
        momentum = float(group["momentum"])
        if plan.beta is not None and momentum != plan.beta:
            raise ValueError(
                f"Invalid momentum value: {momentum} (implicit RSGDM holds for a constant momentum "
                f'only, and this group started with {plan.beta}; use difference="explicit")'
            )
        if plan.has_momentum != (momentum != 0.0):
            plan.has_momentum = momentum != 0.0
            self.starting = starting = True
        plan._lr = float(group["lr"])
        s = (-1.0 if group["maximize"] else 1.0) / scale
        decay = float(group["weight_decay"])
        for first in (False, True) if starting else (False,):
            coefficients = self._rule(group, first)
            for elided in plan._elisions:
                row = ROWS_PER_GROUP * plan.index + 2 * elided + first
                rules.RULE.pack_into(self._bytes, row * rules.ROW_BYTES, s, decay, *coefficients)
        # A tensor may change its value in place: such rows are packed at every step.
        changes = any(isinstance(value, Tensor) for value in hyperparameters)
        plan._rule_inputs = None if changes else inputs
        plan._sampling = None

    def _pack_sampling(self, plan: GroupPlan, sampling: tuple[float, bool, bool]) -> None:
        """The learning rate and lines (4)-(5). Where the average is the parameter itself, the
        sample's weight multiplies the learning rate and that is all (docs/equivalences.md)."""
        w, sample, write_back = sampling
        for elided in plan._elisions:
            tail = (plan._lr * w, 1.0, 0.0, 0.0) if elided else (plan._lr, w, sample, write_back)
            for first in (0, 1):
                row = ROWS_PER_GROUP * plan.index + 2 * elided + first
                at = row * rules.ROW_BYTES + rules.RULE.size
                rules.SAMPLING.pack_into(self._bytes, at, *tail)
        plan._sampling = sampling
