"""A small network with real gradients, trained, and the bits that it holds."""

from __future__ import annotations

from typing import Any

import torch
from runs import bits
from torch import nn

import rbwa_fused as rf

FLAT: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "average": rf.ema(0.7)}
WAYS: dict[str, dict[str, Any]] = {
    "where they were": {**FLAT, "flatten": False},
    "reference": {**FLAT, "flatten": False, "backend": "reference"},
}


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))


def take(model: Any, opt: Any, first: int, last: int) -> None:
    """Steps first, …, last, counted from 1."""
    for step in range(first, last + 1):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        opt.step()
        opt.zero_grad()


def held(model: nn.Module) -> dict[str, str | None]:
    return digests(model.state_dict())


def digests(tensors: dict[str, Any]) -> dict[str, str | None]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def evaluated(model: nn.Module, opt: Any) -> dict[str, str | None]:
    x = torch.ones(2, 4)
    with opt.averaged(), torch.no_grad():
        return {**held(model), "output": bits(model(x))}
