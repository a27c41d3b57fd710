"""Learning rates by step, as factors of the base learning rate. Steps are counted from 1.

Sources: the cycle that falls, Izmailov et al. 2018 (SWA); the triangular one, Garipov et al. 2018
(FGE); the matched rates of the recurrent averages, docs/equivalences.md.
"""

from __future__ import annotations

import math

LOWEST = 0.01  # of a cycle's highest rate, as in the papers' runs on CIFAR


def halved(step: int, every: int) -> float:
    """Half as much after each ``every`` steps."""
    return 0.5 ** ((step - 1) // every)


def cosine(step: int, steps: int) -> float:
    """From 1 at the first step towards 0 after the last of ``steps``."""
    return 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))


def part_of_cycle(step: int, cycle: int) -> float:
    """t(i) = (mod(i - 1, c) + 1) / c: above 0, and 1 at the cycle's end."""
    return ((step - 1) % cycle + 1) / cycle


def cyclical(step: int, cycle: int, high: float = 1.0, low: float = LOWEST) -> float:
    """SWA: (1 - t) high + t low, linear within the cycle and lowest at its end."""
    t = part_of_cycle(step, cycle)
    return (1.0 - t) * high + t * low


def triangular(step: int, cycle: int, high: float = 1.0, low: float = LOWEST) -> float:
    """FGE: linear from high to low at t = 1/2 and back to high at the cycle's end."""
    t = part_of_cycle(step, cycle)
    if t <= 0.5:
        return (1.0 - 2.0 * t) * high + 2.0 * t * low
    return (2.0 - 2.0 * t) * low + (2.0 * t - 1.0) * high


def lowest_of_triangle(step: int, cycle: int) -> bool:
    """Whether the triangular rate is at its minimum, in the middle of an even cycle."""
    return (step - 1) % cycle + 1 == cycle // 2


def rbwa(step: int, start: int) -> float:
    """RBWA with the running count *is* SGD with this factor: 1/(n + 1), n samples so far."""
    return 1.0 / (max(0, step - 1 - start) + 1)


def rbwa_algorithm2(step: int, steps_per_epoch: int, start_epoch: int) -> float:
    """RBWA with Algorithm 2's count: 1/((e - c) j + 1), epochs from 1, batches from 0."""
    epochs, batch = divmod(step - 1, steps_per_epoch)
    return 1.0 / (max(0, epochs + 1 - start_epoch) * batch + 1)


def rbwa_e(step: int, start: int, beta: float) -> float:
    """RBWA-E: 1 - beta after the first averaged step, whose sample is a copy."""
    return 1.0 if step <= start + 1 else 1.0 - beta
