"""The command line: one line for each thing that is wrong with it, exit code 2."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rbwa_fused.command import Parser
from studies.papers.datasets import Part, Source, training_images
from studies.papers.jobs import Where
from studies.papers.options import add_options
from studies.papers.plan import Plan
from studies.papers.settings import GRID, QUICK_GRID, TABLES, Setting, Table
from studies.papers.systems import NEED_MOMENTUM, SYSTEMS


class Command(NamedTuple):
    """What the command line asks for."""

    plan: Plan
    where: Where
    out: Path
    jobs: int
    parser: Parser


def parse(argv: Sequence[str] | None) -> Command:
    """The plan and the output folder, which exists then and can be written to."""
    parser = Parser(
        prog="papers",
        description="Trains the systems of the papers, several seeds each, and prints the papers' "
        "figures and the measured ones side by side.",
        epilog="Ctrl-C keeps the runs that are finished; the same command goes on from there.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, table in TABLES.items():
        about = table.about
        sub = commands.add_parser(name, help=about, description=f"{about}.", allow_abbrev=False)
        add_options(sub, name, table)
    given = parser.parse_args(argv)
    sub = commands.choices[given.command]
    table = TABLES[given.command]
    settings = make_settings(sub, given, table)
    systems = make_systems(sub, given, table, settings[0])
    rates = given.lr
    if rates is None:
        rates = () if table.lr is None or "digits" in given.data else (table.lr,)
    baseline = table.baseline
    if baseline == "sgd" and settings[0].momentum > 0.0:
        baseline = "momentum"
    if getattr(given, "baseline", None) is not None:
        baseline = given.baseline
        if baseline not in systems:
            sub.error(f"argument --baseline: {baseline!r} is not among the systems that run")
    plan = Plan(
        command=given.command,
        settings=settings,
        systems=systems,
        baseline=baseline,
        rates=rates,
        grid=QUICK_GRID if given.quick else GRID,
        sweeps=given.sweep_seeds or (1 if given.quick else 2),
        seeds=given.seeds or tuple(range(3 if given.quick or "digits" not in given.data else 5)),
        rays=getattr(given, "rays", 0),
        directions=getattr(given, "directions", ""),
    )
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        sub.error("argument --device: 'cuda' is not available here")
    out = make_folder(sub, given)
    where = Where(str(given.root or ""), device, given.threads)
    return Command(plan, where, out, given.jobs, sub)


def make_folder(parser: Parser, given: argparse.Namespace) -> Path:
    words = [given.command, *given.data, *["hard"] * given.hard, *["quick"] * given.quick]
    out: Path = given.out or Path("papers") / "-".join(words)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(out)!r}: {error.strerror}")
    return out


def make_settings(parser: Parser, given: argparse.Namespace, table: Table) -> tuple[Setting, ...]:
    """Every data set with its networks and every batch size."""
    cifar = [name for name in given.data if name != "digits"]
    if cifar and given.root is None:
        parser.error(f"argument --root: needed for --data {cifar[0]}, the folder with its archive")
    if given.hard and cifar:
        parser.error(f"argument --hard: for digits alone, not for {cifar[0]}")
    epochs = given.epochs or (table.quick_epochs if given.quick else table.epochs)
    start_epoch = given.start_epoch
    if start_epoch is None:
        start_epoch = min(math.ceil(epochs / 5), epochs - 1)
    if start_epoch >= epochs:
        parser.error(
            f"argument --start-epoch: invalid value {start_epoch} (expected less than --epochs, "
            f"{epochs})"
        )
    weight_decay = table.weight_decay if given.weight_decay is None else given.weight_decay
    settings = tuple(
        Setting(
            data=data,
            hard=given.hard,
            model=model,
            stem=given.stem,
            augment=given.augment or ("none" if data == "digits" else table.augment),
            dtype=given.dtype,
            batch_size=batch_size,
            epochs=epochs,
            start_epoch=start_epoch,
            halve_epochs=max(1, epochs // 4) if table.halvings else 0,
            momentum=table.momentum if given.momentum is None else given.momentum,
            weight_decay=weight_decay,
        )
        for data in given.data
        for model in given.model or table.models[data]
        for batch_size in given.batch_size or table.batch_sizes
    )
    for setting in settings:
        if setting.model == "mlp" and setting.data != "digits":
            parser.error(f"argument --model: 'mlp' is for digits alone, not for {setting.data}")
    return settings


def make_systems(
    parser: Parser, given: argparse.Namespace, table: Table, setting: Setting
) -> tuple[str, ...]:
    """In the table's order; all that make sense with the momentum, unless they were named."""
    usual = list(table.systems or SYSTEMS)
    if usual[0] == "sgd" and table.baseline == "sgd" and setting.momentum > 0.0:
        usual[0] = "momentum"
    if setting.momentum == 0.0:
        usual = [name for name in usual if name not in NEED_MOMENTUM]
    wanted = given.method or usual
    for name in wanted:
        if name in NEED_MOMENTUM and setting.momentum == 0.0:
            parser.error(f"argument --method: {name!r} needs a --momentum above 0")
    if given.command == "flatness" and len(wanted) != 2:
        parser.error(f"argument --method: flatness compares two systems, not {len(wanted)}")
    if given.command == "flatness":
        if given.lr and len(given.lr) > 1:
            parser.error("argument --lr: flatness compares two systems at one learning rate")
        for name in wanted:
            if SYSTEMS[name].tested == "ensemble":
                parser.error(f"argument --method: {name!r} has no one solution to look around")
        return tuple(wanted)
    return tuple(name for name in SYSTEMS if name in wanted)


def check_batch_sizes(command: Command, images: dict[str, int]) -> None:
    """Against the training images that there are, by data set; the sweep's are fewer."""
    plan = command.plan
    for setting in plan.settings:
        part: Part = "final" if plan.rates else "sweep"
        source = Source(setting.data, setting.hard)
        most = training_images(source, part, images[setting.data])
        if setting.batch_size > most:
            command.parser.error(
                f"argument --batch-size: {setting.batch_size} is more than the {most} training "
                f"images{'' if plan.rates or setting.hard else ' of the learning-rate sweep'}"
            )
