"""An Averager beside a random optimizer, with a random policy, through random interruptions."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rbwa_fused as rf

TIMES = 5 if os.environ.get("RBWA_PROFILE") == "long" else 1

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.5, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.05, foreach=True),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.05, foreach=False),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.05, momentum=0.5),
}
SHAPES = [(3, 2), (5,), (), (0,), (40,)]
ACTIONS = ["step", "step", "step", "evaluate", "save", "exchange"]


@st.composite
def policies(draw: st.DrawFn) -> rf.Average:
    every = draw(st.integers(1, 3))
    weight: Any = draw(st.one_of(st.just(rf.Mean()), st.floats(0.0, 0.96875, width=16).map(rf.Ema)))
    start, write_back_every = draw(st.integers(0, 4)), every * draw(st.integers(0, 2))
    later = ["now"] if start == 0 or write_back_every != 1 else []
    return rf.Average(
        weight,
        start=start,
        every=every,
        write_back_every=write_back_every,
        initial=draw(st.sampled_from(["first_sample", "current", *later])),
        offset=draw(st.integers(0, every)),
    )


@dataclass
class Literal:
    """The average of one parameter, as its definition reads."""

    policy: rf.Average
    a: Tensor | None = None
    n: int = 0

    def before(self, step: int, x: Tensor) -> None:
        """Where nobody sees the weights before a step, behind the step before it."""
        first = {"first_sample": 0, "current": self.policy.start + 1, "now": 1}
        if step == first[self.policy.initial] and self.n == 0:
            self.a, self.n = x.clone(), 1

    def behind(self, step: int, x: Tensor) -> None:
        """Changes the weights where the average is written back."""
        sample, between = divmod(step - self.policy.start - self.policy.offset, self.policy.every)
        sample += self.policy.offset > 0
        if between or sample < 1:
            return
        w = 1.0
        if self.n > 0 and self.a is not None:
            weight = self.policy.weight
            w = 1 - weight.decay if isinstance(weight, rf.Ema) else 1 / (self.n + 1)
        self.a = x.clone() if w == 1.0 or self.a is None else self.a + w * (x - self.a)
        self.n += 1
        if (
            self.policy.write_back_every
            and sample * self.policy.every % self.policy.write_back_every == 0
        ):
            x.copy_(self.a)


def module(dtype: torch.dtype) -> nn.Module:
    made = torch.Generator().manual_seed(0)
    net = nn.Module()
    for i, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)
        net.register_parameter(f"p{i}", nn.Parameter(value))
    return net


# All is named: a CI machine's defaults are the same cases each time.
@settings(
    max_examples=150 * TIMES,
    derandomize=False,
    print_blob=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    policy=policies(),
    actions=st.lists(st.sampled_from(ACTIONS), min_size=4, max_size=16),
    hooked=st.booleans(),
)
def test_it_is_the_literal_average_whatever_happens(
    name: str, policy: rf.Average, actions: list[str], hooked: bool
) -> None:
    """Bit for bit, in float64: the same optimizer steps both."""
    net, plain = module(torch.float64), module(torch.float64)
    opt = OPTIMIZERS[name](list(net.parameters()))
    theirs = OPTIMIZERS[name](list(plain.parameters()))
    averager = rf.Averager(net, policy, optimizer=opt if hooked else None)
    literals = {n: Literal(policy) for n, _ in plain.named_parameters()}
    step = 0
    if not hooked:
        for n, q in plain.named_parameters():
            literals[n].before(1, q.detach())
    for action in actions:
        if action == "step":
            step += 1
            for i, (p, q) in enumerate(zip(net.parameters(), plain.parameters(), strict=True)):
                g = torch.full_like(p, 0.5 + i) * (-1) ** step + 0.25 * p.detach()
                p.grad, q.grad = g, g.clone()
            for n, q in plain.named_parameters():
                literals[n].before(step, q.detach())
            theirs.step()
            for n, q in plain.named_parameters():
                literals[n].behind(step, q.detach())
                if not hooked:
                    literals[n].before(step + 1, q.detach())
            opt.step()
            if not hooked:
                averager.update()
        elif action == "evaluate":
            with averager.averaged():
                for n, p in net.named_parameters():
                    a, live = literals[n].a, plain.get_parameter(n)
                    assert torch.equal(p, live if a is None else a)
        elif action == "save":
            saved = copy.deepcopy(averager.state_dict())
            averager.remove()
            averager = rf.Averager(net, policy, optimizer=opt if hooked else None)
            averager.load_state_dict(saved)
        else:
            for n, model, optimizer in (("p0", net, opt), ("p0", plain, theirs)):
                old = model.get_parameter(n)
                new = nn.Parameter(old.detach().clone())
                model.register_parameter(n, new)
                group = optimizer.param_groups[0]
                group["params"] = [new if p is old else p for p in group["params"]]
                if old in optimizer.state:
                    optimizer.state[new] = optimizer.state.pop(old)
    if policy.initial == "now" and step == 0:
        for n, q in plain.named_parameters():
            literals[n].before(1, q.detach())
    assert averager.n_averaged == max(literal.n for literal in literals.values())
    averages = averager.averages()
    for n, p in net.named_parameters():
        assert torch.equal(p, plain.get_parameter(n)), n
        a = literals[n].a
        assert a is None or torch.equal(averages[n], a), n
