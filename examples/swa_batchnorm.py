"""Stochastic weight averaging of a network with BatchNorm, whose statistics must be re-estimated.

    python examples/swa_batchnorm.py

Needs scikit-learn, with which the images come, and half a minute at most. BatchNorm's running mean
and variance belong to the training weights; the averaged weights have other activations.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

try:
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
except ImportError as error:
    sys.exit(f"{error}: pip install scikit-learn, and rbwa_fused as its README says")

EPOCHS, FIRST = 15, 5  # averaged from the end of epoch FIRST on, at a constant learning rate


def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    model.eval()
    scores = model(images)
    right = 100 * (scores.argmax(1) == labels).float().mean().item()
    return f"{right:.1f} % right, loss {cross_entropy(scores, labels).item():.4f}"


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    head = [nn.Flatten(), nn.Linear(32 * 4, 10)]
    model = nn.Sequential(*block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 2), *head)

    average = rf.swa(start=(FIRST - 1) * len(loader), every=len(loader))  # units are steps
    opt = rf.FusedSGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4, average=average)
    for _ in range(EPOCHS):
        model.train()
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    print(f"training weights:                        {evaluate(model, *test)}")
    with opt.averaged():
        print(f"their mean, statistics of the training:  {evaluate(model, *test)}")
    with rf.averaged_model(opt, model, loader):  # a pass over the loader; model.state_dict() in
        print(f"their mean, statistics re-estimated:     {evaluate(model, *test)}")  # here keeps it


if __name__ == "__main__":
    main()
