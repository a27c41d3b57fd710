"""scikit-learn's digit images, split once: the same images are tested for every method and seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TRAIN_IMAGES = 1437
TEST_IMAGES = 360
SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images [N, 1, 8, 8], standardised, and labels [N] in int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(dtype: torch.dtype = torch.float32) -> Digits:
    """1,437 of the 1,797 scans for training and 360 for testing, each digit's share alike in both.

    Pixels are shifted and scaled by the mean and deviation of all training pixels. The scans come
    with scikit-learn; nothing is downloaded.
    """
    digits = load_digits()
    train, test, train_labels, test_labels = train_test_split(
        digits.images,
        digits.target,
        train_size=TRAIN_IMAGES,
        test_size=TEST_IMAGES,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    mean, deviation = train.mean(), train.std()

    def images(pixels: npt.NDArray[np.float64]) -> Tensor:
        return torch.from_numpy((pixels - mean) / deviation).to(dtype).unsqueeze(1)

    return Digits(
        images(train), torch.from_numpy(train_labels), images(test), torch.from_numpy(test_labels)
    )


def batches(digits: Digits, batch_size: int, order: torch.Generator) -> Iterator[list[Tensor]]:
    """One epoch of full batches (images, labels) in an order drawn from the generator."""
    shuffled = torch.randperm(TRAIN_IMAGES, generator=order)
    for first in range(0, TRAIN_IMAGES - batch_size + 1, batch_size):
        chosen = shuffled[first : first + batch_size]
        yield [digits.train_images[chosen], digits.train_labels[chosen]]
