"""The update under PyTorch's catalogue: errors, direction, groups, gradients.

Driven by torch's own `optims` and its inputs for SGD (catalogue.py).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from catalogue import (
    INFOS,
    OF_TORCHS,
    Problem,
    advance,
    inputs,
    instantiate,
    same_bits,
    split,
    trained,
)
from torch import nn
from torch.testing._internal.common_device_type import onlyCPU
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase, parametrize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class TestCatalogue(TestCase):
    @optims(INFOS)
    def test_bad_arguments_are_refused_in_torchs_words(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for error in optim_info.optim_error_inputs_func(device, dtype):
            given = error.optimizer_error_input
            print(given.desc)
            assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            expect: Any = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
            with expect(error.error_type, match=error.error_regex):
                optim_info.optim_cls(given.params, **given.kwargs)

    @optims(OF_TORCHS)
    def test_choosing_torchs_implementation_changes_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            trained = []
            for choice in ({}, {"foreach": True}, {"fused": True, "differentiable": False}):
                problem = Problem(device, dtype)
                opt = optim_info.optim_cls(problem.params, **kwargs, **choice)
                for _ in range(2):
                    opt.step(problem.loss)
                trained.append(problem.params)
            for params in trained[1:]:
                same_bits(params, trained[0])

    @parametrize("contiguous", [True, False])
    @parametrize("with_schedulers", [True, False])
    @optims(INFOS)
    def test_the_loss_goes_the_right_way(
        self,
        device: str,
        dtype: torch.dtype,
        optim_info: OptimizerInfo,
        with_schedulers: bool,
        contiguous: bool,
    ) -> None:
        for makers in optim_info.scheduler_inputs if with_schedulers else [[]]:
            for kwargs in inputs(optim_info, device):
                problem = Problem(device, dtype, contiguous)
                opt = optim_info.optim_cls(problem.params, **kwargs)
                schedulers = [make(opt) for make in makers]
                first = problem.loss()
                for _ in range(5):
                    advance(schedulers, opt.step(problem.loss))
                if kwargs.get("maximize", False):
                    assert problem.loss() > first
                else:
                    assert problem.loss() < first

    @optims(INFOS)
    def test_the_loss_goes_down_with_groups_and_schedulers(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for makers in optim_info.scheduler_inputs:
            problem = Problem(device, dtype)
            groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
            opt = optim_info.optim_cls(groups, lr=1e-3)
            schedulers = [make(opt) for make in makers]
            first = problem.loss()
            for _ in range(5):
                advance(schedulers, opt.step(problem.loss))
            assert problem.loss() < first

    @parametrize("num_dim", [0, 1, 2])
    @optims(INFOS)
    def test_a_tensor_learning_rate_steps_as_its_number_does(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, num_dim: int
    ) -> None:
        for lr_device in sorted({device, "cpu"}):
            for kwargs in inputs(optim_info, device):
                lr = torch.full([1] * num_dim, 2.0**-7, device=lr_device)
                one, two = Problem(device, dtype), Problem(device, dtype)
                number = optim_info.optim_cls(one.params, **{**kwargs, "lr": 2.0**-7})
                tensor = optim_info.optim_cls(two.params, **{**kwargs, "lr": lr})
                for _ in range(4):
                    number.step(one.loss)
                    tensor.step(two.loss)
                    number.param_groups[0]["lr"] /= 2
                    lr.div_(2)  # in place: what counts is the value at the step
                same_bits(one.params, two.params)

    @optims(INFOS)
    def test_a_group_keeps_its_own_weight_decay_and_learning_rate(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            own, alone = split(kwargs)
            bias = {**deepcopy(own), "weight_decay": 0.0, "lr": 0.02}
            problem, apart = Problem(device, dtype), Problem(device, dtype)
            still = nn.Parameter(torch.ones(3, device=device))
            still.grad = torch.ones_like(still)
            groups = [{"params": [problem.weight], **own}, {"params": [problem.bias], **bias}]
            opt = optim_info.optim_cls([*groups, {"params": [still]}], lr=1e-28, **alone)
            each = [
                optim_info.optim_cls([apart.weight], **deepcopy(own), **alone),
                optim_info.optim_cls([apart.bias], **bias, **alone),
            ]
            if "lr" not in own:  # the groups' default is not the class's
                each[0].param_groups[0]["lr"] = opt.param_groups[0]["lr"] = 0.01
            for _ in range(5):
                opt.step(problem.loss)
                apart.loss()
                for one in each:
                    one.step()
            same_bits(problem.params, apart.params)
            assert not torch.equal(problem.bias, Problem(device, dtype).bias)
            assert still.tolist() == [1.0] * 3

    @optims(INFOS)
    def test_a_step_without_gradients_or_with_zeros_moves_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            p = torch.randn(5, 1, device=device, dtype=dtype, requires_grad=True)
            old = p.detach().clone()
            opt = optim_info.optim_cls([p], **kwargs)
            assert opt.step(lambda: 1) == 1
            assert (opt.n_averaged, dict(opt.state)) == (0, {})
            if kwargs.get("weight_decay", 0) == 0:
                p.grad = torch.zeros_like(p)
                for _ in range(4):
                    opt.step()
            same_bits(p.detach(), old)

    @optims(INFOS)
    def test_an_overflow_steps_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for scale in (None, torch.ones(1, device=device)):
            for kwargs in inputs(optim_info, device):
                params = [torch.ones(1, device=device) for _ in range(5)]
                for p in params:
                    p.grad = torch.ones_like(p)
                opt = optim_info.optim_cls(params, **kwargs)
                opt.grad_scale, opt.found_inf = scale, torch.ones((), device=device)
                opt.step()
                assert [p.item() for p in params] == [1.0] * 5
                assert opt.n_averaged == 0
                assert opt.state_dict()["param_groups"][0]["step"] == 0
                opt.found_inf.zero_()
                opt.step()  # and as the first step there was
                first = [torch.ones(1, device=device) for _ in range(5)]
                for p in first:
                    p.grad = torch.ones_like(p)
                optim_info.optim_cls(first, **kwargs).step()
                same_bits(params, first)

    @optims(INFOS, dtypes=DTYPES)
    def test_gradients_are_never_written(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            problem = Problem(device, dtype)
            opt = optim_info.optim_cls(problem.params, **kwargs)
            for _ in range(3):
                problem.loss()
                grads = [p.grad for p in problem.params]
                before = [(g.clone(), g._version) for g in grads]
                opt.step()
                assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
                same_bits([(g, g._version) for g in grads], before)

    @optims(INFOS)
    def test_a_closure_is_evaluated_once_a_step_with_gradients_on(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            problem = Problem(device, dtype)
            opt = optim_info.optim_cls(problem.params, **kwargs)
            seen = []

            def closure() -> int:
                assert torch.is_grad_enabled()
                problem.loss()  # noqa: B023 (called in the same turn of the loop)
                seen.append(opt.state_dict()["param_groups"][0]["step"])  # noqa: B023
                return len(seen)  # noqa: B023

            with torch.no_grad():
                assert [opt.step(closure) for _ in range(3)] == [1, 2, 3]
            assert seen == [0, 1, 2]

    @onlyCPU
    @optims(INFOS)
    def test_a_step_allocates_no_memory(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device, flatten=True):
            problem, opt = trained(optim_info, kwargs, device)
            problem.loss()
            with torch.profiler.profile(profile_memory=True) as profile:
                opt.step()
            used = [e.name for e in profile.events() if e.self_cpu_memory_usage > 0]
            assert used == []


instantiate(TestCatalogue, globals())
