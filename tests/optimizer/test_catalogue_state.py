"""State dicts and copies under PyTorch's catalogue: determinism, older and named ones, hooks."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from catalogue import INFOS, OF_THE_CONSTRUCTOR, Problem, inputs, instantiate, same_bits, trained
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase, parametrize

NAMES = ["weight", "bias"]


def made(
    info: OptimizerInfo, kwargs: dict[str, Any], device: str, named: bool
) -> tuple[Problem, Any]:
    problem = Problem(device)
    params: list[Any] = problem.params
    if named:
        params = list(zip(NAMES, params, strict=True))
    return problem, info.optim_cls(params, **deepcopy(kwargs))


def saved(opt: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """What a state dict holds but for names: tensors, and numbers and words as text."""
    state_dict = deepcopy(opt.state_dict())
    groups = [{**group, "param_names": None} for group in state_dict["param_groups"]]
    return state_dict["state"], [{k: repr(v) for k, v in group.items()} for group in groups]


def assert_same_state(left: Any, right: Any) -> None:
    same_bits(left[0], right[0])
    assert left[1] == right[1]


def samples(kwargs: dict[str, Any], steps: int) -> int:
    """What a policy has sampled after some steps, counted one by one."""
    policy = kwargs.get("average")
    if policy is None:
        return 0
    return sum(map(policy.due, range(1, steps + 1))) + (policy.initial != "first_sample")


class TestState(TestCase):
    @parametrize("named", [True, False])
    @parametrize("twin_named", [True, False])
    @optims(INFOS)
    def test_a_twin_goes_on_from_a_state_dict_as_its_owner_does(
        self,
        device: str,
        dtype: torch.dtype,
        optim_info: OptimizerInfo,
        named: bool,
        twin_named: bool,
    ) -> None:
        for kwargs in inputs(optim_info, device):
            problem, opt = made(optim_info, kwargs, device, named)
            for _ in range(3):
                opt.step(problem.loss)
            twin_problem, twin = made(optim_info, kwargs, device, twin_named)
            with torch.no_grad():
                for p, q in zip(problem.params, twin_problem.params, strict=True):
                    q.copy_(p)
            state_dict = deepcopy(opt.state_dict())
            before = deepcopy(state_dict)
            twin.load_state_dict(state_dict)
            for _ in range(3):
                opt.step(problem.loss)
                twin.step(twin_problem.loss)
                same_bits(problem.params, twin_problem.params)
            assert_same_state(saved(opt), saved(twin))
            same_bits(state_dict["state"], before["state"])  # loading and stepping left it alone
            names = twin.state_dict()["param_groups"][0].get("param_names")
            assert names == (NAMES if named or twin_named else None)
            twin.param_groups.extend(twin.param_groups)
            assert saved(twin)[1][-1] == saved(opt)[1][-1]

    @optims(INFOS)
    def test_a_state_dict_without_later_keys_takes_the_codes_values(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            _, opt = trained(optim_info, kwargs, device)
            older = deepcopy(opt.state_dict())
            for key in optim_info.not_og_supported_flags:
                older["param_groups"][0].pop(key, None)
            fresh_problem, fresh = made(optim_info, kwargs, device, named=False)
            fresh.load_state_dict(older)
            group, expected = fresh.param_groups[0], opt.param_groups[0]
            assert group.keys() == expected.keys()
            assert repr({**group, "params": 0}) == repr({**expected, "params": 0})
            fresh.step(fresh_problem.loss)
            assert fresh.state_dict()["param_groups"][0]["step"] == 1

    @parametrize("weights_only", [True, False])
    @parametrize("named", [True, False])
    @optims(INFOS)
    def test_a_saved_state_dict_is_read_back_as_it_was(
        self,
        device: str,
        dtype: torch.dtype,
        optim_info: OptimizerInfo,
        named: bool,
        weights_only: bool,
    ) -> None:
        for kwargs in inputs(optim_info, device):
            problem, opt = made(optim_info, kwargs, device, named)
            for _ in range(3):
                opt.step(problem.loss)
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            read = torch.load(file, weights_only=weights_only)
            same_bits(read["state"], opt.state_dict()["state"])
            assert repr(read["param_groups"]) == repr(opt.state_dict()["param_groups"])

    @optims(INFOS)
    def test_counters_are_plain_numbers_and_count_on(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            problem, opt = trained(optim_info, kwargs, device)
            assert opt.n_averaged == samples(kwargs, 3)
            state_dict = deepcopy(opt.state_dict())
            group = state_dict["param_groups"][0]
            assert (type(group["step"]), type(group["n_averaged"])) == (int, int)
            opt.load_state_dict(state_dict)
            opt.step(problem.loss)
            assert opt.state_dict()["param_groups"][0]["step"] == 4
            assert opt.n_averaged == samples(kwargs, 4)
            group["step"] = torch.tensor(3)
            with pytest.raises(ValueError, match="Invalid step in the checkpoint"):
                opt.load_state_dict(state_dict)

    @optims(INFOS)
    def test_state_saved_on_the_cpu_is_taken_to_the_parameters_device(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, "cpu"):
            problem, opt = trained(optim_info, kwargs, "cpu")
            there = [nn.Parameter(p.detach().clone().to(device)) for p in problem.params]
            moved = optim_info.optim_cls(there, **deepcopy(kwargs))
            state_dict = deepcopy(opt.state_dict())
            moved.load_state_dict(state_dict)
            same_bits(state_dict["state"], opt.state_dict()["state"])
            for held in moved.state.values():
                assert {value.device.type for value in held.values()} <= {there[0].device.type}
            for _ in range(3):
                opt.step(problem.loss)
                for p, q in zip(problem.params, there, strict=True):
                    q.grad = p.grad.to(device)
                moved.step()
            same_bits([p.cpu() for p in there], problem.params)

    @optims(INFOS)
    def test_hooks_of_state_dict_run_and_may_edit(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        def before(opt: Any) -> None:
            opt.state["test"] = 1

        def after(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, "seen": state_dict["state"].pop("test", None)}

        for kwargs in inputs(optim_info, device):
            problem, opt = trained(optim_info, kwargs, device)
            with_after = opt.register_state_dict_post_hook(after)
            assert opt.state_dict()["seen"] is None
            opt.register_state_dict_pre_hook(before)
            state_dict = opt.state_dict()
            assert state_dict["seen"] == 1 and "test" not in state_dict["state"]
            with_after.remove()
            assert opt.state_dict()["state"]["test"] == 1
            opt.step(problem.loss)  # a stranger in the state is no parameter
            expected, _ = trained(optim_info, kwargs, device, steps=4)
            same_bits(problem.params, expected.params)

    @optims(INFOS)
    def test_hooks_of_load_state_dict_run_in_their_order_and_may_replace(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        def edit(opt: Any, state_dict: dict[str, Any]) -> None:
            state_dict["param_groups"][0]["lr"] = 0.002

        def replace(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            mine = deepcopy(state_dict)
            mine["param_groups"][0]["lr"] = 0.003
            return mine

        def after(opt: Any) -> None:
            opt.state["after"] = opt.param_groups[0]["lr"]

        for kwargs in inputs(optim_info, device):
            problem, opt = trained(optim_info, kwargs, device)
            opt.register_load_state_dict_pre_hook(edit)
            opt.load_state_dict(opt.state_dict())
            assert opt.param_groups[0]["lr"] == 0.002
            first = opt.register_load_state_dict_pre_hook(replace, prepend=True)
            opt.load_state_dict(opt.state_dict())
            assert opt.param_groups[0]["lr"] == 0.002
            first.remove()
            opt.register_load_state_dict_pre_hook(replace)
            opt.register_load_state_dict_post_hook(after)
            opt.load_state_dict(opt.state_dict())
            assert opt.param_groups[0]["lr"] == opt.state["after"] == 0.003
            opt.step(problem.loss)
            assert opt.state_dict()["param_groups"][0]["step"] == 4

    @optims(INFOS)
    def test_a_copy_has_every_public_attribute_and_goes_on_alone(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        def public(opt: Any) -> dict[str, str]:
            return {k: type(v).__name__ for k, v in vars(opt).items() if not k.startswith("_")}

        for kwargs in inputs(optim_info, device):
            for copied in (deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
                problem, opt = trained(optim_info, kwargs, device)
                twin_problem, twin = copied((problem, opt))
                assert public(opt) == public(twin)
                opt.step(problem.loss)
                expected = [p.detach().clone() for p in problem.params]
                twin.step(twin_problem.loss)
                same_bits([p.detach() for p in twin_problem.params], expected)
                same_bits([p.detach() for p in problem.params], expected)

    @optims(INFOS)
    def test_what_is_printed_names_every_hyperparameter(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            text = repr(optim_info.optim_cls(Problem(device).params, **kwargs))
            assert text.startswith(f"{optim_info.name} (\nParameter Group 0\n")
            for key, value in kwargs.items():
                if key not in OF_THE_CONSTRUCTOR:
                    assert f"    {key}: {value}\n" in text

    @optims(INFOS)
    def test_a_parameters_state_is_not_empty_where_there_is_something_to_keep(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            problem, opt = trained(optim_info, kwargs, device, steps=1)
            kept = opt.engine.tables.plan.groups[0].kept
            assert bool(kept) == (opt.defaults.get("momentum", 1) != 0)
            assert all(set(kept) <= opt.state.get(p, {}).keys() for p in problem.params)
            if not kept and opt.defaults["average"] is None:
                assert dict(opt.state) == {}


instantiate(TestState, globals())
