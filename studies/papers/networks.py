"""The networks: the demo's small ones and torchvision's, with a stem for small images."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import nn

from studies.digits import models

VGG_SIDE = 32  # five halvings of the side: smaller images are enlarged to this


def small(channels: int, classes: int, stem: str) -> nn.Module:
    """The demo's three convolutions, 14,458 parameters on digits; it has no stem to choose."""
    return models.small(channels, classes)


def resnet(build: Callable[..., nn.Module]) -> Callable[[int, int, str], nn.Module]:
    """torchvision's network. Stem ``small``: a 3x3 convolution of stride 1 and no max-pool."""

    def network(channels: int, classes: int, stem: str) -> nn.Module:
        net = build(num_classes=classes)
        if stem == "small":
            net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        elif channels != 3:
            net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        return net

    return network


def vgg16(channels: int, classes: int, stem: str) -> nn.Module:
    """torchvision's VGG-16 with BatchNorm. Stem ``small``: one head from 512 to the classes."""
    net = torchvision.models.vgg16_bn(num_classes=classes if stem == "imagenet" else 1)
    if stem == "small":
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Sequential(nn.Linear(512, classes))
    if channels != 3:
        net.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    return net


NETWORKS: dict[str, Callable[[int, int, str], nn.Module]] = {
    "small": small,
    "mlp": lambda channels, classes, stem: models.mlp(),
    "resnet18": resnet(torchvision.models.resnet18),
    "resnet50": resnet(torchvision.models.resnet50),
    "vgg16": vgg16,
}


def build(name: str, channels: int, classes: int, stem: str, seed: int) -> nn.Module:
    """The network of that name; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return NETWORKS[name](channels, classes, stem)
