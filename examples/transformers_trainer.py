"""transformers' Trainer evaluates, keeps the best of and saves averages of what its AdamW trains.

    python examples/transformers_trainer.py digits

Needs transformers, accelerate and scikit-learn, with which the images come, and half a minute at
most. Checkpoints go into the folder; started again, a run that was killed goes on from the last.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

try:
    from sklearn.datasets import load_digits
    from transformers import EvalPrediction, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    import rbwa_fused as rf
    from rbwa_fused.integrations.transformers import AveragedWeights
except ImportError as error:
    sys.exit(
        f"{error}: pip install transformers accelerate scikit-learn, rbwa_fused as its README says"
    )


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.network(images)
        return {"loss": cross_entropy(scores, labels), "logits": scores}


def accuracy(found: EvalPrediction) -> dict[str, float]:
    right = torch.tensor(found.predictions).argmax(1) == torch.tensor(found.label_ids)
    return {"accuracy": 100 * right.float().mean().item()}


def main(folder: str) -> None:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    rows = [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    args = TrainingArguments(
        folder,
        num_train_epochs=8,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=360,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to=[],
    )
    torch.manual_seed(0)
    trainer = Trainer(
        Digits(),
        args,
        train_dataset=rows[:1437],
        eval_dataset=rows[1437:],
        compute_metrics=accuracy,
        callbacks=[AveragedWeights(rf.ema(0.99))],
    )
    started = Path(folder).is_dir() and get_last_checkpoint(folder) is not None
    trainer.train(resume_from_checkpoint=started)
    best = trainer.evaluate()  # of the averaged weights, as every evaluation above
    trainer.save_model()  # the same
    print(f"the best averaged weights: {best['eval_accuracy']:.1f} % right")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("start it with python examples/transformers_trainer.py digits")
    main(sys.argv[1])
