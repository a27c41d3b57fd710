"""The command line: one dataclass of settings, checked; a bad value is one line and exit code 2."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rbwa_fused.command import Parser
from studies.digits.data import TRAIN_IMAGES

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Settings:
    """What a comparison is run with; the numbers are those of the options of the same name."""

    methods: tuple[str, ...]
    model: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    start_epoch: int
    seeds: tuple[int, ...]
    dtype: str
    threads: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the few images left over are other ones in every epoch."""
        return TRAIN_IMAGES // self.batch_size

    @property
    def start(self) -> int:
        """Steps that are not averaged."""
        return self.start_epoch * self.steps_per_epoch

    @property
    def runs(self) -> list[tuple[int, str]]:
        """Seed and method of every run, in the order in which they are trained."""
        return [(seed, name) for seed in self.seeds for name in self.methods]


class Given(NamedTuple):
    """The command line: what is compared, where that is written, and every how many steps."""

    settings: Settings
    out: Path
    checkpoint_every: int


def parse(argv: Sequence[str] | None, methods: Iterable[str], models: Iterable[str]) -> Given:
    """What is given; the output folder exists then and can be written to."""
    known, models = list(methods), list(models)
    parser = build_parser(known, models)
    given = parser.parse_args(argv)
    wanted = [name.strip() for names in given.method or known for name in names.split(",")]
    for name in wanted:
        if name not in known:
            parser.error(f"argument --method: unknown method {name!r} ({', '.join(known)})")
    start_epoch = given.start_epoch
    if start_epoch is None:
        start_epoch = min(math.ceil(given.epochs / 5), given.epochs - 1)
    if start_epoch >= given.epochs:
        parser.error(
            f"argument --start-epoch: invalid value {start_epoch} (expected less than "
            f"--epochs, {given.epochs})"
        )
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=given.out):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(given.out)!r}: {error.strerror}")
    settings = Settings(
        methods=tuple(name for name in known if name in wanted),
        model=given.model,
        epochs=given.epochs,
        batch_size=given.batch_size,
        lr=given.lr,
        momentum=given.momentum,
        weight_decay=given.weight_decay,
        start_epoch=start_epoch,
        seeds=given.seeds,
        dtype=given.dtype,
        threads=given.threads,
    )
    return Given(settings, given.out, given.checkpoint_every)


def build_parser(methods: list[str], models: list[str]) -> Parser:
    """Every option with its unit and default."""
    parser = Parser(
        prog="digits",
        description="Trains a small network on scikit-learn's digit images (1,797 scans, 8x8) with "
        "each method and compares them: a table, results.json and curves.png.",
        epilog="Ctrl-C keeps the runs that are finished; with --checkpoint-every N, neither Ctrl-C "
        "nor a crash costs more than N steps. The defaults take about a minute and a half on one "
        "core.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--method",
        action="append",
        metavar="NAME[,NAME...]",
        help=f"methods to compare, may be repeated: {', '.join(methods)} (default: all)",
    )
    add("--model", choices=models, default=models[0], help="network (default: %(default)s)")
    add(
        "--epochs",
        type=integer(1),
        default=30,
        metavar="N",
        help="passes over the training images, at least 1 (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=integer(2, TRAIN_IMAGES),
        default=32,
        metavar="N",
        help=f"images a step, 2 to {TRAIN_IMAGES} (default: %(default)s)",
    )
    add(
        "--lr",
        type=number(above=0.0),
        default=0.03,
        metavar="ETA",
        help="learning rate of SGD with momentum, above 0; methods with another scale use a "
        "multiple, see studies/digits/methods.py (default: %(default)s)",
    )
    add(
        "--momentum",
        type=number(least=0.0, below=1.0),
        default=0.9,
        metavar="MU",
        help="momentum of every method but sgd, at least 0 and below 1 (default: %(default)s)",
    )
    add(
        "--weight-decay",
        type=number(least=0.0),
        default=5e-4,
        metavar="LAMBDA",
        help="L2 penalty, at least 0 (default: %(default)s)",
    )
    add(
        "--start-epoch",
        type=integer(0),
        metavar="N",
        help="epochs before averaging starts, 0 to EPOCHS - 1 (default: a fifth of --epochs, "
        "rounded up)",
    )
    add(
        "--seeds",
        type=seeds,
        default=(0, 1, 2),
        metavar="N|S,S,...",
        help=f"how many runs a method, 1 to {MOST_SEEDS}, or with a comma the seeds themselves, "
        "such as 4,7 or 4, (default: 3)",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of weights and images; float64 shows that RBWA and its control differ by rounding "
        "alone (default: %(default)s)",
    )
    add(
        "--out",
        type=folder,
        default=Path("demo"),
        metavar="FOLDER",
        help="where results.json and curves.png are written, made if missing and overwritten, but "
        "not if a checkpoint lies there (default: %(default)s)",
    )
    add(
        "--checkpoint-every",
        type=integer(0),
        default=0,
        metavar="N",
        help="write checkpoint.pt every N steps and at each epoch's end, durably. Started again "
        "with the same options, the comparison goes on from there, to the same bits as if it had "
        "never been stopped, or draws the table and the picture anew if it is complete. 0 writes "
        "none (default: %(default)s)",
    )
    add(
        "--threads",
        type=integer(1, 1024),
        default=1,
        metavar="N",
        help="threads of PyTorch; the network is too small to gain from more than one "
        "(default: %(default)s)",
    )
    return parser


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` to ``most``."""
    expected = f"at least {least}" if most is None else f"{least} to {most}"

    def parse_integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise invalid(text, f"a whole number, {expected}") from None
        if value < least or (most is not None and value > most):
            raise invalid(text, expected)
        return value

    return parse_integer


def number(
    *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """A parser of finite numbers x with x >= ``least``, x > ``above`` and x < ``below``."""
    bounds = [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"below {below:g}"] if below < math.inf else []
    expected = " and ".join(bounds)

    def parse_number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise invalid(text, f"a number, {expected}") from None
        if not (math.isfinite(value) and value >= least and above < value < below):
            raise invalid(text, f"a number, {expected}")
        return value

    return parse_number


def folder(text: str) -> Path:
    """An empty path, such as an unset variable gives, would be the current folder."""
    if not text:
        raise invalid(text, "a folder")
    return Path(text)


def seeds(text: str) -> tuple[int, ...]:
    """``3`` is 0, 1, 2; ``4,7`` is 4, 7; ``4,`` is 4."""
    if "," not in text:
        return tuple(range(integer(1, MOST_SEEDS)(text)))
    values = [integer(0, 2**32 - 1)(part) for part in text.removesuffix(",").split(",")]
    if len(set(values)) < len(values):
        raise invalid(text, "every seed once")
    return tuple(values)


def invalid(text: str, expected: str) -> argparse.ArgumentTypeError:
    """The error of a value that is not what an option expects."""
    return argparse.ArgumentTypeError(f"invalid value {text!r} (expected {expected})")
