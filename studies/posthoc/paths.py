"""Three paths of weights, with snapshots of a pair of averages and the true ones of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

import rbwa_fused as rf
from rbwa_fused.posthoc import Snapshots
from rbwa_fused.power import gamma_of

PAIR = (0.05, 0.10)
STEPS = 5_000
ELEMENTS = 10_000  # of the walk

Step = Callable[[int], None]  # moves the weights, behind steps counted from 1


def walk() -> tuple[nn.Module, Step]:
    """Weights that wander without aim."""
    model = nn.ParameterList([torch.zeros(ELEMENTS)])
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(number: int) -> None:
        model[0].add_(torch.randn(ELEMENTS, generator=generator))

    return model, step


def digits(rate: Callable[[float], float]) -> tuple[nn.Module, Step]:
    """A small network on scikit-learn's digits, by AdamW; its rate is that of the share done."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32) / 16
    answers = torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    generator = torch.Generator().manual_seed(1)

    def step(number: int) -> None:
        opt.param_groups[0]["lr"] = rate((number - 1) / STEPS)
        batch = torch.randint(len(images), (32,), generator=generator)
        opt.zero_grad()
        cross_entropy(model(images[batch]), answers[batch]).backward()
        opt.step()

    return model, step


PATHS: dict[str, Callable[[], tuple[nn.Module, Step]]] = {
    "random walk": walk,
    "constant rate": lambda: digits(lambda done: 1e-3),
    "cosine": lambda: digits(lambda done: 1e-3 * (1 + math.cos(math.pi * done)) / 2),
}


def followed(
    path: str, folders: dict[int, Path], lengths: Sequence[float], done: Callable[[], object]
) -> tuple[Tensor, Tensor]:
    """Trains, and writes so many snapshots into each folder.

    Returns:
        The true averages of these lengths, (lengths, elements), float64, and the weights.
    """
    model, step = PATHS[path]()
    owners = [rf.Averager(model, rf.power_ema(sigma_rel)) for sigma_rel in PAIR]
    taken = [Snapshots(folder, every=STEPS // count) for count, folder in folders.items()]
    gammas = torch.tensor([gamma_of(length) for length in lengths], dtype=torch.float64)
    weights = parameters_to_vector(model.parameters()).detach().double()
    true = weights.expand(len(lengths), -1).clone()
    for number in range(1, STEPS + 1):
        step(number)
        for owner in owners:
            owner.update()
        for snapshots in taken:
            snapshots.update(owners, model)
        weights = parameters_to_vector(model.parameters()).detach().double()
        share = 1 - (1 - 1 / number) ** (gammas + 1)
        true += share[:, None] * (weights - true)
        done()
    return true, weights
