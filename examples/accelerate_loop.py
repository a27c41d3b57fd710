"""accelerate prepares, accumulates, clips and saves; an Averager keeps an EMA behind its AdamW.

    python examples/accelerate_loop.py

Needs accelerate and scikit-learn, with which the images come, and a few seconds; takes the GPU if
there is one. With `accelerate launch examples/accelerate_loop.py` the settings are accelerate's.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

try:
    from accelerate import Accelerator
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
except ImportError as error:
    sys.exit(f"{error}: pip install accelerate scikit-learn, rbwa_fused as its README says")

EPOCHS = 15


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train = TensorDataset(images[:1437], labels[:1437])
    test = images[1437:].to(accelerator.device), labels[1437:].to(accelerator.device)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model, opt, loader = accelerator.prepare(
        network,
        torch.optim.AdamW(network.parameters(), lr=1e-2),
        DataLoader(train, batch_size=32, shuffle=True),
    )
    # Samples behind the steps that are taken: not while gradients accumulate, nor where one is
    # skipped. save_state and load_state have it from here on; call them outside of averaged().
    averager = rf.Averager(network, rf.ema(0.99), optimizer=opt)
    accelerator.register_for_checkpointing(averager)
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
        live = accuracy(model, *test)
        with averager.averaged():
            averaged = accuracy(model, *test)
        accelerator.print(
            f"epoch {epoch:2}: {live:.1f} % right, with averaged weights {averaged:.1f} %"
        )


if __name__ == "__main__":
    main()
