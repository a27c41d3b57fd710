"""The networks: small enough for hundreds of epochs a minute on one core."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def small(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Three convolutions with BatchNorm, 14,458 parameters on digits."""
    layers: list[nn.Module] = []
    for width_in, width_out, stride in ((channels, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [
            nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def mlp() -> nn.Sequential:
    """One hidden layer of 64, no BatchNorm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS: dict[str, Callable[[], nn.Sequential]] = {"small": small, "mlp": mlp}


def build(name: str, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The network of that name; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype)
