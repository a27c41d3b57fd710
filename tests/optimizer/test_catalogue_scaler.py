"""torch's GradScaler tests: each way to use a scaler trains as the run without one, bit for bit.

Scales are powers of two, so that scaling and unscaling lose nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from catalogue import INFOS, inputs, instantiate, same_bits
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.testing._internal.common_optimizers import OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase, parametrize

OVERFLOWS = (0, 3)  # the very first step, and one in the middle
STEPS = 6


class Run:
    """Two models, an optimizer each, and one scaler, enabled or not."""

    def __init__(self, info: OptimizerInfo, kwargs: dict[str, Any], device: str, on: bool) -> None:
        self.device = device
        self.nets = [self._net(seed) for seed in (0, 1)]
        self.opts = [info.optim_cls(net.parameters(), **deepcopy(kwargs)) for net in self.nets]
        self.grads: list[Tensor | None] = []
        self.kind = torch.device(device).type
        self.scaler = torch.amp.GradScaler(
            self.kind, init_scale=128.0, growth_interval=1, enabled=on
        )

    def _net(self, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(self.device)

    def loss(self, step: int, net: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(3, 4, generator=generator).to(self.device)
        return self.nets[net](x).square().mean()

    def step(self, step: int, *which: int) -> None:
        """Steps these optimizers; where there is no scaler, an overflow skips the first by hand."""
        for i in which or (0,):
            if step in OVERFLOWS and i == 0:
                next(self.nets[0].parameters()).grad[0] = torch.inf
            if self.scaler.is_enabled() or not (step in OVERFLOWS and i == 0):
                self.scaler.step(self.opts[i])
        self.scaler.update()
        if step not in OVERFLOWS:  # unscaled in place, as torch asks of who scales for itself
            self.grads += [p.grad for i in which or (0,) for p in self.nets[i].parameters()]
        for opt in self.opts:
            opt.zero_grad()

    def result(self) -> list[Any]:
        """Gradients, and weights and state of both models."""
        params = [list(net.parameters()) for net in self.nets]
        states = [opt.state for opt in self.opts]
        return [
            self.grads,
            [p.detach() for ps in params for p in ps],
            [state.get(p, {}) for ps, state in zip(params, states, strict=True) for p in ps],
        ]


def usual(run: Run, step: int) -> None:
    run.scaler.scale(run.loss(step)).backward()
    run.step(step)


def under_autocast(run: Run, step: int) -> None:
    with torch.autocast(run.kind, dtype=torch.bfloat16):
        loss = run.loss(step)
    run.scaler.scale(loss).backward()
    run.step(step)


def pickled_scaler(run: Run, step: int) -> None:
    usual(run, step)
    run.scaler = pickle.loads(pickle.dumps(run.scaler))


def clipping_the_scaled(run: Run, step: int) -> None:
    run.scaler.scale(run.loss(step)).backward()
    clip_grad_value_(run.nets[0].parameters(), 0.05 * run.scaler.get_scale())
    run.step(step)


def clipping_the_unscaled(run: Run, step: int) -> None:
    run.scaler.scale(run.loss(step)).backward()
    if step in OVERFLOWS:  # where unscale_ looks for it
        next(run.nets[0].parameters()).grad[0] = torch.inf
    run.scaler.unscale_(run.opts[0])
    clip_grad_norm_(run.nets[0].parameters(), 0.1)
    run.step(step)


def gradient_penalty(run: Run, step: int) -> None:
    loss = run.loss(step)
    params = list(run.nets[0].parameters())
    grads = torch.autograd.grad(run.scaler.scale(loss), params, create_graph=True)
    penalty = sum((g / run.scaler.get_scale()).square().sum() for g in grads)
    run.scaler.scale(loss + penalty).backward()
    run.step(step)


def accumulation(run: Run, step: int) -> None:
    for part in (step, step + 100):
        run.scaler.scale(run.loss(part) / 2).backward()
    run.step(step)


def two_models(run: Run, step: int) -> None:
    for net in (0, 1):
        run.scaler.scale(run.loss(step, net)).backward()
    run.step(step, 0, 1)


LOOPS: list[Callable[[Run, int], None]] = [
    usual,
    under_autocast,
    pickled_scaler,
    clipping_the_scaled,
    clipping_the_unscaled,
    gradient_penalty,
    accumulation,
    two_models,
]


class TestScaler(TestCase):
    @parametrize("loop", LOOPS, name_fn=lambda loop: loop.__name__)
    @optims(INFOS)
    def test_a_scaler_changes_no_bit(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, loop: Any
    ) -> None:
        for kwargs in inputs(optim_info, device, flatten=True):
            scaled, plain = (Run(optim_info, kwargs, device, on) for on in (True, False))
            for step in range(STEPS):
                for run in (scaled, plain):
                    loop(run, step)
            same_bits(scaled.result(), plain.result())
            for opt, other in zip(scaled.opts, plain.opts, strict=True):
                assert opt.n_averaged == other.n_averaged
            expected = 128.0 * 2.0 ** (STEPS - len(OVERFLOWS)) * 0.5 ** len(OVERFLOWS)
            assert scaled.scaler.get_scale() == expected

    @optims(INFOS)
    def test_gradients_that_break_after_unscale_are_taken_as_they_are(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """As torch has it: who edits gradients behind `unscale_` answers for them."""
        for kwargs in inputs(optim_info, device):
            run = Run(optim_info, kwargs, device, on=True)
            run.scaler.scale(run.loss(1)).backward()
            run.scaler.unscale_(run.opts[0])
            params = list(run.nets[0].parameters())
            for i, p in enumerate(params):
                assert p.grad is not None
                p.grad.fill_(torch.inf if i % 2 else torch.nan)
            run.scaler.step(run.opts[0])
            assert not any(p.isfinite().any() for p in params)


instantiate(TestScaler, globals())
