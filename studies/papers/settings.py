"""What is trained how: the papers' settings, and what of them a run needs step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from studies.papers import schedules
from studies.papers.published import TITLES

# Learning rates of a sweep, in quarter decades. It begins with a grid of half decades, the same for
# all systems and wide: accuracies on wrong labels have two tops, and a search that climbs from
# where it stands finds now one and now the other.
LADDER = (
    *(1e-4, 1.8e-4, 3e-4, 5.6e-4, 1e-3, 1.8e-3, 3e-3, 5.6e-3, 0.01, 0.018, 0.03, 0.056),
    *(0.1, 0.18, 0.3, 0.56, 1.0, 1.8, 3.0, 5.6, 10.0, 18.0, 30.0, 56.0, 100.0),
)
HALF_DECADES = LADDER[::2]
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
QUICK_GRID = (0.03, 0.1, 0.3, 1.0)
SWEEP_SEED = 1000  # the first of the sweep's seeds, which are none of the results'


@dataclass(frozen=True)
class Setting:
    """One panel of a picture, one block of a table: everything but system, rate and seed."""

    data: str
    hard: bool
    model: str
    stem: str
    augment: str
    dtype: str
    batch_size: int
    epochs: int
    start_epoch: int
    halve_epochs: int
    momentum: float
    weight_decay: float

    @property
    def name(self) -> str:
        """What tells it from the other settings of a table."""
        hard = " hard" if self.hard else ""
        return f"{self.data}{hard} {self.model} {self.batch_size}"

    @property
    def title(self) -> str:
        """The same for a reader."""
        hard = " (hard)" if self.hard else ""
        return f"{TITLES[self.data]}{hard}, {TITLES[self.model]}, batch size {self.batch_size}"


@dataclass(frozen=True)
class Recipe:
    """What an optimizer and its schedule are made of; ``lr`` is that of SGD without momentum."""

    lr: float
    momentum: float
    weight_decay: float
    epochs: int
    start_epoch: int
    steps_per_epoch: int
    halve_epochs: int

    @property
    def start(self) -> int:
        """Steps that are not averaged."""
        return self.start_epoch * self.steps_per_epoch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def summing_lr(self) -> float:
        """The same pace for a momentum that sums gradients, as PyTorch's does."""
        return self.lr * (1.0 - self.momentum)

    def base(self, step: int) -> float:
        """The setting's own schedule, a factor common to all systems."""
        if self.halve_epochs == 0:
            return 1.0
        return schedules.halved(step, self.halve_epochs * self.steps_per_epoch)


def recipe(setting: Setting, lr: float, images: int) -> Recipe:
    """An epoch has full batches only; the images left over are other ones in every epoch."""
    return Recipe(
        lr=lr,
        momentum=setting.momentum,
        weight_decay=setting.weight_decay,
        epochs=setting.epochs,
        start_epoch=setting.start_epoch,
        steps_per_epoch=images // setting.batch_size,
        halve_epochs=setting.halve_epochs,
    )


@dataclass(frozen=True)
class Table:
    """A table's defaults. On digits the networks are ``digits`` and nothing is augmented."""

    about: str
    systems: tuple[str, ...]  # empty for all
    baseline: str  # what differences are taken to; with momentum it is "momentum", if this is "sgd"
    models: Mapping[str, tuple[str, ...]]
    batch_sizes: tuple[int, ...]
    epochs: int = 50
    quick_epochs: int = 15
    halvings: bool = False  # the rate is halved after each quarter of the epochs
    momentum: float = 0.0
    weight_decay: float = 0.0
    augment: str = "none"
    lr: float | None = None  # the paper's where it names one; None for a sweep


RBWA = ("sgd", "rbwa", "rbwa-control", "rbwa-algorithm2", "rbwa-algorithm2-control")
RESNET18 = {"digits": ("small",), "cifar10": ("resnet18",), "cifar100": ("resnet18",)}

TABLES = {
    "table1": Table(
        "RBWA by batch size",
        systems=RBWA,
        baseline="sgd",
        models=RESNET18,
        batch_sizes=(16, 32, 64, 128, 256),
    ),
    "table2": Table(
        "RBWA across networks and data",
        systems=RBWA,
        baseline="sgd",
        models={
            "digits": ("small", "mlp"),
            "cifar10": ("resnet18", "vgg16"),
            "cifar100": ("resnet18", "vgg16"),
        },
        batch_sizes=(64,),
    ),
    "table3": Table(
        "RBWA-E",
        systems=("sgd", "rbwa", "rbwa-control", "rbwa-e", "rbwa-e-control"),
        baseline="sgd",
        models={
            "digits": ("small", "mlp"),
            "cifar10": ("resnet18", "vgg16"),
            "cifar100": ("resnet18", "vgg16"),
        },
        batch_sizes=(32,),
    ),
    "table4": Table(
        "RSGDM against SGD with momentum",
        systems=("sgdm", "rsgdm", "rsgdm-control", "nesterov"),
        baseline="sgdm",
        models={"digits": ("small",), "cifar10": ("resnet18",), "cifar100": ("resnet50",)},
        batch_sizes=(128,),
        epochs=200,
        quick_epochs=60,
        halvings=True,
        momentum=0.9,
        weight_decay=5e-4,
        augment="crop-flip",
        lr=0.01,
    ),
    "table5": Table(
        "Every system",
        systems=(),
        baseline="momentum",
        models=RESNET18,
        batch_sizes=(32,),
        momentum=0.9,
        weight_decay=5e-4,
        augment="crop-flip",
    ),
    "flatness": Table(
        "Flatness of two solutions",
        systems=("momentum", "swa"),
        baseline="momentum",
        models=RESNET18,
        batch_sizes=(32,),
        momentum=0.9,
        weight_decay=5e-4,
        augment="crop-flip",
    ),
}
