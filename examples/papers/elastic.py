"""Elastic replicas: several networks drawn towards their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def strength(finished: int, epochs: int) -> float:
    """alpha = 1 - T / T_max, T finished epochs: nearly one network at first, free at the end."""
    return 1.0 - finished / epochs


@torch.no_grad()
def pull(networks: Sequence[nn.Module], alpha: float) -> None:
    """theta_k <- theta_k + alpha (mean - theta_k) for every parameter, in place."""
    for copies in zip(*(network.parameters() for network in networks), strict=True):
        mean = torch.stack([p.detach() for p in copies]).mean(0)
        for p in copies:
            p.lerp_(mean, alpha)
