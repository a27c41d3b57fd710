"""A small model, trained by transformers' Trainer, and what it held at every turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beside import as_bits
from networks import digests, held
from runs import bits
from torch import Tensor, nn

import rbwa_fused as rf

transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

from rbwa_fused.integrations.transformers import AveragedWeights  # noqa: E402

EPOCHS = 3
BATCHES = 6  # an epoch
STEPS = EPOCHS * BATCHES

QUIET = [pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true")]

Held = dict[str, str | None]


class Net(nn.Module):
    """Linear, BatchNorm, dropout, linear; notes the bits that it is evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 1)
        )
        self.seen: list[tuple[Held, str | None]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        loss = (out.float() - labels).square().mean()
        if not self.training:
            self.seen.append((held(self), bits(loss)))
        return {"loss": loss, "logits": out}


def data(count: int = 4 * BATCHES) -> list[dict[str, Tensor]]:
    """Four a batch."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.sum().sin().reshape(1)} for row in x]


class Noting(transformers.TrainerCallback):  # type: ignore[misc]
    """The weights as each train() begins and behind each step of the optimizer; what is killed
    ends with an exception."""

    def __init__(self, dies: int | None = None) -> None:
        self.began: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.dies = dies

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.began.append(copy.deepcopy(others["model"].state_dict()))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.weights.append(copy.deepcopy(others["model"].state_dict()))

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.dies:
            raise KeyboardInterrupt


def trainer(
    folder: Path,
    *callbacks: Any,
    model: nn.Module | None = None,
    optimizer: Callable[[nn.Module], Any] | None = None,
    kind: Any = transformers.Trainer,
    **options: Any,
) -> Any:
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": True,
            **options,
        }
    )
    model = Net() if model is None else model
    run = kind(
        model,
        args,
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=list(callbacks),
        optimizers=(None if optimizer is None else optimizer(model), None),
    )
    run.remove_callback(transformers.PrinterCallback)
    return run


def averager_of(callback: AveragedWeights) -> rf.Averager:
    assert callback.averager is not None
    return callback.averager


def ends(run: Any, callback: AveragedWeights) -> Any:
    """What a run has come to: with averages and without, and its optimizer."""
    found = [held(run.model), as_bits(run.optimizer.state_dict()["state"])]
    if callback.averager is not None:
        found += [as_bits(callback.averager.averages()), callback.averager.n_averaged]
    callback.restore()
    return [*found, held(run.model)]


def replayed(weights: list[dict[str, Tensor]], policy: rf.Average, **options: Any) -> list[Held]:
    """The model as it is with averaged weights behind steps 1, 2, …, to the bit."""
    twin = Net()
    averager = rf.Averager(twin, policy, **options)
    found = []
    for now in weights:
        twin.load_state_dict(now)
        averager.update()
        found.append(digests(averager.averaged_state_dict()))
    return found


def literal(
    weights: list[dict[str, Tensor]], sampled: Callable[[int], bool], weight: Callable[[int], float]
) -> dict[str, Tensor]:
    """The average of the weights behind steps 1, 2, …, in float64."""
    average: dict[str, Tensor] = {}
    n = 0
    for step, now in enumerate(weights, start=1):
        if not sampled(step):
            continue
        for name, x in now.items():
            a = average.get(name, x.double())
            average[name] = a + (1.0 if n == 0 else weight(n)) * (x.double() - a)
        n += 1
    return average
