"""Mixed precision with a GradScaler, and an EMA that no skipped step enters.

    python examples/amp.py

Needs scikit-learn, with which the images come, and a few seconds; takes the GPU if there is one.
A step whose scaled gradients overflow is skipped: weights, momentum, average and its count stay.
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = (torch.tensor(pixels, dtype=torch.float32) / 16).to(device)
    labels = torch.tensor(digits).to(device)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)

    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.99))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # too large at first, on purpose
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for x, y in loader:
            with torch.autocast(device, torch.float16):
                loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(opt)  # unscales inside of the step, in the same pass over memory
            scaler.update()
            opt.zero_grad()
        live = accuracy(model, *test)
        with opt.averaged():
            averaged = accuracy(model, *test)
        print(f"epoch {epoch:2}: {live:.1f} % right, with averaged weights {averaged:.1f} %")
    steps = EPOCHS * len(loader)
    print(f"{steps} steps, {opt.n_averaged} of them averaged, {steps - opt.n_averaged} skipped")


if __name__ == "__main__":
    main()
