"""The papers' own figures, as printed there: single runs, copied and never computed here."""

from __future__ import annotations

from typing import NamedTuple

RBWA = "RBWA paper"
RSGDM = "RSGDM paper"
SWA = "Izmailov et al."


class Figure(NamedTuple):
    """One published result; ``gain`` is a range over SGD where no accuracy is used."""

    source: str
    system: str
    data: str
    model: str
    batch_size: int
    accuracy: float | None
    train_loss: float | None = None
    gain: tuple[float, float] | None = None

    def __str__(self) -> str:
        batch = f", batch size {self.batch_size}" if self.batch_size else ""
        return f"{self.source}: {TITLES[self.data]}, {TITLES[self.model]}{batch}"


TITLES = {
    "digits": "digits",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "small": "small network",
    "mlp": "MLP",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "several": "several networks",
}

# Batch size: accuracy of SGD and RBWA in %, training loss of SGD and RBWA.
_BY_BATCH_SIZE = {
    16: (82.27, 83.76, 0.01776, 0.00473),
    32: (82.5, 84.25, 0.01760, 0.00384),
    64: (82.31, 83.36, 0.01283, 0.00209),
    128: (82.46, 82.55, 0.00035, 0.00039),
    256: (80.56, 80.74, 0.00038, 0.00047),
}

TABLES: dict[str, tuple[Figure, ...]] = {
    "table1": tuple(
        figure
        for size, (sgd, rbwa, sgd_loss, rbwa_loss) in _BY_BATCH_SIZE.items()
        for figure in (
            Figure(RBWA, "sgd", "cifar10", "resnet18", size, sgd, sgd_loss),
            Figure(RBWA, "rbwa", "cifar10", "resnet18", size, rbwa, rbwa_loss),
        )
    ),
    "table2": (
        Figure(RBWA, "sgd", "cifar10", "resnet18", 64, 82.31, 0.01283),
        Figure(RBWA, "rbwa", "cifar10", "resnet18", 64, 83.36, 0.00209),
        Figure(RBWA, "sgd", "cifar10", "vgg16", 64, 86.31),
        Figure(RBWA, "rbwa", "cifar10", "vgg16", 64, 88.82),
        Figure(RBWA, "sgd", "cifar100", "resnet18", 64, 57.8, 0.0016),
        Figure(RBWA, "rbwa", "cifar100", "resnet18", 64, 60.33, 0.0009),
        Figure(RBWA, "sgd", "cifar100", "vgg16", 64, 56.16, 0.026),
        Figure(RBWA, "rbwa", "cifar100", "vgg16", 64, 58.95, 0.002),
    ),
    "table3": (
        Figure(RBWA, "sgd", "cifar10", "resnet18", 32, 82.5, 0.01760),
        Figure(RBWA, "rbwa", "cifar10", "resnet18", 32, 84.25, 0.00384),
        Figure(RBWA, "rbwa-e", "cifar10", "resnet18", 32, 83.68),
        Figure(RBWA, "rbwa-e", "cifar10", "vgg16", 32, 88.42),
    ),
    "table4": (
        Figure(RSGDM, "sgdm", "cifar10", "resnet18", 128, 94.48),
        Figure(RSGDM, "rsgdm", "cifar10", "resnet18", 128, 94.62),
        Figure(RSGDM, "sgdm", "cifar100", "resnet50", 128, 76.70),
        Figure(RSGDM, "rsgdm", "cifar100", "resnet50", 128, 77.27),
    ),
    "table5": (Figure(SWA, "swa", "cifar100", "several", 0, None, gain=(0.75, 1.5)),),
}


def find(table: str, system: str, data: str, model: str, batch_size: int) -> Figure | None:
    """The table's figure for the system, nearest to that setting; its own words say how near.

    A figure of another batch size is taken only where it has none or the table has one alone.
    """
    own = [figure for figure in TABLES.get(table, ()) if figure.system == system]
    sizes = {figure.batch_size for figure in own}
    if len(sizes) > 1:
        own = [figure for figure in own if figure.batch_size == batch_size]
    return max(own, key=lambda f: (f.data == data) + (f.model == model), default=None)
