"""Lightning validates, tests and predicts with the averaged weights.

    python examples/lightning_callback.py

Needs pytorch-lightning and scikit-learn, with which the images come, and half a minute at most.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

try:
    import pytorch_lightning as pl
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
    from rbwa_fused.integrations.lightning import AveragedEvaluation
except ImportError as error:
    sys.exit(f"{error}: pip install pytorch-lightning scikit-learn, rbwa_fused as its README says")


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 16, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", 100 * right, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return rf.FusedSGD(self.parameters(), lr=0.2, momentum=0.9, average=rf.ema(0.99))


def main() -> None:
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=32, shuffle=True)
    test = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=360)
    # Checkpoints would hold the training weights, and with save_averaged=True the averages as well.
    callback = AveragedEvaluation(loader=train)  # on whose images BatchNorm is re-estimated
    trainer = pl.Trainer(
        max_epochs=5, callbacks=[callback], logger=False, enable_checkpointing=False
    )
    model = Digits()
    trainer.fit(model, train, test)
    averaged = trainer.callback_metrics["accuracy"].item()
    (live,) = pl.Trainer(logger=False).validate(model, test)  # without the callback
    print(f"{live['accuracy']:.1f} % right, with averaged weights {averaged:.1f} %")


if __name__ == "__main__":
    main()
