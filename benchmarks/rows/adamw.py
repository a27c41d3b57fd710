"""AdamW and clipping as users write them today: torch's own, with torch's average behind it.

Clipping writes to the gradients, so a row that clips gets copies of those that all rows share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.rows import today
from benchmarks.rows.maths import CLIP, Average, Maths
from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Provider, use_copies_of

# Reads and writes of an element by each pass.
FUSED = 7  # theta, g, m, v; theta, m, v
# theta *= decay: 2, m: 3, v *= beta: 2, v += g g: 3, its root: 2, / bias: 2, + eps: 2, theta: 4
SEPARATE = 20
CLIPPING = 3  # g for its norm; g, g to scale it


def adamw(problem: Problem, model: nn.Module, how: str = "fused") -> torch.optim.AdamW:
    """torch's at its defaults but for the rate, for a copy of the problem's model."""
    return torch.optim.AdamW(
        problem.groups(model),
        fused=how == "fused",
        foreach=how == "foreach",
        capturable=problem.tensor_lr,
    )


def torch_adamw(how: Literal["fused", "foreach"]) -> Callable[[Problem, str], Provider]:
    """torch.optim.AdamW in one of its implementations."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        opt, accesses = adamw(problem, model, how), FUSED if how == "fused" else SEPARATE
        return today.provider(problem, name, model, opt, accesses, "baseline", rule="adamw")

    return build


def clipped(problem: Problem, name: str) -> Provider:
    """Fused SGD behind torch's clip_grad_norm_."""
    model = problem.copy()
    opt = today.sgd(problem, model)

    def step() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        opt.step()

    made = today.provider(problem, name, model, opt, today.FUSED + CLIPPING, step=step)
    made.maths, made.use_gradients = Maths("momentum", clipped=True), use_copies_of(problem, model)
    return made


def averaged(clipped: bool = False) -> Callable[[Problem, str], Provider]:
    """Fused AdamW and torch's AveragedModel, behind clip_grad_norm_ or not: how most people train
    with an EMA."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        opt = adamw(problem, model)
        beside = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(today.EMA_DECAY))

        def step() -> None:
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
            opt.step()
            beside.update_parameters(model)

        made = today.provider(
            problem,
            name,
            model,
            opt,
            FUSED + today.LERP + (CLIPPING if clipped else 0),
            step=step,
            averaged=beside.module,
        )
        made.maths = Maths("adamw", Average(today.ema(today.EMA_DECAY)), clipped)
        if clipped:
            made.use_gradients = use_copies_of(problem, model)
        return made

    return build
