"""Profiles of averages: how much of each time an average holds, and which averages make another.

An average of power gamma that has got to time t holds (gamma + 1) tau^gamma / t^(gamma + 1) of the
weights at 0 <= tau <= t (power.py). Averages of several times and powers span a space of profiles;
the weights of the nearest one to a profile that is asked for solve a linear system, whose matrix is
that of inner products:

    <a, b> = (gamma_a + 1) (gamma_b + 1) r^gamma / ((gamma_a + gamma_b + 1) max(t_a, t_b))

with r = min(t_a, t_b) / max(t_a, t_b) and the gamma of the later. Source: Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.2 and appendix C.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = -0.5  # the gamma whose profile has no finite norm


class Profile(NamedTuple):
    """What an average holds.

    Attributes:
        t (steps since the average's start, > 0): of its last sample.
        gamma: its power, above -1/2.
    """

    t: float
    gamma: float


class Solution(NamedTuple):
    """How members make a profile.

    Attributes:
        residual: the distance of the two profiles, relative to the norm of the one asked for.
        sigma_rel: the standard deviation of the profile made, relative to the t asked for.
        weights: of the members, whose sum is 1.
    """

    residual: float
    sigma_rel: float
    weights: tuple[float, ...]


def products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """The inner products of profiles, (len(first), len(second)), float64.

    Raises:
        ValueError: for a power that has no finite norm.
    """
    for profile in (*first, *second):
        if not (profile.gamma > LEAST and 0.0 < profile.t < math.inf):
            raise ValueError(f"Invalid profile: {profile} (expected t > 0 and gamma > {LEAST})")
    t_a, gamma_a = torch.tensor(first, dtype=torch.float64)[:, :, None].unbind(1)
    t_b, gamma_b = torch.tensor(second, dtype=torch.float64)[None].unbind(2)
    latest = torch.maximum(t_a, t_b)
    gamma = torch.where(t_a < t_b, gamma_b, gamma_a)  # of the later
    decayed = (torch.minimum(t_a, t_b) / latest) ** gamma
    return (gamma_a + 1) * (gamma_b + 1) * decayed / ((gamma_a + gamma_b + 1) * latest)


def solve(members: Sequence[Profile], target: Profile) -> Solution:
    """The members' weights that come nearest to a profile, divided by their sum.

    The residual is that of the weights as they are after the division.
    """
    matrix = products(members, members)
    wanted = products(members, [target])[:, 0]
    norms = matrix.diagonal().sqrt()  # unit profiles make the best condition
    unit = torch.linalg.lstsq(
        matrix / torch.outer(norms, norms), (wanted / norms)[:, None], driver="gelsd"
    ).solution[:, 0]
    weights = unit / norms
    weights = weights / weights.sum()
    whole = products([target], [target]).item()
    squared = (weights @ matrix @ weights - 2 * weights @ wanted).item() + whole
    return Solution(
        math.sqrt(max(squared, 0.0) / whole),
        _deviation(members, weights) / target.t,
        tuple(weights.tolist()),
    )


def _deviation(members: Sequence[Profile], weights: Tensor) -> float:
    """The standard deviation of a profile, in steps."""
    t, gamma = torch.tensor(members, dtype=torch.float64).unbind(1)
    mean = (weights * t * (gamma + 1) / (gamma + 2)).sum().item()
    square = (weights * t**2 * (gamma + 1) / (gamma + 3)).sum().item()
    return math.sqrt(max(square - mean**2, 0.0))


def density(members: Sequence[Profile], weights: Sequence[float], times: Tensor) -> Tensor:
    """The profile that weighted members make, at some times (steps since the start), float64."""
    times = times.to(torch.float64)
    made = torch.zeros_like(times)
    for (t, gamma), weight in zip(members, weights, strict=True):
        inside = (times > 0) & (times <= t)
        held = (gamma + 1) / t * (times / t).clamp(min=1e-300) ** gamma
        made += weight * torch.where(inside, held, 0.0)
    return made
