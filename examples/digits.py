"""Trains a small network on scikit-learn's digits with an EMA of its weights.

    python examples/digits.py

Needs scikit-learn, with which the images come, and a few seconds.
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

EPOCHS = 15


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    # torch.optim.SGD with one argument more; 0.99 remembers some 100 steps, two epochs.
    opt = rf.FusedSGD(model.parameters(), lr=0.2, momentum=0.9, average=rf.ema(0.99))
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        live = accuracy(model, *test)
        with opt.averaged():  # the averaged weights inside, the training weights again outside
            averaged = accuracy(model, *test)
        print(f"epoch {epoch:2}: {live:.1f} % right, with averaged weights {averaged:.1f} %")


if __name__ == "__main__":
    main()
