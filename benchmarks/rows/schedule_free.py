"""The schedulefree package's optimizers, by foreach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.rows import today
from benchmarks.rows.maths import Maths
from benchmarks.rows.problem import MOMENTUM, Problem
from benchmarks.rows.provider import Provider, use_copies_of

# Reads and writes of an element by each pass.
SGD = 9  # y to z: 3, y += g: 3, z -= g: 3
ADAMW = 23  # v: 2 + 3, its root, corrected, + eps: 2 + 2 + 2, g over it: 3, and as SGD's


def package(how: str) -> Callable[[Problem, str], Provider]:
    """Its SGD or AdamW, without weight decay. AdamW divides the gradients in place, so it gets
    copies of those that all rows share."""

    def build(problem: Problem, name: str) -> Provider:
        import schedulefree

        model = problem.copy()
        opt: Any
        if how == "sgd":
            opt = schedulefree.SGDScheduleFree(problem.groups(model), momentum=MOMENTUM)
        else:
            opt = schedulefree.AdamWScheduleFree(problem.groups(model))
        opt.train()
        accesses = SGD if how == "sgd" else ADAMW
        made = today.provider(problem, name, model, opt, accesses)
        made.maths = Maths("schedule_free" if how == "sgd" else "schedule_free_adamw")
        if how == "adamw":
            made.use_gradients = use_copies_of(problem, model)
        return made

    return build
