"""What the training programs of test_real_programs.py and test_real_teachers.py have in common: a
network, data, and how near two averages must be."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float64).eps
EPOCHS = 4
Named = Mapping[str, Tensor]


class Net(nn.Sequential):
    """Convolutions with BatchNorm, in float64."""

    def __init__(self, outputs: int = 5) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, outputs),
        )
        self.double()


def images(seed: int, count: int = 6, size: int = 8) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=made, dtype=torch.float64)


def batches(epoch: int, count: int) -> Iterable[tuple[Tensor, Tensor]]:
    for i in range(count):
        made = torch.Generator().manual_seed(1000 * epoch + i)
        yield images(1000 * epoch + i), torch.randint(5, (6,), generator=made)


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    outputs: Tensor = model(images(-1))
    model.train()
    return outputs


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def floating(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: t.clone() for name, t in state.items() if t.is_floating_point()}


def assert_equal_to_rounding(ours: Named, theirs: Named, samples: int) -> None:
    """d a + (1 - d) x, its lerp and a + w (x - a) round eight times at most, by half a unit of the
    larger of a and x each, so that a sample adds four units; what there was before shrinks."""
    assert ours.keys() >= theirs.keys()
    for name, value in theirs.items():
        unit = EPS * max(1.0, value.abs().max().item())
        assert (ours[name] - value).abs().max() <= 4 * samples * unit, name
