"""How flat a solution is: losses along random rays from it, and between two solutions.

Izmailov et al. (2018) draw directions uniformly from the unit sphere of all weights and measure
distances in weight space: ``sphere``. A network with BatchNorm does not change when a filter is
scaled, so such distances also tell how large the weights are; ``filter`` (Li et al. 2018) gives
each filter's part of the direction the norm of that filter, and zero to biases and BatchNorm, so
that distances are fractions of the weights. BatchNorm is estimated anew at every point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import update_bn

from studies.papers import networks
from studies.papers.datasets import Data
from studies.papers.settings import Setting
from studies.papers.systems import System
from studies.papers.training import Learner, estimation, score_of, scores

POINTS = 31  # on a ray, denser near the solution
SEGMENT = tuple(round(-0.5 + 0.1 * k, 1) for k in range(21))  # 0 and 1 are the solutions
RISE = 3.0  # a ray's test loss at its end, over that of the solution
SMALLEST, LARGEST = 2.0**-8, 2.0**12  # radii

Losses = Callable[[Tensor], tuple[float, float]]
DIRECTIONS = ("sphere", "filter")


def probe(
    pair: Sequence[System],
    setting: Setting,
    lr: float,
    seed: int,
    data: Data,
    rays: int,
    directions: str,
    on_epoch: Callable[[], object],
) -> dict[str, Any]:
    """Trains both systems alike and measures around and between them; a record of results.json."""
    solutions = [solution(system, setting, lr, seed, data, on_epoch) for system in pair]
    network = networks.build(
        setting.model, data.train.images.shape[1], data.classes, setting.stem, seed
    ).to(solutions[0])

    def losses(weights: Tensor) -> tuple[float, float]:
        vector_to_parameters(weights, network.parameters())
        update_bn(estimation(data, setting), network)
        train, test = (
            score_of(scores(network, part.images), part).loss for part in (data.train, data.test)
        )
        return train, test

    draw = direction_on_sphere if directions == "sphere" else direction_by_filter
    generator = torch.Generator().manual_seed(seed)
    drawn = [noise_like(solutions[0], generator) for _ in range(rays)]
    around = [[draw(noise, center, network) for noise in drawn] for center in solutions]
    radius = max(
        radius_of_rise(losses, center, rays_of[0])
        for center, rays_of in zip(solutions, around, strict=True)
    )
    distances = [radius * (k / (POINTS - 1)) ** 2 for k in range(POINTS)]
    measured = [
        [curve(losses, center, ray, distances) for ray in rays_of]
        for center, rays_of in zip(solutions, around, strict=True)
    ]
    way = solutions[1] - solutions[0]
    between = curve(losses, solutions[0], way, SEGMENT)
    return {
        "distances": distances,
        "train_loss": [[ray[0] for ray in rays_of] for rays_of in measured],
        "test_loss": [[ray[1] for ray in rays_of] for rays_of in measured],
        "apart": way.norm().item(),
        "norms": [center.norm().item() for center in solutions],
        "segment": list(SEGMENT),
        "segment_train_loss": between[0],
        "segment_test_loss": between[1],
    }


def solution(
    system: System,
    setting: Setting,
    lr: float,
    seed: int,
    data: Data,
    on_epoch: Callable[[], object],
) -> Tensor:
    """The weights that the system gives, in one vector."""
    learner = Learner(system, setting, lr, seed, data)
    for _ in range(setting.epochs):
        learner.epoch()
        on_epoch()
    with learner.tested() as network:
        return parameters_to_vector(network.parameters()).detach().clone()


def noise_like(center: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(center.shape, generator=generator, dtype=torch.float64).to(center)


def direction_on_sphere(noise: Tensor, center: Tensor, network: nn.Module) -> Tensor:
    """Uniform on the unit sphere."""
    return noise / noise.norm()


def direction_by_filter(noise: Tensor, center: Tensor, network: nn.Module) -> Tensor:
    """Each filter's part as long as the filter; nothing along biases and BatchNorm's weights."""
    direction = torch.zeros_like(noise)
    first = 0
    for p in network.parameters():
        part = slice(first, first + p.numel())
        first += p.numel()
        if p.dim() > 1:
            filters, random = center[part].view(len(p), -1), noise[part].view(len(p), -1)
            lengths = filters.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
            direction[part] = (random * lengths).flatten()
    return direction


def radius_of_rise(losses: Losses, center: Tensor, direction: Tensor) -> float:
    """The distance, a power of 2, at which the test loss has risen well beyond its double."""
    wanted = RISE * losses(center)[1]
    radius = SMALLEST
    while radius < LARGEST and losses(center + radius * direction)[1] < wanted:
        radius *= 2.0
    return radius


def curve(
    losses: Losses, center: Tensor, direction: Tensor, distances: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Training and test losses at these distances."""
    points = [losses(center + distance * direction) for distance in distances]
    return [train for train, _ in points], [test for _, test in points]


def doubling(distances: Sequence[float], curve: Sequence[float | None]) -> float:
    """The distance at which the loss is first twice that at the solution, between two points by a
    straight line; infinity if it is nowhere on the ray. A loss that overflowed has doubled."""
    values = [math.inf if value is None or math.isnan(value) else value for value in curve]
    wanted = 2.0 * values[0]
    for k in range(1, len(values)):
        if values[k] >= wanted:
            if math.isinf(values[k]):
                return distances[k]
            part = (wanted - values[k - 1]) / (values[k] - values[k - 1])
            return distances[k - 1] + part * (distances[k] - distances[k - 1])
    return math.inf
