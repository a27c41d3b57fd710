"""Power-function EMAs: how long an average is, and which power makes it so.

At time t the average weights the past by its profile (gamma + 1) tau^gamma / t^(gamma + 1) of times
tau <= t: its length grows with the run. ``sigma_rel`` is the profile's standard deviation, relative
to t. Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", section 3.1 and appendix C.
"""

from __future__ import annotations

import math

from rbwa_fused.numbers import number

WIDEST = 1.0 / math.sqrt(12.0)  # gamma = 0, the mean of all


def sigma_rel_of(gamma: float) -> float:
    """The relative length of the average of a power, gamma > -1."""
    gamma = number("gamma", gamma)
    if not -1.0 < gamma < math.inf:
        raise ValueError(f"Invalid gamma: {gamma} (expected -1 < gamma < inf)")
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_of(sigma_rel: float) -> float:
    """The power of a relative length, 0 < sigma_rel < 1/sqrt(12) = 0.2887.

    It is the largest root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s with s = sigma_rel^-2,
    which 1/sigma_rel is above: from there Newton's method falls to it.
    """
    sigma_rel = number("sigma_rel", sigma_rel)
    if not 0.0 < sigma_rel < WIDEST:
        raise ValueError(f"Invalid sigma_rel: {sigma_rel} (expected 0 < sigma_rel < 1/sqrt(12))")
    s = 1.0 / sigma_rel / sigma_rel
    gamma = 1.0 / sigma_rel
    while True:
        value = ((gamma + 7.0) * gamma + 16.0 - s) * gamma + 12.0 - s
        slope = (3.0 * gamma + 14.0) * gamma + 16.0 - s
        lower = gamma - value / slope
        if not lower < gamma:
            return gamma
        gamma = lower
