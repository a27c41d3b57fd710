"""Runs whose averages are known: a model of a few tensors whose weights follow a given path."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.power import gamma_of

STEPS = 200
PAIR = (0.05, 0.10)


class Small(nn.Module):
    """A matrix, a channels_last weight, a scalar, and what has no elements."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=generator))
        conv = torch.randn(2, 3, 2, 2, generator=generator)
        self.conv = nn.Parameter(conv.to(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(torch.randn((), generator=generator))
        self.none = nn.Parameter(torch.empty(0, 3))


def walk(model: nn.Module, step: int) -> None:
    """The weights behind a step of a random walk, counted from 1."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def averagers(model: nn.Module, **options: int) -> list[rf.Averager]:
    """A pair of averages."""
    return [rf.Averager(model, rf.power_ema(sigma_rel, **options)) for sigma_rel in PAIR]


def walked(
    model: nn.Module,
    owners: list[rf.Averager],
    snapshots: rf.posthoc.Snapshots | None,
    first: int = 1,
    last: int = STEPS,
    behind: Callable[[int], None] = lambda step: None,
) -> None:
    """Steps first, …, last."""
    for step in range(first, last + 1):
        walk(model, step)
        for owner in owners:
            owner.update()
        if snapshots is not None:
            snapshots.update(owners, model)
        behind(step)


def literal(
    paths: list[dict[str, Tensor]], sigma_rel: float, until: int, start: int = 0, every: int = 1
) -> dict[str, Tensor]:
    """The power EMA of weights behind steps 1, 2, … by its equation, in float64."""
    gamma = gamma_of(sigma_rel)
    average: dict[str, Tensor] = {}
    for step in range(start + every, until + 1, every):
        w = 1.0 - (1.0 - every / (step - start)) ** (gamma + 1.0)
        for name, x in paths[step - 1].items():
            a = average.get(name, x.double())
            average[name] = a + (w if name in average else 1.0) * (x.double() - a)
    return average


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.hypot(
        *(
            float((a[n].detach().double() - b[n].detach().double()).norm())
            for n in a
            if a[n].numel()
        )
    )
