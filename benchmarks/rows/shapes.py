"""Parameter shapes of four models, so that a GPU's machine needs no torchvision, and the CPU steps
transformers.

ResNet-18 and ResNet-50 as torchvision builds them, GPT-2 small with tied embeddings (124M), and a
transformer of the same blocks with a billion parameters. A step reads no activations, so shapes,
in the order in which a model lists them, are all that it sees of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from benchmarks.rows.problem import Problem, torchvision_model, with_gradients

CLASSES = 1000  # of ImageNet
VOCABULARY, CONTEXT = 50257, 1024  # of GPT-2
WEIGHT_SCALE = 0.1

Shape = tuple[int, ...]


@dataclass
class Layout:
    """Shapes of parameters and buffers, in a model's order; an empty buffer shape is a counter."""

    parameters: list[Shape] = field(default_factory=list)
    buffers: list[Shape] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(map(prod, self.parameters))

    def convolution(self, inputs: int, outputs: int, kernel: int) -> None:
        """A convolution without bias, and its BatchNorm."""
        self.parameters += [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]
        self.buffers += [(outputs,), (outputs,), ()]

    def layer_norm(self, width: int) -> None:
        self.parameters += [(width,), (width,)]

    def linear(self, first: int, second: int, bias: int) -> None:
        self.parameters += [(first, second), (bias,)]


def resnet(depths: Sequence[int], *, bottleneck: bool) -> Layout:
    """A ResNet for ImageNet with so many blocks in each of its four stages."""
    layout = Layout()
    layout.convolution(3, 64, 7)
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = 4 * width if bottleneck else width
        for _ in range(depth):
            if bottleneck:
                layout.convolution(channels, width, 1)
                layout.convolution(width, width, 3)
                layout.convolution(width, outputs, 1)
            else:
                layout.convolution(channels, width, 3)
                layout.convolution(width, outputs, 3)
            if channels != outputs:  # the shortcut
                layout.convolution(channels, outputs, 1)
            channels = outputs
    layout.linear(CLASSES, channels, CLASSES)
    return layout


def transformer(width: int, blocks: int) -> Layout:
    """GPT-2's decoder; its head is the token embedding."""
    layout = Layout([(VOCABULARY, width), (CONTEXT, width)])
    for _ in range(blocks):
        layout.layer_norm(width)
        layout.linear(width, 3 * width, 3 * width)  # attention
        layout.linear(width, width, width)
        layout.layer_norm(width)
        layout.linear(width, 4 * width, 4 * width)  # MLP
        layout.linear(4 * width, width, width)
    layout.layer_norm(width)
    return layout


MODELS: dict[str, Callable[[], Layout]] = {
    "resnet18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "gpt2": lambda: transformer(768, 12),
    "transformer-1b": lambda: transformer(2048, 18),
}


class Weights(nn.Module):
    """A module with a layout's parameters, random, and its buffers; it has no forward pass."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def parameter(shape: Shape) -> nn.Parameter:
            drawn = torch.randn(shape, generator=generator, device=device)
            return nn.Parameter(drawn.mul_(WEIGHT_SCALE).to(dtype))

        self.weights = nn.ParameterList([parameter(shape) for shape in layout.parameters])
        for i, shape in enumerate(layout.buffers):
            kind = dtype if shape else torch.int64
            self.register_buffer(f"buffer{i}", torch.zeros(shape, dtype=kind, device=device))


def problem(layout: Layout, dtype: torch.dtype, device: torch.device) -> Problem:
    """A layout's weights and gradients, drawn on the device."""
    return with_gradients(Weights(layout, dtype, device))


def network(name: str, dtype: torch.dtype) -> nn.Module:
    """What the CPU steps: torchvision's model, or the weights of one of MODELS.

    Raises:
        ValueError: for a name that is neither.
    """
    from torchvision.models import list_models

    if name in list_models():
        return torchvision_model(name, dtype)
    if name in MODELS:
        return Weights(MODELS[name](), dtype, torch.device("cpu"))
    known = f"{', '.join(MODELS)} or one of torchvision.models.list_models()"
    raise ValueError(f"unknown model: {name} (expected {known})")


def bytes_needed(name: str, dtype: torch.dtype, rows: int) -> int:
    """About what a process takes that measures so many rows: three streams in each, four where
    a 16-bit row keeps a float32 average, two sets of gradients, the model, and temporaries."""
    if name in MODELS:
        numel = MODELS[name]().numel
    else:
        with torch.device("meta"):
            numel = sum(p.numel() for p in network(name, torch.float32).parameters())
    streams = 4 if dtype.itemsize == 2 else 3
    return int(numel) * dtype.itemsize * (streams * rows + 7)
