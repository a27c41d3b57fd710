"""One run: a method and a seed, trained and evaluated after every epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import rbwa_fused as rf
from examples import data, models
from examples.data import Digits
from examples.methods import METHODS, Method
from examples.options import Settings


class Run(TypedDict):
    """The evaluated weights after each epoch: losses in nats an image, accuracy in percent."""

    method: str
    seed: int
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]


def train(
    name: str, seed: int, settings: Settings, digits: Digits, on_epoch: Callable[[], object]
) -> Run:
    """Trains one method. Initial weights and the order of batches depend on the seed alone."""
    method = METHODS[name]
    model = models.build(settings.model, seed, digits.train_images.dtype)
    opt = method.optimizer(model.parameters(), settings)
    order = torch.Generator().manual_seed(seed)
    run = Run(method=name, seed=seed, train_loss=[], test_loss=[], test_accuracy=[])
    step = 0
    for _ in range(settings.epochs):
        model.train()
        for images, labels in data.batches(digits, settings.batch_size, order):
            step += 1
            opt.zero_grad()
            cross_entropy(model(images), labels).backward()
            method.before_step(opt, settings, step)
            opt.step()
        with evaluated_weights(method, opt, model, digits):
            train_loss, _ = evaluate(model, digits.train_images, digits.train_labels)
            test_loss, accuracy = evaluate(model, digits.test_images, digits.test_labels)
        run["train_loss"].append(train_loss)
        run["test_loss"].append(test_loss)
        run["test_accuracy"].append(accuracy)
        on_epoch()
    return run


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
