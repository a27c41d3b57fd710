"""A provider: something that takes a step, with all that is needed to check it and to count it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.check import Maths, expected, mismatch, sample
from benchmarks.problem import Problem

Kind = Literal["baseline", "ours", "today", "ceiling"]
CHECKED_STEPS = 3
ULPS_A_STEP = 2  # of the largest value: a step rounds what it stores a few times, by half a unit


@dataclass
class Provider:
    """One row of the table.

    Attributes:
        name, kind: the row's name and the group of rows that it stands in.
        maths: what it computes.
        params: its weights.
        step: takes one step with the gradients that ``use_gradients`` put in place.
        use_gradients: puts the problem's first or second set in place; not timed.
        averages: its averages, one for each of ``params``; None if it keeps none.
        state: every tensor that it keeps beside weights and gradients.
        moved: bytes that an element's step reads and writes, without and with a sample of the
            average; None where they cannot be said.
        period: steps between samples.
        eager_steps: the first steps, which are not taken in the way that is timed.
        model: the network whose weights these are, None where there is none.
    """

    name: str
    kind: Kind
    maths: Maths
    params: Sequence[Tensor]
    step: Callable[[], object]
    use_gradients: Callable[[int], None]
    averages: Callable[[], Sequence[Tensor] | None]
    state: Callable[[], Sequence[Tensor]]
    moved: Callable[[], tuple[float, float] | None]
    period: int = 1
    eager_steps: int = 0
    model: nn.Module | None = None
    steps: int = field(default=0, init=False)

    def prepare(self) -> bool:
        """Puts the next gradients in place; whether the step to come takes a sample."""
        self.use_gradients(self.steps % 2)
        self.steps += 1
        return self.steps % self.period == 0

    def bytes_per_element(self) -> float | None:
        """`moved`, averaged over the period; None where it cannot be said."""
        moved = self.moved()
        return None if moved is None else over_period(*moved, self.period)

    def state_bytes(self) -> int:
        """Bytes of the distinct storages of the state."""
        storages = [t.untyped_storage() for t in self.state()]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def over_period(without: float, with_sample: float, period: int) -> float:
    """The mean of a step's cost when every `period`-th step takes a sample."""
    return without + (with_sample - without) / period


def use_gradients_of(problem: Problem, model: nn.Module) -> Callable[[int], None]:
    """Sets ``p.grad`` to the problem's first or second gradients, as a backward pass would."""
    params = list(model.parameters())

    def use(which: int) -> None:
        for p, g in zip(params, problem.gradients[which], strict=True):
            p.grad = g

    return use


def check(provider: Provider, problem: Problem) -> str | None:
    """Takes a provider's first steps; None if they are right, or a line that says what is not.

    Steps are taken until the average has been sampled at least once. The gradients must come
    through unchanged, as they are shared. Integers, as which the ceiling moves 16-bit streams,
    mean nothing and pass.
    """
    steps = max(provider.eager_steps + CHECKED_STEPS, provider.period)
    start = [sample(p) for p in provider.params]
    shared = [g for both in problem.gradients for g in both]
    versions = [g._version for g in shared]
    for _ in range(steps):
        provider.prepare()
        provider.step()
    if versions != [g._version for g in shared]:
        return f"{provider.name}: writes to the gradients"
    if not provider.params[0].is_floating_point():
        return None
    both = [list(map(sample, gradients)) for gradients in problem.gradients]
    return difference(provider, problem, start, [both[step % 2] for step in range(steps)])


def difference(
    provider: Provider,
    problem: Problem,
    start: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
) -> str | None:
    """None, or a line that says where a provider's weights or averages are not those of its maths.

    Args:
        start: `sample` of each parameter before the first step.
        gradients: for each step, `sample` of each parameter's gradient.
    """
    averages, steps = provider.averages(), len(gradients)
    for i, theta in enumerate(start):
        given = [of_step[i] for of_step in gradients]
        weights, average = expected(provider.maths, theta, given, problem.lr_of(i))
        scale = max(theta.abs().max().item(), weights.abs().max().item())
        allowed = ULPS_A_STEP * steps * torch.finfo(problem.dtype).eps * scale
        wrong = mismatch("parameter", sample(provider.params[i]), weights, allowed)
        if averages is not None:
            wrong = wrong or mismatch("average", sample(averages[i]), average, allowed)
        if wrong is not None:
            return f"{provider.name}: {wrong} (parameter {i}, {steps} steps)"
    return None
