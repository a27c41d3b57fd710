"""An independent optimizer for the tests: each rule and average as its source prints it.

Everything is float64 and rounded to the stored dtype only where a kernel stores. One parameter at
a time, nothing shared with rbwa_fused but the policies' fields.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rbwa_fused as rf


class Oracle:
    """`opt.step()` for one param group, on tensors of its own; `dtype` is what a step stores."""

    def __init__(
        self,
        params: list[Tensor],
        rule: str,
        options: dict[str, Any],
        policy: rf.Average | None,
        dtype: torch.dtype,
    ) -> None:
        self.stored = [dtype for _ in params]
        self.theta = [p.detach().clone().double() for p in params]
        self.state: list[dict[str, Tensor]] = [{} for _ in params]
        self.averages: list[Tensor | None] = [None for _ in params]
        self.rule = rule
        self.lr = options["lr"]
        self.momentum = options.get("momentum", 0.0)
        self.dampening = options.get("dampening", 0.0)
        self.decay = options.get("weight_decay", 0.0)
        self.nesterov = options.get("nesterov", False)
        self.maximize = options.get("maximize", False)
        self.policy = policy
        self.steps = 0
        self.samples = 0

    def step(self, grads: list[Tensor | None]) -> None:
        self.steps += 1
        x = [self._take(i, g) for i, g in enumerate(grads)]
        policy, t = self.policy, self.steps
        if policy is None or t <= policy.start:
            self.theta = [self._round(i, v) for i, v in enumerate(x)]
            return
        if policy.initial == "current" and self.samples == 0:
            self.averages = [v.clone() for v in self.theta]
            self.samples = 1
        if (t - policy.start) % policy.every == 0:
            weight = self._weight(policy.weight, t)
            for i, v in enumerate(x):
                old = v if self.samples == 0 else self.averages[i]
                average = old + weight * (v - old)
                dtype = policy.dtype or {8: torch.float64}.get(
                    self.stored[i].itemsize, torch.float32
                )
                self.averages[i] = average.to(dtype).double()
                if policy.write_back_every and (t - policy.start) % policy.write_back_every == 0:
                    x[i] = average
            self.samples += 1
        self.theta = [self._round(i, v) for i, v in enumerate(x)]

    def _weight(self, weight: Any, t: int) -> float:
        if self.samples == 0:
            return 1.0
        if isinstance(weight, rf.Mean):
            return 1.0 / (self.samples + 1)
        if isinstance(weight, rf.Ema):
            return 1.0 - weight.decay
        if isinstance(weight, rf.Algorithm2):
            epoch = (t - 1) // weight.steps_per_epoch + 1
            batch = (t - 1) % weight.steps_per_epoch
            return 1.0 / ((epoch - weight.start_epoch) * batch + 1)
        return weight(self.samples, t)

    def _take(self, i: int, g: Tensor | None) -> Tensor:
        """Lines (1)-(3): the new weights, not yet rounded."""
        theta, state = self.theta[i], self.state[i]
        if g is None:
            return theta
        g = g.double()
        if self.maximize:
            g = -g
        g = g + self.decay * theta
        beta = self.momentum
        if beta == 0:
            return theta - self.lr * g
        new: dict[str, Tensor] = {}
        if self.rule == "sgd":
            old = state.get("momentum_buffer")
            m = g if old is None else beta * old + (1 - self.dampening) * g
            direction = g + beta * m if self.nesterov else m
            new["momentum_buffer"] = m
        elif self.rule == "sgdm":
            m = beta * state.get("momentum_buffer", 0 * g) + (1 - beta) * g
            direction = m
            new["momentum_buffer"] = m
        elif self.rule == "implicit":
            first = "momentum_buffer" not in state
            u = 0 * g if first else beta * state["momentum_buffer"] + (1 - beta) * g
            direction = beta * u + (1 - beta) * g
            new["momentum_buffer"] = u
        else:
            m = beta * state.get("momentum_buffer", 0 * g) + (1 - beta) * g
            difference = g - state["previous_gradient"] if "previous_gradient" in state else 0 * g
            z = beta * state.get("difference_buffer", 0 * g) + (1 - beta) * difference
            direction = m + beta * z
            new = {"momentum_buffer": m, "difference_buffer": z, "previous_gradient": g}
        self.state[i] = {name: self._round(i, value) for name, value in new.items()}
        return theta - self.lr * direction

    def _round(self, i: int, value: Tensor) -> Tensor:
        return value.to(self.stored[i]).double()


def ulps(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the last place of max(1, |expected|) in actual's dtype."""
    if actual.numel() == 0:
        return 0.0
    scale = expected.double().abs().clamp(min=1.0) * torch.finfo(actual.dtype).eps
    return float(((actual.double() - expected.double()).abs() / scale).max())
