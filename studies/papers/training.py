"""One run: a system, a learning rate and a seed, trained and tested after every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.optim.swa_utils import update_bn

import rbwa_fused as rf
from studies.papers import networks, schedules
from studies.papers.datasets import Data, Images, batches
from studies.papers.settings import Setting, recipe
from studies.papers.systems import FGE_EPOCHS, System

FORWARD = 1500  # most images of a forward pass without gradients
BATCHNORM_SEED = 2**31  # of the crops under which BatchNorm is estimated anew
ORDER = 2**20  # between the data orders of replicas, far from other seeds


class Score(NamedTuple):
    """Mean cross entropy in nats an image, accuracy in percent."""

    loss: float
    accuracy: float


class Curves(TypedDict):
    """After each epoch, of the weights that the system gives."""

    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]


class Learner:
    """One system in training. Initial weights and data order depend on the seed alone.

    Replicas start alike and see the data in orders of their own; the first one's is that of the
    other systems.
    """

    def __init__(self, system: System, setting: Setting, lr: float, seed: int, data: Data) -> None:
        self.system, self.setting, self.data = system, setting, data
        self.recipe = recipe(setting, lr, len(data.train.labels))
        images = data.train.images
        self.networks = [
            networks.build(setting.model, images.shape[1], data.classes, setting.stem, seed)
            .to(images.dtype)
            .to(images.device)
            for _ in range(system.replicas)
        ]
        self.optimizers = [system.build(n.parameters(), self.recipe) for n in self.networks]
        self.rates = [opt.param_groups[0]["lr"] for opt in self.optimizers]
        self.orders = [
            torch.Generator().manual_seed(seed + ORDER * k) for k in range(system.replicas)
        ]
        self.votes: list[tuple[Tensor, Tensor]] = []  # of snapshots: training and test images
        self.step = 0
        self.epochs = 0

    def epoch(self) -> None:
        """One pass over the training images."""
        for network in self.networks:
            network.train()
        for turn in zip(*(self.epoch_of(order) for order in self.orders), strict=True):
            self.step += 1
            for k, (images, labels) in enumerate(turn):
                self.optimizers[k].zero_grad()
                cross_entropy(self.networks[k](images), labels).backward()
                self.set_hyperparameters(k)
                self.optimizers[k].step()
            if self.snapshot_due():
                self.take_snapshot()
        self.epochs += 1
        if len(self.networks) > 1:
            self.elastic().pull(self.epochs)

    def elastic(self) -> rf.Elastic:
        """Pulls the replicas to their mean: nearly equal at first, left alone at the end."""
        return rf.Elastic(self.networks, epochs=self.recipe.epochs)

    def epoch_of(self, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        augment = self.setting.augment != "none"
        return batches(self.data, self.setting.batch_size, augment, order)

    def set_hyperparameters(self, k: int) -> None:
        lr = self.rates[k] * self.recipe.base(self.step)
        lr *= self.system.factor(self.recipe, self.step)
        for group in self.optimizers[k].param_groups:
            group["lr"] = lr
            group.update(self.system.others(self.recipe, self.step))

    def snapshot_due(self) -> bool:
        past = self.step - self.recipe.start
        cycle = FGE_EPOCHS * self.recipe.steps_per_epoch
        return (
            self.system.tested == "ensemble"
            and past > 0
            and schedules.lowest_of_triangle(past, cycle)
        )

    def take_snapshot(self) -> None:
        """A snapshot votes once, with its own BatchNorm statistics, and is not kept."""
        network = self.networks[0]
        train, test = (
            scores(network, part.images).softmax(1) for part in (self.data.train, self.data.test)
        )
        self.votes.append((train, test))
        network.train()

    def evaluate(self) -> tuple[Score, Score]:
        """Of the training and the test images."""
        parts = (self.data.train, self.data.test)
        if self.votes:
            means = [torch.stack(votes).mean(0) for votes in zip(*self.votes, strict=True)]
            return (
                score_of(means[0].log(), parts[0], nll_loss),
                score_of(means[1].log(), parts[1], nll_loss),
            )
        with self.tested() as network:
            first, second = (score_of(scores(network, part.images), part) for part in parts)
        return first, second

    @contextmanager
    def tested(self) -> Iterator[nn.Module]:
        """The network that the system gives: averaged weights with BatchNorm to match, or live."""
        network, opt = self.networks[0], self.optimizers[0]
        if len(self.networks) > 1:
            mean = copy.deepcopy(network)
            mean.load_state_dict(self.elastic().averaged_state_dict(network))
            update_bn(estimation(self.data, self.setting), mean)
            yield mean
        elif (
            self.system.tested == "average" and isinstance(opt, rf.FusedSGD) and opt.n_averaged > 0
        ):
            with rf.averaged_model(opt, network, estimation(self.data, self.setting)):
                yield network
        else:  # before the first sample there is no average
            yield network


def estimation(data: Data, setting: Setting) -> Iterable[list[Tensor]]:
    """All training images in few even batches, augmented as in training: BatchNorm's estimate."""
    parts = -(-len(data.train.labels) // FORWARD)
    if setting.augment == "none":
        return [[images] for images in data.train.images.tensor_split(parts)]
    order = torch.Generator().manual_seed(BATCHNORM_SEED)
    size = len(data.train.labels) // parts
    return ([images] for images, _ in batches(data, size, True, order))


@torch.no_grad()
def scores(network: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, classes] in eval mode."""
    network.eval()
    return torch.cat([network(part) for part in images.split(FORWARD)])


def score_of(
    outputs: Tensor, images: Images, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
) -> Score:
    """Of logits, or of log probabilities with ``nll_loss``."""
    right = int((outputs.argmax(1) == images.labels).sum())
    return Score(loss(outputs, images.labels).item(), 100.0 * right / len(images.labels))


def train(
    system: System,
    setting: Setting,
    lr: float,
    seed: int,
    data: Data,
    on_epoch: Callable[[], object],
    tested: Literal["every epoch", "at the end"] = "every epoch",
) -> Curves:
    """Trains for the setting's epochs."""
    learner = Learner(system, setting, lr, seed, data)
    curves = Curves(train_loss=[], test_loss=[], test_accuracy=[])
    for epoch in range(1, setting.epochs + 1):
        learner.epoch()
        if tested == "every epoch" or epoch == setting.epochs:
            train_score, test_score = learner.evaluate()
            curves["train_loss"].append(train_score.loss)
            curves["test_loss"].append(test_score.loss)
            curves["test_accuracy"].append(test_score.accuracy)
        on_epoch()
    return curves
