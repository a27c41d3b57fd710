"""Trains a small network on scikit-learn's digits, and chooses how much to average when it is done.

    python examples/posthoc.py

Needs scikit-learn, with which the images come, and a few seconds.
"""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

try:
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
except ImportError as error:
    sys.exit(f"{error}: pip install scikit-learn, and rbwa_fused as its README says")

EPOCHS = 20


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main(folder: str) -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    # As long as 5 and 10 % of the run so far; ten snapshots make what lies between, and beyond.
    pair = [rf.power_ema(0.05), rf.power_ema(0.10)]
    opt = rf.FusedAdamW(model.parameters(), lr=0.005, average=pair)
    snapshots = rf.posthoc.Snapshots(folder, every=EPOCHS * len(loader) // 10)
    for _ in range(EPOCHS):
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            snapshots.update(opt, model)
    print(f"training weights: {accuracy(model, *test):.1f} % right")

    for length in (0.05, 0.075, 0.10, 0.15):
        made = rf.posthoc.synthesize(folder, sigma_rel=length)
        assert made.state_dict is not None
        model.load_state_dict(made.state_dict)
        near = f"profile off by {made.residual:.3f}"
        print(f"average of length {length}, {near}: {accuracy(model, *test):.1f} % right")


if __name__ == "__main__":
    with TemporaryDirectory() as snapshots:
        main(snapshots)
