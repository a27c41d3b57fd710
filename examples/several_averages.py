"""Trains a small network on scikit-learn's digits and keeps two averages of its weights.

    python examples/several_averages.py

Which length is best is seen while it trains. Needs scikit-learn, with which the images come, and a
few seconds.
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
def tested(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    model.eval()
    scores = model(images)
    right = 100 * (scores.argmax(1) == labels).float().mean().item()
    return f"loss {cross_entropy(scores, labels).item():.3f}, {right:.1f} % right"


def main() -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    # Both in the step's own pass. Their lengths are shares of the run so far: 5 and 10 %.
    averages = {"short": rf.power_ema(0.05), "long": rf.power_ema(0.10)}
    opt = rf.FusedAdamW(model.parameters(), lr=0.01, average=averages)
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        line = f"epoch {epoch:2}: {tested(model, *test)}"
        for name in averages:
            with opt.averaged(which=name):
                line += f"; {name} average: {tested(model, *test)}"
        print(line)


if __name__ == "__main__":
    main()
