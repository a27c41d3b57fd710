"""Whether a provider computes what its row says: a float64 reference on a sample of the weights.

Every rule here works element by element, so a thousand elements of each tensor stand for it, and
the check costs the provider's own steps and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.problem import MOMENTUM, WEIGHT_DECAY

SAMPLED = 1000  # elements of each tensor


@dataclass(frozen=True)
class Average:
    """The sample after steps every, 2 every, … enters with ``weight(n)``, n samples before it."""

    weight: Callable[[int], float]
    every: int = 1
    written_back: bool = False


@dataclass(frozen=True)
class Maths:
    """What a provider computes: torch's SGD with or without momentum, RSGDM, or schedule-free SGD
    (Defazio et al., 2024), which has no weight decay here; an average."""

    rule: Literal["plain", "momentum", "rsgdm", "schedule_free"] = "momentum"
    average: Average | None = None


def expected(
    maths: Maths, theta: Tensor, gradients: Sequence[Tensor], lr: float
) -> tuple[Tensor, Tensor]:
    """Weights and average after a step for each gradient, in float64, as the papers print it."""
    theta = a = theta.double()
    if maths.rule == "schedule_free":
        return schedule_free(theta, gradients, lr), a
    m = z = previous = None
    n = 0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double() + WEIGHT_DECAY * theta
        if maths.rule == "plain":
            direction = g
        elif maths.rule == "momentum":
            m = g if m is None else MOMENTUM * m + g
            direction = m
        else:
            difference = torch.zeros_like(g) if previous is None else g - previous
            m = (1 - MOMENTUM) * g if m is None else MOMENTUM * m + (1 - MOMENTUM) * g
            z = torch.zeros_like(g) if z is None else MOMENTUM * z + (1 - MOMENTUM) * difference
            direction = m + MOMENTUM * z
            previous = g
        theta = theta - lr * direction
        if maths.average is not None and t % maths.average.every == 0:
            a = a + maths.average.weight(n) * (theta - a)
            n += 1
            if maths.average.written_back:
                theta = a
    return theta, a


def schedule_free(theta: Tensor, gradients: Sequence[Tensor], lr: float) -> Tensor:
    """The point y at which gradients are taken, between z, which SGD moves, and its mean x."""
    x = z = theta
    for t, gradient in enumerate(gradients, start=1):
        z = z - lr * gradient.double()
        x = x + (z - x) / t
    return (1 - MOMENTUM) * z + MOMENTUM * x


def sample(tensor: Tensor) -> Tensor:
    """At most SAMPLED elements, spread over the whole tensor, first and last among them."""
    count = min(tensor.numel(), SAMPLED)
    index = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()
    return tensor.detach().reshape(-1)[index].clone()


def mismatch(what: str, got: Tensor, want: Tensor, allowed: float) -> str | None:
    """None, or a line that says how far off."""
    error = (got.double() - want).abs().max().item()
    return None if error <= allowed else f"{what} is off by {error:.3g}, more than {allowed:.3g}"
