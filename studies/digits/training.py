"""One run: a method and a seed, trained and evaluated after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import rbwa_fused as rf
from studies.digits import data, models
from studies.digits.data import Digits
from studies.digits.methods import METHODS, Method
from studies.digits.options import Settings


class Run(TypedDict):
    """The evaluated weights after each epoch: losses in nats an image, accuracy in percent."""

    method: str
    seed: int
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]


class State(TypedDict):
    """All that a run has come to after a step.

    ``epoch`` are finished, and of the next one ``batch`` batches, drawn in the order that a
    generator in state ``order`` gives.
    """

    run: Run
    epoch: int
    batch: int
    order: Tensor
    model: dict[str, Any]
    optimizer: dict[str, Any]


class Training:
    """A run under way. Initial weights and the order of batches depend on the seed alone."""

    def __init__(self, name: str, seed: int, settings: Settings) -> None:
        self.settings = settings
        self.method = METHODS[name]
        self.model = models.build(settings.model, seed, getattr(torch, settings.dtype))
        self.opt = self.method.optimizer(self.model.parameters(), settings)
        self.run = Run(method=name, seed=seed, train_loss=[], test_loss=[], test_accuracy=[])
        self.epoch = self.batch = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.order = self.generator.get_state()  # before the epoch's order was drawn from it

    def state(self) -> State:
        """What `restore` goes on from; its tensors are the live ones."""
        return State(
            run=self.run,
            epoch=self.epoch,
            batch=self.batch,
            order=self.order,
            model=self.model.state_dict(),
            optimizer=self.opt.state_dict(),
        )

    def restore(self, state: State) -> None:
        """Takes a new run to where that one was."""
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        self.run, self.epoch, self.batch = state["run"], state["epoch"], state["batch"]
        self.generator.set_state(state["order"])
        self.order = state["order"]

    def finish(
        self,
        digits: Digits,
        on_epoch: Callable[[], object],
        every: int = 0,
        keep: Callable[[Training], object] = lambda training: None,
    ) -> Run:
        """Trains what is left of the run; keeps it every so many steps and at each epoch's end."""
        while self.epoch < self.settings.epochs:
            self.model.train()
            batches = data.batches(digits, self.settings.batch_size, self.generator)
            for images, labels in islice(batches, self.batch, None):
                self.step(images, labels)
                last = self.batch == self.settings.steps_per_epoch
                if every > 0 and self.steps % every == 0 and not last:
                    keep(self)
            self.evaluate(digits)
            self.epoch, self.batch = self.epoch + 1, 0
            self.order = self.generator.get_state()
            if every > 0:
                keep(self)
            on_epoch()
        return self.run

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.epoch * self.settings.steps_per_epoch + self.batch

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Trains one batch."""
        self.opt.zero_grad()
        cross_entropy(self.model(images), labels).backward()
        self.method.before_step(self.opt, self.settings, self.steps + 1)
        self.opt.step()
        self.batch += 1

    def evaluate(self, digits: Digits) -> None:
        """Adds the epoch's figures to the run."""
        with evaluated_weights(self.method, self.opt, self.model, digits):
            train_loss, _ = evaluate(self.model, digits.train_images, digits.train_labels)
            test_loss, accuracy = evaluate(self.model, digits.test_images, digits.test_labels)
        self.run["train_loss"].append(train_loss)
        self.run["test_loss"].append(test_loss)
        self.run["test_accuracy"].append(accuracy)


def evaluated_weights(
    method: Method, opt: Optimizer, model: nn.Module, digits: Digits
) -> AbstractContextManager[object]:
    """The average and BatchNorm statistics that belong to it, or the live model.

    All training images fit into one batch, so the statistics are exact after one forward pass.
    Before the first sample there is no average, and nothing is re-estimated.
    """
    if method.averaged and isinstance(opt, rf.FusedSGD) and opt.n_averaged > 0:
        return rf.averaged_model(opt, model, [digits.train_images])
    return nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy in nats and accuracy in percent, in eval mode."""
    model.eval()
    scores = model(images)
    right = int((scores.argmax(1) == labels).sum())
    return cross_entropy(scores, labels).item(), 100.0 * right / len(labels)
