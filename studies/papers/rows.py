"""The rows of a table: the measured runs of results.json beside the paper's figure."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch

from studies.papers import published
from studies.papers.plan import Plan
from studies.papers.published import Figure
from studies.papers.settings import Setting, recipe
from studies.papers.statistics import Difference, Summary, paired, summary
from studies.papers.store import Key, Store
from studies.papers.systems import SYSTEMS


class Row(NamedTuple):
    """A system in a setting, after the last epoch, over the seeds."""

    setting: Setting
    system: str
    lr: float  # of SGD without momentum
    own_lr: float  # what the system's own optimizer is given
    accuracy: Summary
    test_loss: Summary
    train_loss: Summary
    difference: Difference | None  # of the accuracy to the baseline's; None for the baseline
    loss_difference: Difference | None  # of the test loss
    accuracies: tuple[float, ...]  # of each seed
    test_losses: tuple[float, ...]
    figure: Figure | None
    published_gain: tuple[float, float] | None  # over the paper's SGD, lowest and highest


def rows(plan: Plan, store: Store) -> list[Row]:
    """In the order of settings, systems and learning rates; the plan's seeds alone."""
    return [
        row(plan, store, setting, system, lr)
        for setting in plan.settings
        for system in plan.systems
        for lr in plan.rates_of(setting, system, store)
    ]


def row(plan: Plan, store: Store, setting: Setting, system: str, lr: float) -> Row:
    accuracy = last(plan, store, setting, system, lr, "test_accuracy")
    test_loss = last(plan, store, setting, system, lr, "test_loss")
    difference = loss_difference = None
    if plan.baseline in plan.systems and system != plan.baseline:
        base_lr = lr if plan.rates else plan.rates_of(setting, plan.baseline, store)[0]
        base = partial(last, plan, store, setting, plan.baseline, base_lr)
        difference = paired(accuracy, base("test_accuracy"))
        loss_difference = paired(test_loss, base("test_loss"))
    figure = figure_of(plan, setting, system)
    return Row(
        setting,
        system,
        lr,
        own_lr(setting, system, lr),
        summary(accuracy),
        summary(test_loss),
        summary(last(plan, store, setting, system, lr, "train_loss")),
        difference,
        loss_difference,
        tuple(accuracy),
        tuple(test_loss),
        figure,
        gain(figure, figure_of(plan, setting, plan.baseline)),
    )


def last(
    plan: Plan, store: Store, setting: Setting, system: str, lr: float, curve: str
) -> list[float]:
    """A curve's last value for each seed; nan where a run diverged."""
    records: list[dict[str, Any]] = [
        store.records[Key("runs", setting.name, system, lr, seed)] for seed in plan.seeds
    ]
    values = [record[curve][-1] for record in records]
    return [math.nan if value is None else value for value in values]


def own_lr(setting: Setting, system: str, lr: float) -> float:
    """As the optimizer itself says."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    opt = SYSTEMS[system].build([parameter], recipe(setting, lr, setting.batch_size))
    return float(opt.param_groups[0]["lr"])


def figure_of(plan: Plan, setting: Setting, system: str) -> Figure | None:
    """The RBWA paper calls its baseline SGD, with momentum or without."""
    if plan.command in ("table1", "table2", "table3") and system == plan.baseline:
        system = "sgd"
    return published.find(plan.command, system, setting.data, setting.model, setting.batch_size)


def gain(figure: Figure | None, base: Figure | None) -> tuple[float, float] | None:
    """Over the same paper's SGD in the same setting."""
    if figure is None or figure is base:
        return None
    if figure.gain is not None:
        return figure.gain
    if base is None or base[2:5] != figure[2:5]:
        return None
    if figure.accuracy is None or base.accuracy is None:
        return None
    return figure.accuracy - base.accuracy, figure.accuracy - base.accuracy
