"""Every learning-rate scheduler of torch, and those that move the momentum as well."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from bounds import ulps
from catalogue import advance, same_bits
from rules import ALGORITHMS, OF_TORCH
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import rbwa_fused as rf

STEPS = 9


def plain(name: str, **options: Any) -> Any:
    return lambda opt: getattr(lr_scheduler, name)(opt, **options)


def chained(opt: Any) -> Any:
    parts = [lr_scheduler.ExponentialLR(opt, 0.9), lr_scheduler.StepLR(opt, 3, 0.5)]
    return lr_scheduler.ChainedScheduler(parts)


def sequential(opt: Any) -> Any:
    parts = [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.8)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[3])


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": plain("LambdaLR", lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": plain("MultiplicativeLR", lr_lambda=lambda step: 1 / (1 + step)),
    "StepLR": plain("StepLR", step_size=2, gamma=0.5),
    "MultiStepLR": plain("MultiStepLR", milestones=[2, 5]),
    "ConstantLR": plain("ConstantLR", factor=0.4, total_iters=4),
    "LinearLR": plain("LinearLR", start_factor=0.4, end_factor=0.8, total_iters=4),
    "ExponentialLR": plain("ExponentialLR", gamma=0.9),
    "PolynomialLR": plain("PolynomialLR", total_iters=6, power=0.9),
    "CosineAnnealingLR": plain("CosineAnnealingLR", T_max=5),
    "CosineAnnealingWarmRestarts": plain("CosineAnnealingWarmRestarts", T_0=3),
    "CyclicLR": plain(
        "CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=3, base_momentum=0.6, max_momentum=0.9
    ),
    "OneCycleLR": plain("OneCycleLR", max_lr=0.2, total_steps=STEPS + 1, base_momentum=0.6),
    "ReduceLROnPlateau": plain("ReduceLROnPlateau", patience=1, factor=0.5),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=4),
}
CYCLES_MOMENTUM = ("CyclicLR", "OneCycleLR")


def test_no_scheduler_of_torch_is_left_out() -> None:
    of_torch = set(lr_scheduler.__all__) - {"LRScheduler"}  # the base class
    assert of_torch | {"SWALR"} == set(SCHEDULERS)


def made(cls: Any, lr: Any = 0.1, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Two groups, the second with a learning rate of its own."""
    ps = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (15, 7)]
    second = lr / 2  # a tensor of its own, too
    return ps, cls([{"params": ps[:1]}, {"params": ps[1:], "lr": second}], lr=lr, **options)


def take(ps: list[nn.Parameter], opt: Any, step: int) -> tuple[Any, Any]:
    """A step with gradients that do not depend on the weights. Returns both groups' numbers: the
    rate, and the momentum or Adam's betas."""
    for p in ps:
        p.grad = torch.sin(torch.arange(p.numel()) + step)
    opt.step()
    groups = opt.param_groups
    return [float(g["lr"]) for g in groups], [g[_cycled(g)] for g in groups]


def _cycled(group: Any) -> str:
    return "betas" if "betas" in group else "momentum"


def scheduled(name: str, cls: Any, **options: Any) -> tuple[list[Tensor], list[Any], list[str]]:
    """Weights, numbers of each step, and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ps, opt = made(cls, **options)
        scheduler = SCHEDULERS[name](opt)
        numbers = []
        for step in range(STEPS):
            numbers.append(take(ps, opt, step))
            advance([scheduler], torch.tensor(1.0))
    return [p.detach() for p in ps], numbers, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", OF_TORCH)
def test_schedulers_drive_it_as_they_drive_torchs(rule: str, name: str, tensor_lr: bool) -> None:
    ends = []
    for cls, own in ((OF_TORCH[rule].cls, {}), (OF_TORCH[rule].torchs, {"foreach": False})):
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        ends.append(scheduled(name, cls, **{**OF_TORCH[rule].options, "lr": lr, **own}))
    ours, theirs = ends
    assert ours[1:] == theirs[1:]
    assert len({str(numbers) for numbers in ours[1]}) > 1  # it did move them
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert ulps(a, b) <= 2 * STEPS  # torch fuses multiply and add: two units a step


DRIVEN = [
    (name, rule)
    for name in SCHEDULERS
    for rule in ALGORITHMS
    if not (ALGORITHMS[rule].constant_momentum and name in CYCLES_MOMENTUM)  # refused, see below
]


@pytest.mark.parametrize(("name", "rule"), DRIVEN, ids=str)
def test_a_rule_takes_a_schedulers_numbers_as_if_set_by_hand(name: str, rule: str) -> None:
    options = {**ALGORITHMS[rule].options, "average": rf.ema(0.5)}
    driven, numbers, _ = scheduled(name, ALGORITHMS[rule].cls, **options)
    ps, opt = made(ALGORITHMS[rule].cls, **options)
    for step, (lrs, momenta) in enumerate(numbers):
        for group, lr, momentum in zip(opt.param_groups, lrs, momenta, strict=True):
            group.update({"lr": lr, _cycled(group): momentum})
        take(ps, opt, step)
    same_bits(driven, [p.detach() for p in ps])


@pytest.mark.parametrize("name", CYCLES_MOMENTUM)
def test_implicit_rsgdm_refuses_a_scheduler_that_moves_its_momentum(name: str) -> None:
    ps, opt = made(rf.RSGDM)
    scheduler = SCHEDULERS[name](opt)
    take(ps, opt, 0)  # the momentum of the first step is the one that stays
    scheduler.step()
    before = [p.detach().clone() for p in ps]
    with pytest.raises(ValueError, match=r"constant momentum only.*difference=\"explicit\""):
        take(ps, opt, 1)
    same_bits([p.detach() for p in ps], before)


@pytest.mark.parametrize(
    "make",
    [
        plain("CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
        plain("OneCycleLR", max_lr=0.2, total_steps=STEPS + 1, cycle_momentum=False),
    ],
    ids=CYCLES_MOMENTUM,
)
def test_implicit_rsgdm_takes_it_where_the_momentum_stays(make: Any) -> None:
    ps, opt = made(rf.RSGDM)
    scheduler = make(opt)
    seen = set()
    for step in range(STEPS):
        seen.add(str(take(ps, opt, step)[0]))
        scheduler.step()
    assert len(seen) > 1
