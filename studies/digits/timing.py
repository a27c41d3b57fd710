"""Milliseconds of `opt.step()`, every method in turns on its own copy of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import TypedDict

import torch
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from studies.digits import data, models
from studies.digits.data import Digits
from studies.digits.methods import METHODS, PLAIN, Method
from studies.digits.options import Settings

BASELINE = "torch.optim.SGD(fused=True, momentum=0.9)"
WARM_UP = 10
ROUNDS = 150
MOST_IMAGES = 32  # a batch: a step takes the same time however many images made its gradient


class Time(TypedDict):
    """Median over the rounds, and the ratio to the baseline's median."""

    ms: float
    ratio: float


def baseline(params: Iterable[Parameter], s: Settings) -> Optimizer:
    return torch.optim.SGD(params, s.lr, momentum=0.9, weight_decay=s.weight_decay, fused=True)


def measure(settings: Settings, digits: Digits, on_round: Callable[[], object]) -> dict[str, Time]:
    """The baseline's and every method's time for one step, averaging from the first step on.

    In each of the ROUNDS every optimizer steps once with gradients of the same batch, and the turn
    begins with another one, so that all meet the machine in the same state. A median ignores the
    steps that sample once an epoch, or every fifth step. Setting a control's learning rate is not
    counted.
    """
    settings = replace(settings, start_epoch=0)
    methods = {BASELINE: Method(BASELINE, PLAIN, baseline)}
    methods |= {name: METHODS[name] for name in settings.methods}
    contestants = {}
    for name, method in methods.items():
        network = models.build(settings.model, 0, digits.train_images.dtype)
        contestants[name] = method, network, method.optimizer(network.parameters(), settings)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = torch.Generator().manual_seed(0)
    turn = list(contestants)
    step = 0
    while step < WARM_UP + ROUNDS:
        for images, labels in data.batches(digits, min(settings.batch_size, MOST_IMAGES), order):
            step += 1
            turn.append(turn.pop(0))
            for name in turn:
                method, network, opt = contestants[name]
                opt.zero_grad()
                cross_entropy(network(images), labels).backward()
                method.before_step(opt, settings, step)
                before = perf_counter()
                opt.step()
                times[name].append(1000.0 * (perf_counter() - before))
            on_round()
            if step == WARM_UP + ROUNDS:
                break
    medians = {name: median(taken[WARM_UP:]) for name, taken in times.items()}
    return {name: Time(ms=ms, ratio=ms / medians[BASELINE]) for name, ms in medians.items()}
