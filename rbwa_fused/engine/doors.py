"""The door to the kernels: what a launch is given, and how it is made.

Above it stand tables of Python objects, below it the operator, which checks what it gets and trusts
nobody (csrc/tables.cpp). Whoever reads the code top-down may stop here: a call that `Prepare`
returns, made by `in_turn`, takes the step for all segments of a table, or raises and has changed
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rbwa_fused import compiled
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.norm import sum_squares_
from rbwa_fused.engine.segments import Table

_C, _ = compiled.load("_C")

Grads = list[Tensor | None]


# A function and its arguments.
Call = tuple[Any, ...]


class Prepare(Protocol):
    """Returns the call that takes the step in place, in one pass, and makes the segments older.

    Args:
        params: n dense tensors in the layout that the tables were made for.
        grads: n gradients in their parameters' dtype, shape and layout, or None.
        table: see segments.py.
        counters: on the device, where the host does not count (cuda and triton only); the ages are
            its marks then.
        clip: a float64 on the parameters' device that multiplies the gradients as they are read,
            or None.

    The call raises RuntimeError for a parameter or gradient that does not fit the tables; nothing
    has been changed then.
    """

    def __call__(
        self,
        params: list[Tensor],
        grads: Grads,
        table: Table,
        counters: DeviceCounters | None = None,
        clip: Tensor | None = None,
    ) -> Call: ...


class Backend(NamedTuple):
    """A backend's name and its operators.

    Attributes:
        name: as users give it.
        call: prepares a step.
        checks: whether the step itself refuses gradients that do not fit, before it changes
            anything.
        advance: counts a step on the device; without it the backend cannot defer.
        sum_squares: see norm.py.
    """

    name: str
    call: Prepare
    checks: bool
    advance: Callable[[DeviceCounters], None] | None = None
    sum_squares: Callable[[list[Tensor], Tensor], None] = sum_squares_


@torch.no_grad()
def _in_turn(calls: Sequence[Call]) -> None:
    for function, *arguments in calls:
        function(*arguments)


# Makes one call after the other, without autograd. Where all of them are functions in C no
# interrupt comes between (csrc/in_turn.h).
in_turn: Callable[[list[Call]], None] = getattr(_C, "in_turn", _in_turn)


def door(module: Any) -> Prepare:
    """The compiled step: through the extension module, or through the dispatcher where that has no
    such door or a profiler wants to see it."""
    direct: Any = getattr(module, "step", None)
    direct_deferred: Any = getattr(module, "step_deferred", None)

    def call(
        params: list[Tensor],
        grads: Grads,
        table: Table,
        counters: DeviceCounters | None = None,
        clip: Tensor | None = None,
    ) -> Call:
        t, d = table, counters
        own: tuple[Any, ...] = ()
        if d is not None:
            counted = d.samplings64, d.samplings32, d.marks, d.agings
            own = (*counted, d.grad_scale, d.found_inf, clip, d.settings, d.schedules)
        behind = () if t.further is None else (t.further,)
        if direct is None or torch.autograd._profiler_enabled():
            op = torch.ops.rbwa_fused
            operands = (params, grads, t.state, t.segments, t.shapes, t.ages, t.rows, t.samplings)
            if d is None:
                return op.step_.default, *operands, clip, *behind
            return op.step_deferred_.default, *operands, d.lrs, *own, *behind
        if t.views is None:
            fixed = t.state, t.segments, t.shapes, t.ages, t.rows, t.samplings
            t.views = _C.Tables(*fixed, *behind)
        if d is None:
            return direct, t.views, params, grads, clip
        return direct_deferred, t.views, params, grads, list(d.lrs), *own

    return call


def squares_door(module: Any) -> Callable[[list[Tensor], Tensor], None]:
    """The compiled sum of squares, by the same two doors."""
    direct: Any = getattr(module, "sum_squares", None)

    def sum_squares(grads: list[Tensor], sums: Tensor) -> None:
        if direct is None or torch.autograd._profiler_enabled():
            torch.ops.rbwa_fused.sum_squares_.default(grads, sums)
        else:
            direct(grads, sums)

    return sum_squares


def described(grads: Grads) -> tuple[Grads, bool, bool, bool]:
    """Gradients, with whether some are absent, some present, some negated (`is_neg()`): the memory
    of such a one holds the negatives of its elements."""
    present = [g for g in grads if g is not None]
    return grads, len(present) < len(grads), bool(present), any(map(Tensor.is_neg, present))


def _gradients(params: list[Tensor]) -> tuple[Grads, bool, bool, bool]:
    return described([p.grad for p in params])


# The gradients of parameters, as `described` has them, at the price of fetching them.
gradients: Callable[[list[Tensor]], tuple[Grads, bool, bool, bool]]
gradients = getattr(_C, "gradients", _gradients)
