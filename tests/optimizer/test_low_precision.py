"""How far Adam's and schedule-free learning's weights may be from float64's, by dtype and state.

Gradients are no functions of the weights, so errors add up and nothing corrects them. Beside each
kind of state stands how far 60 steps may come. The weights lie within that of a plain float64 loop;
and of Adam's the twin of twin.py proves as much of these very numbers, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreement import compare
from bounds import F64
from rules import NOT_STARTED, RULES, Rule
from test_adam import gradient, mean_ulps, vector
from torch import Tensor, nn
from twin import MASTER, Twin

import rbwa_fused as rf

NARROW = [torch.bfloat16, torch.float16]
STEPS = 60
LR = 0.05
# Of fewer than 24 roundings in a step, coefficients included, each loses at most half a unit of a
# number that is no larger than the largest weight.
OF_FLOAT32 = 12 * torch.finfo(torch.float32).eps

Stated = Callable[[float, float, Rule], tuple[float, float]]


def of_adam(u: float, most: float, rule: Rule) -> tuple[float, float]:
    """Each step rounds the weights once, by at most u of the largest. What a step adds does not
    depend on them, but for decay, which makes them forget."""
    return STEPS * most * (u + OF_FLOAT32), 0.0


def narrow(u: float, most: float, rule: Rule) -> tuple[float, float]:
    """State of the parameter's dtype: v and m are rounded, too, by at most u, of which a step
    forgets what it forgets of them; gradients are alike, so that they are all of one size. m counts
    whole in a step, v as its root, and a step is lr at most."""
    beta1, beta2 = rule.hyperparameters["betas"]
    of_state = STEPS * LR * u * (1 / (1 - beta1) + 0.5 / (1 - beta2))
    return of_adam(u, most, rule)[0] + of_state, 0.0


def of_free(u: float, most: float, rule: Rule) -> tuple[float, float]:
    """y <- (1 - c) y + c z - eta (1 - c)(1 - beta) g, which is rounded, and z <- z - eta g, which
    is float32; g has decay y. What y and z are off by follows the same lines."""
    y = z = 0.0
    counts, decay = NOT_STARTED, rule.hyperparameters["weight_decay"]
    beta = rule.beta(rule.hyperparameters) or 0.0
    for _ in range(STEPS):
        numbers, counts = rule.of_step({**rule.hyperparameters, "lr": LR}, counts)
        eta, c = numbers["eta"], numbers["c"]
        z += eta * decay * y + most * OF_FLOAT32
        share = (1 - c) * (1 + eta * (1 - beta) * decay)
        y = share * y + c * z + most * (u + OF_FLOAT32)
    return y, z


KINDS: dict[str, tuple[str, dict[str, Any], Stated]] = {
    "adam": ("adam", {}, of_adam),
    "adamw amsgrad": ("adamw amsgrad", {}, of_adam),
    "adam, state_dtype": ("adam", {"state_dtype": "param"}, narrow),
    "adamw amsgrad, state_dtype": ("adamw amsgrad", {"state_dtype": "param"}, narrow),
    "adam, masters": ("adam", {"master_weights": True}, of_adam),
    "adamw amsgrad, masters": ("adamw amsgrad", {"master_weights": True}, of_adam),
    "free sgd": ("free sgd", {}, of_free),
    "free adamw": ("free adamw", {}, of_free),
    "free sgd, masters": ("free sgd", {"master_weights": True}, of_free),
    "free adamw, masters": ("free adamw", {"master_weights": True}, of_free),
}


def weights(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.linspace(1, 2, 300, dtype=F64).to(dtype))


def alike(p: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(p.shape, generator=generator, dtype=F64).clamp(-2, 2)
    return (1 + 0.1 * noise).to(p.dtype)


def exactly(rule: Rule, p: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a float64 loop and what is to be evaluated, x or the same."""
    theta, counts = p.detach().double(), NOT_STARTED
    state: dict[str, Tensor] = {}
    for step in range(STEPS):
        numbers, counts = rule.of_step(rule.hyperparameters, counts)
        theta = rule.literal(state, theta, alike(p, step).double(), numbers)
    if not rule.modes:
        return theta, theta
    beta = rule.beta(rule.hyperparameters)
    assert beta is not None
    return theta, theta + (1 - 1 / beta) * (state["z"] - theta)


@pytest.mark.filterwarnings("ignore:schedule-free steps of 16-bit")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_weights_are_as_near_to_float64_as_their_state_allows(
    kind: str, dtype: torch.dtype
) -> None:
    name, options, stated = KINDS[kind]
    rule = replace(
        RULES[name],
        options={**RULES[name].options, "lr": LR, "maximize": False},
        wide="state_dtype" not in options,
    )
    p, mastered = weights(dtype), "master_weights" in options
    proved = Twin.of(rule, [p.float() if mastered else p], None)
    opt = rule.made([p], **options)
    theta, average = exactly(rule, p)
    start = p.detach().double()
    for step in range(STEPS):
        p.grad = alike(p, step)
        proved.step([p.grad.float() if mastered else p.grad])
        opt.step()
    u, most = torch.finfo(dtype).eps / 2, float(torch.stack([start, theta]).abs().max())
    off, off_z = stated(0.0 if mastered else u, most, rule)
    assert off < float((theta - start).abs().min()) / 3, "so wide that nothing need move"
    stored = opt.state[p][MASTER] if mastered else p.detach()
    assert float((stored.double() - theta).abs().max()) <= off
    assert not mastered or torch.equal(p, stored.to(dtype))

    (member,) = proved.members
    for key, value in member.rules_state.items():
        compare(key, opt.state[p][key], value, member.state[key][1])
    if not rule.modes:  # where operations do not know that y forgets
        compare("weights", stored, member.theta, torch.float32 if mastered else dtype)
        assert float(member.theta.off.max()) <= off
    beta = rule.beta(rule.hyperparameters) or 1.0
    of_x = off / beta + (1 / beta - 1) * off_z + most * OF_FLOAT32
    with opt.averaged():
        apart = (p.detach().double() - average).abs()
        assert bool((apart <= of_x + u * (average.abs() + of_x)).all())  # it is rounded once


# ---- float32 -------------------------------------------------------------------------------------

OF_PACKAGE: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGDScheduleFree": (rf.SGDScheduleFree, {"lr": 0.1, "warmup_steps": 50}),
    "AdamWScheduleFree": (rf.AdamWScheduleFree, {"lr": 1e-3, "warmup_steps": 50}),
}


def trained(cls: Any, dtype: torch.dtype, mode: str, **options: Any) -> Tensor:
    p = vector(dtype)
    opt = cls([p], **options)
    opt.train()
    for step in range(1000):
        p.grad = gradient(step, torch.float32).to(dtype)
        opt.step()
    getattr(opt, mode)()
    return p.detach()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("name", OF_PACKAGE)
def test_float32_is_no_farther_from_float64_than_the_packages(
    name: str, decay: float, mode: str
) -> None:
    """After 1,000 steps, y and x. Both are compared with the package's float64."""
    package = getattr(pytest.importorskip("schedulefree"), name)
    cls, options = OF_PACKAGE[name]
    options = {**options, "weight_decay": decay}
    exact = trained(package, F64, mode, **options)
    theirs = mean_ulps(trained(package, torch.float32, mode, **options), exact)
    assert mean_ulps(trained(cls, torch.float32, mode, **options), exact) <= theirs + 2
    assert float((trained(cls, F64, mode, **options) - exact).abs().max()) <= 1e-10
