"""Whether a provider computes what its row says: a float64 reference on a sample of the weights.

Every rule here works element by element, so a thousand elements of each tensor stand for it, and
the check costs the provider's own steps and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.rows.maths import CLIP, Maths
from benchmarks.rows.problem import MOMENTUM, WEIGHT_DECAY, Problem
from benchmarks.rows.provider import Provider

SAMPLED = 1000  # elements of each tensor
CHECKED_STEPS = 3
BETA_1, BETA_2, EPS, ADAMW_DECAY = 0.9, 0.999, 1e-8, 1e-2  # torch.optim.AdamW's defaults
ULPS_A_STEP = 2  # of the largest value: a step rounds what it stores a few times, by half a unit


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
    both = [entering(provider, gradients) for gradients in problem.gradients]
    return difference(provider, problem, start, [both[step % 2] for step in range(steps)])


def entering(provider: Provider, gradients: Sequence[Tensor]) -> list[Tensor]:
    """`sample` of each gradient, clipped where the provider clips."""
    own = list(map(sample, gradients))
    if not provider.maths.clipped:
        return own
    norm = sum(g.double().square().sum().item() for g in gradients) ** 0.5
    if provider.kind == "today":  # torch's, which is 3e-5 off for ResNet-18 in float32
        norm = nn.utils.get_total_norm(gradients).item()
    return [g.double() * min(1.0, CLIP / (norm + 1e-6)) for g in own]


def difference(
    provider: Provider,
    problem: Problem,
    start: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
) -> str | None:
    """None, or a line that says where a provider's weights or averages are not those of its maths.

    Args:
        start: `sample` of each parameter before the first step.
        gradients: for each step, `entering` of the parameters' gradients.
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


def expected(
    maths: Maths, theta: Tensor, gradients: Sequence[Tensor], lr: float
) -> tuple[Tensor, Tensor]:
    """Weights and average after a step for each gradient, in float64, as the papers print it."""
    theta = a = theta.double()
    if maths.rule in ("schedule_free", "schedule_free_adamw"):
        adam = maths.rule == "schedule_free_adamw"
        return schedule_free(theta, gradients, lr, BETA_2 if adam else None), a
    m = z = previous = None
    n = 0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double() + WEIGHT_DECAY * theta
        if maths.rule == "adamw":
            g = gradient.double()
            m = (1 - BETA_1) * g if m is None else BETA_1 * m + (1 - BETA_1) * g
            z = (1 - BETA_2) * g * g if z is None else BETA_2 * z + (1 - BETA_2) * g * g
            root = (z / (1 - BETA_2**t)).sqrt() + EPS
            direction = m / (1 - BETA_1**t) / root + ADAMW_DECAY * theta
        elif maths.rule == "plain":
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


def schedule_free(
    theta: Tensor, gradients: Sequence[Tensor], lr: float, beta_2: float | None = None
) -> Tensor:
    """The point y at which gradients are taken, between z, which SGD moves (with ``beta_2``, a
    gradient over the root of v), and its mean x."""
    x = z = theta
    v = torch.zeros_like(theta)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        if beta_2 is not None:
            v = beta_2 * v + (1 - beta_2) * g * g
            g = g / ((v / (1 - beta_2**t)).sqrt() + EPS)
        z = z - lr * g
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
