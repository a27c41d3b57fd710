"""What is stepped: a model's parameters, two sets of random gradients, and learning rates."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LR = 0.1
GRADIENT_SCALE = 0.1  # weights move by about their own size in a few steps, so mistakes show


@dataclass(frozen=True)
class Problem:
    """One model to step. Providers get copies of it and share the gradients.

    Attributes:
        model: its parameters in the dtype that is measured.
        gradients: two sets, taken in turn, so that no step sees the same gradient twice.
        lrs: learning rate of each param group; the parameters are dealt out evenly, in order.
        tensor_lr: the optimizers get it as a tensor beside the parameters, which a schedule can
            change under a captured graph.
    """

    model: nn.Module
    gradients: tuple[list[Tensor], list[Tensor]]
    lrs: tuple[float, ...] = (LR,)
    tensor_lr: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def copy(self) -> nn.Module:
        """A model of its own for one provider."""
        return deepcopy(self.model)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The param groups of such a copy."""
        params = list(model.parameters())
        size = len(params) // len(self.lrs)
        return [
            {
                "params": params[i * size : (i + 1) * size],
                "lr": torch.tensor(lr, device=self.device) if self.tensor_lr else lr,
            }
            for i, lr in enumerate(self.lrs)
        ]

    def lr_of(self, index: int) -> float:
        """Learning rate of a parameter."""
        return self.lrs[index // (len(list(self.model.parameters())) // len(self.lrs))]


def with_gradients(model: nn.Module, lrs: tuple[float, ...] = (LR,), seed: int = 0) -> Problem:
    """A model, and random gradients for it, drawn where it is.

    Raises:
        ValueError: if the parameters cannot be dealt out evenly to the learning rates.
    """
    params = list(model.parameters())
    if len(params) % len(lrs):
        raise ValueError(f"{len(params)} parameters cannot be dealt out to {len(lrs)} groups")
    device = params[0].device
    generator = torch.Generator(device).manual_seed(seed)

    def gradient(p: Tensor) -> Tensor:
        drawn = torch.randn(p.shape, generator=generator, device=device)
        # In the parameter's layout, as autograd's are; torch's fused SGD minds no other.
        return torch.empty_like(p, requires_grad=False).copy_(drawn.mul_(GRADIENT_SCALE))

    def gradients() -> list[Tensor]:
        return [gradient(p) for p in params]

    return Problem(model, (gradients(), gradients()), lrs)


def small_tensors(count: int = 62, size: int = 8, groups: int = 1) -> Problem:
    """Tensors so small that only the host's time is left, in groups of different lr."""
    generator = torch.Generator().manual_seed(1)
    tensors = [nn.Parameter(torch.randn(size, generator=generator)) for _ in range(count)]
    return with_gradients(nn.ParameterList(tensors), tuple(LR / (1 + i) for i in range(groups)))


def torchvision_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A randomly initialised model of torchvision, BatchNorm buffers and all."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    model: nn.Module = get_model(name, weights=None)
    return model.to(dtype)
