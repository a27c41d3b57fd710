"""PyTorch's catalogue of optimizer tests, pointed at the classes of rules.py.

torch ships what its own test_optim.py is driven by: descriptions of optimizers, inputs for their
constructors and a decorator that spreads a test over them. Here are such descriptions of ours;
docs/reliability.md says which test of torch's is which of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

pytest.importorskip("expecttest")  # which torch's own tests import

import torch
from rules import ALGORITHMS, OF_TORCH, Rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

import rbwa_fused as rf

# Importing these freezes flags such as torch.backends.cudnn.benchmark, which tests of other
# libraries in the same process may have to set.
torch.backends.__allow_nonbracketed_mutation_flag = True

# What only a constructor takes; all else may stand in a param group.
OF_THE_CONSTRUCTOR = ("backend", "flatten", "capturable", "difference", "master_weights")

# The part that `foreach` and `fused` have in torch's tests: other ways to the same result.
IMPLEMENTATIONS: list[dict[str, Any]] = [{}, {"flatten": False}, {"backend": "reference"}]


def _described(cls: Any) -> OptimizerInfo:
    """torch's description of a class of its own."""
    return next(info for info in optim_db if info.optim_cls is cls)


def _averages(rule: Rule) -> list[OptimizerInput]:
    policies = {
        "ema": rf.ema(0.5),
        "mean, written back": rf.mean(start=1, every=2, write_back_every=4),
        "rbwa": rf.rbwa(steps_per_epoch=2, start_epoch=0),
        "lookahead": rf.lookahead(k=2),
    }
    usual = {"lr": 1e-2, **({"momentum": 0.9} if "momentum" in rule.domain else {})}
    given = [
        OptimizerInput(None, {**usual, "average": policy}, name)
        for name, policy in policies.items()
        if rule.takes(policy)
    ]
    masters = {**usual, "average": policies["ema"], "master_weights": True}
    return [*given, OptimizerInput(None, masters, "master weights")]


def _info(cls: Any) -> OptimizerInfo:
    """For each algorithm of a class, those of its counterpart's inputs that the class takes; of
    torch.optim.SGD's, where torch has no counterpart."""
    algorithms = {name: rule for name, rule in ALGORITHMS.items() if rule.cls is cls}
    any_rule = next(iter(algorithms.values()))
    torchs = any_rule.torchs
    small = {} if any_rule.counts is None else {"lr": 1e-2}  # their own is too large for a Problem
    model = _described(torchs or torch.optim.SGD)

    def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        taken = inspect.signature(cls).parameters.keys()
        return [
            OptimizerInput(
                None, {**small, **given.kwargs, **rule.constructor}, f"{given.desc}, {name}"
            )
            for name, rule in algorithms.items()
            for given in [*model.optim_inputs_func(device, dtype), *_averages(rule)]
            if given.kwargs.keys() <= taken
        ]

    def errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
        """torch's; but a parameter named twice in a group is refused here, where torch warns."""
        found: list[ErrorOptimizerInput] = model.optim_error_inputs_func(device, dtype)
        for error in found:
            if error.error_type is UserWarning:
                error.error_type = ValueError
        if any_rule.counts is not None:  # whose words for other hyperparameters are its package's
            known = {"lr", "weight_decay"}
            found = [e for e in found if e.optimizer_error_input.kwargs.keys() <= known]
        return found

    # What a state dict of torch's class, or an older one of ours, may lack.
    later = ("nesterov", "rule") if torchs else ("implicit_momentum",)
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=model.scheduler_inputs,
        supported_impls=(),
        not_og_supported_flags=("maximize", "average", "step", "n_averaged", *later),
        supports_complex=False,
        has_capturable_arg=True,
    )


INFOS = [_info(cls) for cls in dict.fromkeys(rule.cls for rule in ALGORITHMS.values())]
COUNTERPARTS = {rule.cls: rule.torchs for rule in OF_TORCH.values() if rule.torchs is not None}
OF_TORCHS = [info for info in INFOS if info.optim_cls in COUNTERPARTS]


def inputs(info: OptimizerInfo, device: str, **only: Any) -> Iterator[dict[str, Any]]:
    """Fresh arguments of the constructor, for each implementation or for `only` one."""
    for implementation in [only] if only else IMPLEMENTATIONS:
        for given in info.optim_inputs_func(device):
            print(info.name, given.desc, implementation)  # pytest shows it where a test fails
            yield {**given.kwargs, **implementation}


def split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments into those of a param group and those of the constructor alone."""
    alone = {k: v for k, v in kwargs.items() if k in OF_THE_CONSTRUCTOR}
    return {k: v for k, v in kwargs.items() if k not in alone}, alone


def instantiate(tests: type, scope: dict[str, Any]) -> None:
    """torch's classes of tests for each device; those for a GPU are marked as the suite's are."""
    name = tests.__name__
    instantiate_device_type_tests(tests, scope, only_for=("cpu", "cuda"))
    if f"{name}CUDA" in scope:
        scope[f"{name}CUDA"].pytestmark = pytest.mark.gpu


class Problem:
    """torch's problem: the square of an affine map, whose loss any step makes smaller."""

    def __init__(
        self, device: str, dtype: torch.dtype = torch.float32, contiguous: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def drawn(*shape: int) -> Tensor:
            wide = torch.randn(*shape, 2, generator=generator, dtype=torch.float64, device="cpu")
            wide = wide.to(device, dtype)[..., 0]
            return wide.contiguous() if contiguous else wide

        self.weight, self.bias = nn.Parameter(drawn(10, 5)), nn.Parameter(drawn(10))
        self.x = drawn(5)
        self.params = [self.weight, self.bias]

    def loss(self) -> Tensor:
        """The loss, with fresh gradients."""
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.x) + self.bias).square().sum()
        loss.backward()
        return loss.detach()


def trained(
    info: OptimizerInfo, kwargs: dict[str, Any], device: str, steps: int = 3
) -> tuple[Problem, Any]:
    """A problem and its optimizer after some steps."""
    problem = Problem(device)
    opt = info.optim_cls(problem.params, **deepcopy(kwargs))
    for _ in range(steps):
        opt.step(problem.loss)
    return problem, opt


def same_bits(actual: Any, expected: Any) -> None:
    """Equal tensors, or lists and dictionaries of them."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def advance(schedulers: list[Any], loss: Tensor) -> None:
    """Moves schedulers on as each of them wants it."""
    for scheduler in schedulers:
        scheduler.step(*((loss,) if isinstance(scheduler, ReduceLROnPlateau) else ()))
