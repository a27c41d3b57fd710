"""Recurrent batch weight averaging, beside the plain SGD that it equals.

    python examples/rbwa.py

Needs scikit-learn, with which the images come, and a few seconds. RBWA writes the running mean of
the weights back after every batch. That is SGD with learning rate lr / (n + 1) after n samples, so
compare it with that before you credit the averaging.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

try:
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
except ImportError as error:
    sys.exit(f"{error}: pip install scikit-learn, and rbwa_fused as its README says")

EPOCHS, START, LR = 15, 10, 0.2  # the first START epochs are not averaged


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    scores = model(images)
    right = 100 * (scores.argmax(1) == labels).float().mean().item()
    return f"{right:.1f} % right, loss {cross_entropy(scores, labels).item():.6f}"


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    start = START * len(loader)
    rbwa = rf.rbwa(steps_per_epoch=len(loader), start_epoch=START)
    for name, policy, factor in (
        ("RBWA", rbwa, lambda step: 1.0),
        ("SGD, lr / (n + 1)", None, lambda step: 1 / (max(0, step - start) + 1)),
        ("SGD, constant lr", None, lambda step: 1.0),
    ):
        torch.manual_seed(0)  # the same initial weights and the same batches for all
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        opt = rf.FusedSGD(model.parameters(), LR, momentum=0.9, average=policy)
        schedule = LambdaLR(opt, factor)
        for _ in range(EPOCHS):
            for x, y in loader:
                cross_entropy(model(x), y).backward()
                opt.step()
                opt.zero_grad()
                schedule.step()
        print(f"{name:18} {evaluate(model, *test)}")  # RBWA's average is the weights themselves


if __name__ == "__main__":
    main()
