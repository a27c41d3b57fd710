"""Averages that live in another module, such as a teacher or a target network, or in tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rbwa_fused.average import Average, Ema, Mean
from rbwa_fused.engine import checks
from rbwa_fused.engine.memory import lies_as
from rbwa_fused.engine.sharded import is_sharded_as, local
from rbwa_fused.members import Followed
from rbwa_fused.several import policies_of
from rbwa_fused.streams import AVERAGE

Group = dict[str, Any]

# A 16-bit average moves by w (x - a), which is lost below half a unit of its last place. With
# smaller weights than these it stays more than a tenth behind a drift of 30 %.
LEAST_WEIGHT = {torch.bfloat16: 1 / 8, torch.float16: 1 / 50}


class Into:
    """Where the averages of some groups live.

    Args:
        target: a module, whose parameters (and buffers) are found by their names, or tensors in the
            order of the parameters.

    Raises:
        TypeError, ValueError: for a target that does not have what is averaged in the same shape,
            layout and place, or in a dtype that the kernels have no average for. All names that are
            missing are said.
    """

    def __init__(self, target: nn.Module | Sequence[Tensor]) -> None:
        if not isinstance(target, nn.Module | list | tuple):
            raise TypeError(f"Invalid into: {type(target).__name__} (expected a module or tensors)")
        self._module: Followed | None = None
        if isinstance(target, nn.Module):
            self._module = Followed(target, (), buffers=True)
        self._tensors = [] if isinstance(target, nn.Module) else list(target)
        self._found: list[tuple[list[Tensor], list[Tensor]]] = []  # parameters and their targets

    def policies(self, groups: Sequence[Group]) -> list[Average | None]:
        """Each group's policy, for averages in the dtype of what they live in.

        Raises:
            ValueError: for several averages, several dtypes, one that the kernels have no average
                for or that the policy does not ask for, or a weight with which a 16-bit average
                cannot move.
        """
        for group in groups:
            if len(policies_of(group["average"])) > 1:
                raise ValueError(
                    f"Invalid into: averages {group['average']!r} (expected one; an Averager of "
                    "its own for each that lives in a module)"
                )
        pairs = zip(groups, self._targets(groups), strict=True)
        return [_in_dtype_of(group, targets) for group, targets in pairs]

    def refuse_trained(self, groups: Sequence[Group], optimizers: Sequence[Optimizer]) -> None:
        """Raises ValueError for a target that one of the optimizers would move, too. A frozen one
        gets no gradient, as under ``SGD(model.parameters())`` where the model has the teacher."""
        owner = {
            p: type(one).__name__
            for one in optimizers
            for group in one.param_groups
            for p in group["params"]
        }
        for group, targets in zip(groups, self._targets(groups), strict=True):
            for i, target in enumerate(targets if group["average"] is not None else ()):
                if target.requires_grad and target in owner:
                    raise ValueError(
                        f"Invalid into: {owner[target]} has its parameter "
                        f"{checks.name_of(group, i)}, which averages are written to (expected a "
                        "frozen one, or one that no optimizer has)"
                    )

    def attach(self, groups: Sequence[Group], state: Any) -> bool:
        """Makes what the target holds the averages. Returns whether something was not so before."""
        changed = False
        for group, targets in zip(groups, self._targets(groups), strict=True):
            if group["average"] is None:
                continue
            for i, (p, target) in enumerate(zip(group["params"], targets, strict=True)):
                held = state[p].get(AVERAGE)
                if held is not None and _same_memory(local(held), local(target)):
                    continue
                _check(f"parameter {checks.name_of(group, i)}", p, target)
                state[p][AVERAGE] = target.detach()
                changed = True
        return changed

    def written(self, groups: Sequence[Group]) -> list[Tensor]:
        """The tensors of the target that averages live in."""
        pairs = zip(groups, self._targets(groups), strict=True)
        return [t for group, targets in pairs if group["average"] is not None for t in targets]

    def _targets(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """What the averages of each group live in, looked for anew where something has changed."""
        changed = self._module is not None and self._module.changed()
        params = [group["params"] for group in groups]
        if changed or not all(map(is_, params, [known for known, _ in self._found])):
            self._found = []
        if not self._found:
            targets = self._of_tensors(groups) if self._module is None else self._of_module(groups)
            if self._module is not None:
                self._module.look()
            self._found = list(zip(params, targets, strict=True))
        return [targets for _, targets in self._found]

    def _of_tensors(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        rest = list(self._tensors)
        count = sum(len(group["params"]) for group in groups)
        if len(rest) != count:
            raise ValueError(f"Invalid into: {len(rest)} tensors (expected {count})")
        return [[rest.pop(0) for _ in group["params"]] for group in groups]

    def _of_module(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        assert self._module is not None
        module = self._module.module
        named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        named.update(module.named_buffers(remove_duplicate=False))
        if not all("param_names" in group for group in groups):
            raise ValueError("Invalid into: a module for parameters without names")
        names = [name for group in groups for name in group["param_names"]]
        missing = ", ".join(name for name in names if name not in named)
        if missing:
            raise ValueError(f"Invalid into: {type(module).__name__} has no {missing}")
        return [[named[name] for name in group["param_names"]] for group in groups]


def _in_dtype_of(group: Group, targets: Sequence[Tensor]) -> Average | None:
    policy = next(iter(policies_of(group["average"])), None)
    if policy is None:
        return None
    natural = [policy.dtype_for(p.dtype) for p in group["params"]]
    dtypes = [target.dtype for target in targets]
    if dtypes == natural:
        return policy
    if policy.dtype is not None or len(set(dtypes)) > 1:
        i = next(i for i, pair in enumerate(zip(dtypes, natural, strict=True)) if len({*pair}) > 1)
        raise ValueError(
            f"Invalid into: parameter {checks.name_of(group, i)} has dtype {dtypes[i]} there "
            f"(expected {natural[i]})"
        )
    _check_moves(policy, dtypes[0])
    return replace(policy, dtype=dtypes[0])


def _check_moves(policy: Average, dtype: torch.dtype) -> None:
    least = LEAST_WEIGHT.get(dtype)
    if least is None:
        return
    weight = policy.weight
    if isinstance(weight, Mean) or (isinstance(weight, Ema) and 1.0 - weight.decay < least):
        raise ValueError(
            f"Invalid into: averages in {dtype} cannot follow {policy} (expected float32, weights "
            f"of {least} or more, or a policy with dtype={dtype})"
        )


def _check(name: str, param: Tensor, target: Tensor) -> None:
    if target.shape != param.shape:
        raise ValueError(
            f"Invalid into: {name} has shape {tuple(target.shape)} there (expected "
            f"{tuple(param.shape)})"
        )
    if not is_sharded_as(target, param):
        raise ValueError(f"Invalid into: {name} is sharded otherwise there (expected both alike)")
    there = local(target)
    if there.device != local(param).device:
        raise ValueError(
            f"Invalid into: {name} is on {there.device} there (expected {local(param).device})"
        )
    if not lies_as(there.detach(), local(param)):
        raise ValueError(
            f"Invalid into: {name} has another layout there, {there.stride()} (expected "
            f"{local(param).stride()})"
        )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape
