"""The options of a command, with their units and defaults."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from studies.digits.options import folder, integer, invalid, number, seeds
from studies.papers.datasets import CIFAR
from studies.papers.flatness import DIRECTIONS
from studies.papers.networks import NETWORKS
from studies.papers.settings import Table
from studies.papers.systems import SYSTEMS

DATA = ("digits", *CIFAR)


def add_options(parser: argparse.ArgumentParser, command: str, table: Table) -> None:
    """Every option with its unit and default."""
    add = parser.add_argument
    kinds: list[tuple[str, Any, str]] = [
        ("--data", one_of(DATA), "images: digits (scikit-learn's), cifar10, cifar100"),
        ("--model", one_of(tuple(NETWORKS)), f"networks: {', '.join(NETWORKS)}"),
        ("--method", one_of(tuple(SYSTEMS)), f"systems: {', '.join(SYSTEMS)}"),
        ("--batch-size", integer(2), "images a step, at least 2"),
    ]
    defaults = {
        "--data": "digits",
        "--model": "on digits " + ", ".join(table.models["digits"]),
        "--method": ", ".join(table.systems) or "all",
        "--batch-size": ", ".join(map(str, table.batch_sizes)),
    }
    for option, kind, about in kinds:
        add(
            option,
            type=listed(kind),
            default=("digits",) if option == "--data" else None,
            metavar="A[,B...]",
            help=f"{about} (default: {defaults[option]})",
        )
    add(
        "--root",
        type=folder,
        metavar="DIR",
        help="folder that holds cifar-10-batches-py or cifar-100-python; nothing is downloaded",
    )
    add(
        "--hard",
        action="store_true",
        help="digits: 300 training images, a fifth of their labels wrong, so that methods differ",
    )
    add("--quick", action="store_true", help="minutes: fewer epochs, seeds and learning rates")
    add(
        "--lr",
        type=rates,
        metavar="auto|A[,B...]",
        help="learning rates of SGD without momentum; where momentum sums gradients the optimizer "
        "gets 1 - momentum of it. All of a list are reported; auto gives each system the one that "
        "does best on validation images (default: auto, on CIFAR the paper's where it names one)",
    )
    add("--seeds", type=seeds, metavar="N|S,S,...", help="as in the demo (default: 5, quick: 3)")
    add(
        "--sweep-seeds",
        type=integer(1, 100),
        metavar="N",
        help="runs for each learning rate of the sweep (default: 2, quick: 1)",
    )
    if command != "flatness":
        add(
            "--baseline",
            type=one_of(tuple(SYSTEMS)),
            metavar="A",
            help="the system that differences are taken to (default: "
            f"{table.baseline}; with momentum it is momentum in place of sgd)",
        )
    add("--epochs", type=integer(1), metavar="N", help=f"(default: {table.epochs})")
    add(
        "--start-epoch",
        type=integer(0),
        metavar="N",
        help="epochs before averages start (default: a fifth of the epochs, rounded up)",
    )
    add(
        "--momentum",
        type=number(least=0.0, below=1.0),
        metavar="MU",
        help=f"of every system but sgd (default: {table.momentum:g})",
    )
    add(
        "--weight-decay",
        type=number(least=0.0),
        metavar="LAMBDA",
        help=f"L2 penalty (default: {table.weight_decay:g})",
    )
    add(
        "--stem",
        choices=("small", "imagenet"),
        default="small",
        help="torchvision's networks with a stem for 32x32 images, or unchanged "
        "(default: %(default)s)",
    )
    add(
        "--augment",
        choices=("none", "crop-flip"),
        help=f"(default: none on digits, {table.augment} on CIFAR)",
    )
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if any)")
    add("--threads", type=integer(1, 1024), default=1, metavar="N", help="a process (default: 1)")
    add("--jobs", type=integer(1, 256), default=1, metavar="N", help="processes (default: 1)")
    add("--out", type=folder, metavar="FOLDER", help="(default: papers/ and the command's words)")
    if command == "flatness":
        add("--rays", type=integer(1, 1000), default=10, metavar="N", help="(default: %(default)s)")
        add(
            "--directions",
            choices=DIRECTIONS,
            default=DIRECTIONS[0],
            help="drawn from the unit sphere, or normalised by filter (default: %(default)s)",
        )


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of values between commas, each once."""

    def parse_list(text: str) -> tuple[Any, ...]:
        values = tuple(kind(part.strip()) for part in text.split(","))
        if len(set(values)) < len(values):
            raise invalid(text, "every value once")
        return values

    return parse_list


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    def parse_name(text: str) -> str:
        if text not in known:
            raise invalid(text, f"one of {', '.join(known)}")
        return text

    return parse_name


def rates(text: str) -> tuple[float, ...]:
    """Empty for ``auto``."""
    return () if text == "auto" else tuple(sorted(listed(number(above=0.0))(text)))
