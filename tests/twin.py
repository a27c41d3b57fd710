"""A second optimizer, in float64: rules as rules.py has them, averages as README.md prints them.

One parameter at a time; nothing is shared with rbwa_fused but the policies' fields, and weights
that have literal loops of their own (averages/test_weights.py). bounds.py says how far the kernels
may be from it, agreement.py compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bounds import F32, F64, Value
from rules import NOT_STARTED, Rule
from torch import Tensor

import rbwa_fused as rf
from rbwa_fused.weights import Named

AVERAGE, MASTER = "average", "master_param"
Z, Y = "z", "y"  # of a rule with modes: what it keeps, and the weights of training in eval mode


@dataclass(eq=False)
class Member:
    """One parameter. `theta` may be a view of memory that other members share."""

    theta: Value
    dtype: torch.dtype
    master_weights: bool
    state: dict[str, tuple[Value, torch.dtype]] = field(default_factory=dict)

    @classmethod
    def of(cls, p: Tensor, master_weights: bool = False) -> Member:
        """A parameter as it is now."""
        return cls(Value.of(p), p.dtype, master_weights)

    def put_elsewhere(self, dtype: torch.dtype) -> None:
        """The parameter has memory of its own now, maybe of another dtype."""
        self.theta = Value.of(self.theta.v.to(dtype))
        self.dtype = dtype

    @property
    def mastered(self) -> bool:
        """Whether it is to have a float32 master."""
        return self.master_weights and self.dtype.itemsize == 2

    @property
    def kept(self) -> torch.dtype:
        """The dtype of momentum and of what a step works on."""
        return F32 if self.mastered else self.dtype

    def dtype_of(self, rule: Rule, name: str) -> torch.dtype:
        """Of what a rule keeps by that name."""
        return F32 if self.mastered else rule.state_dtype(name, self.dtype)

    @property
    def rules_state(self) -> dict[str, Value]:
        """What the rule keeps: empty until the first step that keeps something."""
        beside = (AVERAGE, MASTER, Y)
        return {k: value for k, (value, _) in self.state.items() if k not in beside}

    def weights(self) -> Value:
        """What a step works on: the parameter, or its master where the parameter is that, rounded.

        Of memory that others share and have moved in this step, the bound tells whether it may be.
        """
        return self.followed(self.theta, self.dtype)

    def followed(self, theta: Value, dtype: torch.dtype) -> Value:
        """As `weights`, of weights that are or were the parameter's."""
        if MASTER not in self.state:
            return theta.clone()
        master = self.state[MASTER][0].v
        apart = (master.to(dtype).to(F64) - theta.v).abs()
        known, near = theta.off == 0, apart <= theta.off
        return Value(
            torch.where(known & near, master, theta.v),
            torch.where(near & ~known, theta.off.maximum((master - theta.v).abs()), theta.off),
            theta.arithmetic,
        )

    def beside_z(self, weights: Value, dtype: torch.dtype) -> tuple[Value, Value]:
        """z and some weights, in the widest dtype of what stands for them: weights may have been
        converted since the last step, which converts the others."""
        z, wide = self.state[Z]
        wide = torch.promote_types(wide, dtype)
        if MASTER in self.state:
            wide = torch.promote_types(wide, self.state[MASTER][1])
        return Value.of(z.v.to(wide)), Value.of(weights.v.to(wide))

    def x(self, beta: float, y: tuple[Value, torch.dtype] | None = None) -> Value:
        """The schedule-free average, of weights of training that are known exactly."""
        weights, dtype = y or (self.theta, self.dtype)
        z, theta = self.beside_z(self.followed(weights, dtype), dtype)
        return (theta + (1.0 - 1.0 / beta) * (z - theta)).stored(self.dtype)

    def y(self, beta: float) -> Value:
        """The weights of training, where x is live or what somebody has written over it: those that
        were set aside where they may be the weights' still, else as x and z say it."""
        z, x = self.beside_z(self.theta, self.dtype)
        computed = (x + (1.0 - beta) * (z - x)).stored(self.dtype)
        if Y not in self.state and MASTER not in self.state:
            return computed
        aside = self.state[Y if Y in self.state else MASTER]
        y = aside[0].v.to(self.dtype).to(F64)
        expected = self.x(beta, aside)
        untouched = (expected.v - self.theta.v).abs() <= expected.off
        off = torch.maximum(computed.off, (y - computed.v).abs())
        return Value(computed.v, torch.where(untouched, off, computed.off), computed.arithmetic)

    def keep(self, name: str, value: Value, dtype: torch.dtype) -> None:
        self.state[name] = value.stored(dtype), dtype

    def move(self, rule: Rule, group: Group, theta: Value, gradient: Value) -> Value:
        """Lines (1)-(3) for a gradient that is unscaled."""
        before = self.rules_state
        after = dict(before)
        numbers, _ = rule.of_step(group.numbers, group.counts)
        x = rule.literal(after, theta, gradient, numbers)
        for name, value in after.items():
            if value is not before.get(name):
                self.keep(name, value, self.dtype_of(rule, name))
        return x


@dataclass(eq=False)
class Group:
    options: dict[str, Any]
    policy: rf.Average | None
    members: list[Member]
    samples: int = 0
    beta: float | None = None  # what must stay, from the first step on
    counts: dict[str, Any] = field(default_factory=lambda: dict(NOT_STARTED))  # if its rule counts

    @property
    def numbers(self) -> dict[str, Any]:
        """The hyperparameters, with the value of what is a tensor."""
        return {k: float(v) if isinstance(v, Tensor) else v for k, v in self.options.items()}

    @property
    def averaged(self) -> int:
        """Samples in the averages; there are none without parameters."""
        return self.samples if self.members else 0

    @property
    def told(self) -> int:
        """What a reader is told: initial weights are a sample before the first step, too."""
        now = self.policy is not None and self.policy.initial == "now"
        return self.averaged or int(now and bool(self.members))

    def average_dtype(self, member: Member) -> torch.dtype | None:
        """Of a member's average, or None where it keeps none beside the parameter."""
        if self.policy is None:
            return None
        wide = self.policy.dtype or (F64 if member.dtype == F64 else F32)
        itself = self.policy.write_back_every == 1 and wide == member.kept
        return None if itself else wide

    def sampling(self, step: int) -> tuple[bool, float | None, bool]:
        """For the step to come: whether the average starts at the weights before it, the weight of
        its sample (None: none is taken) and whether the average is written back. Counts it."""
        policy = self.policy
        if policy is None:
            return False, None, False
        began = {"first_sample": False, "current": step > policy.start, "now": True}
        current = self.samples == 0 and began[policy.initial]
        self.samples += current
        # Samples follow steps start + every, start + 2 every; or begin `offset` behind start.
        sample, between = divmod(step - policy.start - policy.offset, policy.every)
        sample += policy.offset > 0
        over = policy.stop is not None and step > policy.stop
        if between != 0 or sample < 1 or over:
            return current, None, False
        weight = self._weight(policy.weight, step)
        self.samples += 1
        back = policy.write_back_every > 0 and sample * policy.every % policy.write_back_every == 0
        return current, weight, back

    def _weight(self, weight: Any, step: int) -> float:
        if self.samples == 0:
            return 1.0
        if isinstance(weight, rf.Mean):
            return 1.0 / (self.samples + 1)
        if isinstance(weight, rf.Ema):
            return 1.0 - weight.decay
        if isinstance(weight, rf.Algorithm2):
            epoch = (step - 1) // weight.steps_per_epoch + 1
            batch = (step - 1) % weight.steps_per_epoch
            return 1.0 / ((epoch - weight.start_epoch) * batch + 1)
        if isinstance(weight, Named):  # averages/test_weights.py has their literal loops
            assert self.policy is not None
            return weight.of(self.samples, step, self.policy)
        return float(weight(self.samples, step))


class Twin:
    """The optimizer: a rule, groups, and the count of steps taken."""

    @classmethod
    def of(
        cls, rule: Rule, params: Sequence[Tensor], policy: rf.Average | None, **more: Any
    ) -> Twin:
        """Of one group; `more` are hyperparameters that differ from the rule's."""
        twin = cls(rule, rule.master)
        members = [Member.of(p, rule.master) for p in params]
        twin.groups.append(Group({**rule.hyperparameters, **more}, policy, members))
        return twin

    def __init__(self, rule: Rule, master_weights: bool) -> None:
        self.rule = rule
        self.master_weights = master_weights
        self.groups: list[Group] = []
        self.steps = 0
        self.trains = True
        self.copied: list[Member] = []  # weights and averages that the last step made equal
        self.rounded: list[Member] = []  # whose masters the last step rounded to weights

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]

    def follow(self) -> None:
        """State takes on the dtype of a parameter that was converted."""
        for group in self.groups:
            for member in group.members:
                for name, (value, dtype) in list(member.state.items()):
                    wanted: torch.dtype | None = member.dtype_of(self.rule, name)
                    if name == Y:
                        wanted = dtype
                    elif name == AVERAGE:
                        wanted = group.average_dtype(member)
                    elif name == MASTER:
                        wanted = member.kept
                    if wanted is None or (name == MASTER and not member.mastered):
                        del member.state[name]
                    elif wanted != dtype:
                        member.state[name] = Value.of(value.v.to(wanted)), wanted

    def forget_skipped(self) -> None:
        """What only skipped steps have made and left is made again by the first that is taken."""
        if self.steps == 0:
            for group in self.groups:
                group.beta = None
            for member in self.members:
                member.state.pop(AVERAGE, None)

    def clear(self) -> None:
        """State that was thrown away starts again, and with it the averages that lay in it."""
        for group in self.groups:
            if any(group.average_dtype(member) is not None for member in group.members):
                group.samples = 0
            group.beta = None
            for member in group.members:
                member.state.clear()

    def outdated(self) -> bool:
        """Whether an average waits for the next step to take on another dtype."""
        kept = [
            (member.state[AVERAGE][1], group.average_dtype(member))
            for group in self.groups
            for member in group.members
            if AVERAGE in member.state
        ]
        return any(wanted is not None and wanted != dtype for dtype, wanted in kept)

    def start(self, gradients: Sequence[Tensor | None]) -> None:
        """What a step gives before it computes: averages, masters, and a momentum that must stay.

        An average starts as the parameter, which it may have been until a conversion. A
        master starts with the first gradient, or where a conversion left momentum to go on with.
        z starts as the weights that the step finds, before any parameter has moved.
        """
        given = iter(gradients)
        for group in self.groups:
            for member in group.members:
                dtype = group.average_dtype(member)
                if dtype is not None and AVERAGE not in member.state:
                    member.state[AVERAGE] = Value.of(member.theta.v.to(dtype)), dtype
                present, started = next(given) is not None, bool(member.rules_state)
                if member.mastered and MASTER not in member.state and (present or started):
                    member.state[MASTER] = Value.of(member.theta.v.to(F32)), F32
                if present and not started:
                    group.beta = self.rule.beta(group.numbers) or group.beta
                    if self.rule.modes:
                        dtype = member.dtype_of(self.rule, Z)
                        member.state[Z] = Value.of(member.weights().v.to(dtype)), dtype

    def with_z(self) -> Iterator[tuple[int, Member, float]]:
        """The members whose x is another tensor than their y, with their numbers and beta."""
        i = 0
        for group in self.groups:
            for member in group.members:
                if Z in member.state:
                    beta = self.rule.beta(group.numbers)
                    assert beta is not None
                    yield i, member, beta
                i += 1

    def switch(self, trains: bool) -> None:
        """Another mode. All weights are read before the first is written."""
        if trains == self.trains:
            return
        self.trains = trains
        weights = [
            (member, member.y(beta) if trains else member.x(beta))
            for _, member, beta in self.with_z()
        ]
        for member, _ in weights:
            if trains:
                member.state.pop(Y, None)
            else:
                member.state[Y] = Value.of(member.theta.v.to(member.dtype)), member.dtype
        for member, theta in weights:
            member.theta.v.copy_(theta.v)
            member.theta.off.copy_(theta.off)

    def step(self, gradients: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """One step that is taken; some parameter has a gradient."""
        self.follow()
        self.start(gradients)
        self.steps += 1
        self.copied, self.rounded = [], []
        given = iter(gradients)
        for group in self.groups:
            current, weight, back = group.sampling(self.steps)
            moved = False
            for member in group.members:
                g = next(given)
                sampled = (current or weight is not None) and AVERAGE in member.state
                if g is None and not sampled:
                    continue
                x = theta = member.weights()
                if g is not None:
                    moved = True
                    x = member.move(self.rule, group, theta, (1.0 / scale) * Value.of(g))
                x = self._average(group, member, theta, x, current, weight, back)
                if MASTER in member.state:
                    member.keep(MASTER, x, F32)
                    self.rounded.append(member)
                theta = x.stored(member.dtype)
                member.theta.v.copy_(theta.v)
                member.theta.off.copy_(theta.off)
            if moved:
                _, group.counts = self.rule.of_step(group.numbers, group.counts)

    def _average(
        self,
        group: Group,
        member: Member,
        theta: Value,
        x: Value,
        current: bool,
        weight: float | None,
        back: bool,
    ) -> Value:
        """Lines (4) and (5)."""
        if weight is None and not current:
            return x
        dtype = group.average_dtype(member)
        beside = dtype is not None and not current
        a = member.state[AVERAGE][0] if beside else theta
        whole = weight is not None and x.arithmetic.round(weight) == 1.0
        if weight is not None:
            a = x if whole else a + weight * (x - a)
        if dtype is not None:
            member.keep(AVERAGE, a, dtype)
            if back or whole:
                self.copied.append(member)
        return a if back else x


def unscaled(gradient: Tensor, scale: float) -> Value:
    """What AMP's contract wants in `grad` after a step."""
    return ((1.0 / scale) * Value.of(gradient)).stored(gradient.dtype)
