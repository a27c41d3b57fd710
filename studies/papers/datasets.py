"""The images: scikit-learn's digits, or a CIFAR archive that lies in a folder already."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from studies.digits import data as digits

Part = Literal["sweep", "final"]

HARD_IMAGES = 300
HARD_NOISE = 0.2  # of the labels, replaced by another one
SPLIT_SEED = 0  # of the validation images, the hard images and the label noise
VALIDATION = 0.2  # of the training images, in the sweep only
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class DataError(Exception):
    """An archive that is not there or not whole."""


class Images(NamedTuple):
    """Images [N, C, H, W], standardised, and labels [N] in int64."""

    images: Tensor
    labels: Tensor

    def at(self, chosen: Tensor) -> Images:
        return Images(self.images[chosen], self.labels[chosen])

    def to(self, device: str) -> Images:
        return Images(self.images.to(device), self.labels.to(device))


class Data(NamedTuple):
    """What one run sees: in the sweep, ``test`` holds validation images and no test image."""

    train: Images
    test: Images
    classes: int
    flips: bool  # whether a mirrored image is one of the same class


class Source(NamedTuple):
    """Where images come from; part of no result's identity but the name and ``hard``."""

    name: str
    hard: bool = False
    root: str = ""


@lru_cache(maxsize=1)  # the runs of a setting follow one another
def load(source: Source, part: Part, dtype: str, side: int, device: str) -> Data:
    """The images of a run, enlarged to ``side`` if they are smaller.

    Raises:
        DataError: without a whole archive.
    """
    train, test, classes = cifar(source) if source.name in CIFAR else digit_images()
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    if source.hard:
        chosen, rest = order[:HARD_IMAGES], order[HARD_IMAGES:]
        train, validation = with_noise(train.at(chosen), classes), train.at(rest)
    elif part == "sweep":
        held_out = round(VALIDATION * len(order))
        train, validation = train.at(order[held_out:]), train.at(order[:held_out])
    if part == "sweep":
        test = validation

    def ready(images: Images) -> Images:
        pixels = images.images.to(getattr(torch, dtype))
        if pixels.shape[-1] < side:
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
        return Images(pixels, images.labels).to(device)

    return Data(ready(train), ready(test), classes, flips=source.name in CIFAR)


def training_images(source: Source, part: Part, images: int) -> int:
    """How many of the archive's ``images`` a run of that part trains on."""
    if source.hard:
        return HARD_IMAGES
    return images - round(VALIDATION * images) if part == "sweep" else images


def digit_images() -> tuple[Images, Images, int]:
    """The demo's split of scikit-learn's scans."""
    split = digits.load(torch.float64)
    train = Images(split.train_images, split.train_labels)
    return train, Images(split.test_images, split.test_labels), 10


def with_noise(images: Images, classes: int) -> Images:
    """A fifth of the labels replaced by another one, the same for every run."""
    generator = torch.Generator().manual_seed(SPLIT_SEED + 1)
    wrong = torch.randperm(len(images.labels), generator=generator)
    wrong = wrong[: round(HARD_NOISE * len(images.labels))]
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    labels = images.labels.clone()
    labels[wrong] = (labels[wrong] + shift) % classes
    return Images(images.images, labels)


def cifar(source: Source) -> tuple[Images, Images, int]:
    """torchvision's data set, standardised by the training images' mean and deviation."""
    kind = CIFAR[source.name]
    check_archive(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy's, about the pickles of another numpy
            parts = [kind(source.root, train=train) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise DataError(f"the {source.name} archive cannot be read: {error}") from None
    pixels = [torch.from_numpy(p.data).permute(0, 3, 1, 2).float().contiguous() for p in parts]
    mean = pixels[0].mean((0, 2, 3), keepdim=True)
    deviation = pixels[0].std((0, 2, 3), keepdim=True)
    train, test = (
        Images(p.sub_(mean).div_(deviation), torch.tensor(part.targets))
        for p, part in zip(pixels, parts, strict=True)
    )
    return train, test, len(parts[0].classes)


def check_archive(source: Source) -> None:
    """Names the first file that is missing or damaged, and what to do."""
    kind = CIFAR[source.name]
    folder = Path(source.root) / kind.base_folder
    if not folder.is_dir():
        packed = Path(source.root) / kind.filename
        if packed.exists():
            raise DataError(f"{str(packed)!r} is still packed: extract it beside itself first")
        raise DataError(
            f"no folder {kind.base_folder!r} in {source.root!r}: extract {kind.filename} there, or "
            f"call torchvision.datasets.{kind.__name__}({source.root!r}, download=True) once"
        )
    files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    for name, checksum in files:
        if not (folder / name).is_file():
            raise DataError(f"{str(folder / name)!r} is missing: extract {kind.filename} again")
        if not check_integrity(str(folder / name), checksum):
            raise DataError(
                f"{str(folder / name)!r} is damaged (another checksum): get {kind.filename} again"
            )


def batches(
    data: Data, batch_size: int, augment: bool, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of full batches in an order drawn from the generator, augmented from it too."""
    shuffled = torch.randperm(len(data.train.labels), generator=order)
    shuffled = shuffled.to(data.train.labels.device)
    for first in range(0, len(shuffled) - batch_size + 1, batch_size):
        chosen = shuffled[first : first + batch_size]
        images = data.train.images[chosen]
        yield crop_flip(images, data.flips, order) if augment else images, data.train.labels[chosen]


def crop_flip(images: Tensor, flips: bool, order: torch.Generator) -> Tensor:
    """A crop of each image padded by an eighth of its side (4 of 32) with the mean pixel; half of
    the images mirrored, where that leaves the class (digits are never mirrored)."""
    count, _, side, _ = images.shape
    pad = side // 8
    down, right = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=order)
    rows = down + torch.arange(side)
    columns = right + torch.arange(side)
    if flips:
        mirrored = torch.rand(count, 1, generator=order) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
