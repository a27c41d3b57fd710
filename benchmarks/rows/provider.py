"""A provider: something that takes a step, with all that is needed to check it and to count it; and
a row of a table, which builds one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from torch import Tensor, nn

from benchmarks.rows.maths import Maths
from benchmarks.rows.problem import Problem

Kind = Literal["baseline", "ours", "today", "ceiling"]


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


Build = Callable[[Problem, str], Provider]


@dataclass(frozen=True)
class Row:
    """One row: its name, its group, how to build it, the module it cannot do without, whether a
    CUDA graph replays it, whether it takes so long to build that it must be asked for, and a dtype
    that cannot hold what it keeps."""

    name: str
    kind: Kind
    build: Build
    needs: str | None = None
    captured: bool = False
    slow: bool = False
    not_in: str | None = None

    def available(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None


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


def use_copies_of(problem: Problem, model: nn.Module) -> Callable[[int], None]:
    """The same with copies, for an optimizer that writes to gradients."""
    params = list(model.parameters())

    def use(which: int) -> None:
        for p, g in zip(params, problem.gradients[which], strict=True):
            p.grad = g.clone()

    return use
