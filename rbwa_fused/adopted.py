"""Groups and state that are put in place from outside, as by torch.optim.Optimizer.__setstate__.

Whoever calls `torch.optim.Optimizer.load_state_dict(opt, …)`, or `__setstate__` with part of the
state, hands over groups that may lack what is ours, or have what `state_dict()` puts there:
counters, rule and the policy's repr. Here they become groups of the optimizer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rbwa_fused import checkpoint, checks
from rbwa_fused.plan import GroupPlan, Plan

if TYPE_CHECKING:
    from rbwa_fused.layout import Counters, LaidOut

CAST = (torch.bfloat16, torch.float16)
Group = dict[str, Any]


def complete(opt: LaidOut, group: Group) -> Group:
    """A group with what it lacks of ours, and without what a state dict adds to one."""
    exported = _exported(group)
    full = {**opt.defaults, **(checkpoint.live_keys(group) if exported else group)}
    full["params"] = group["params"]
    if exported or isinstance(group.get("average", ""), str):
        full["average"] = _policy(opt, group)
    checks.average(full, opt._capturable)
    return full


def adopt(opt: LaidOut, groups: list[Group], held: Any) -> tuple[Any, int, Counters]:
    """Completes the groups in place, after checking them and the state that belongs to them.

    Returns the state, the steps taken and each group's counters: what the groups say of them, or
    else what the optimizer has counted.

    Raises:
        ValueError, TypeError: as load_state_dict; also for float32 state that was cast to 16 bits,
            as torch.optim.Optimizer.load_state_dict does. Nothing has been changed then.
    """
    opt._settle()
    plan = Plan(opt.rule, opt._check_hyperparameters, opt.hyperparameters, opt._master_weights)
    completed = []
    counters: Counters = []
    notes: dict[str, None] = {}
    for group in groups:
        if _exported(group) or _is_torchs(group):
            checkpoint.check_counters(opt, group)
        if isinstance(group.get("average"), str):
            checkpoint.check_policy(_policy(opt, group), group, notes)
        full = complete(opt, group)
        opt._check_hyperparameters(full)
        checks.params(full, opt._master_weights)
        counters.append(_counted(opt, group, held))
        group_plan = plan.add(full, *counters[-1])
        for i, p in enumerate(full["params"]):
            name = f"parameter {i} of group {group_plan.index}"
            streams = _streams(held, p)
            _check_not_cast(name, p, streams, group_plan)
            checkpoint.check_state(name, p, streams, opt.streams, group_plan, counters[-1][0])
        completed.append(full)
    steps = [group["step"] for group in groups if _exported(group)]
    if not steps and opt._steps == 0:
        checkpoint.refuse_uncounted(held)

    if notes:
        warnings.warn("; ".join(notes), stacklevel=4)
    for group, full in zip(groups, completed, strict=True):
        for key in group.keys() - full.keys():
            del group[key]
        group.update(full)
        for p in group["params"]:
            if p in held:
                held[p] = _streams(held, p)
    state = held if isinstance(held, defaultdict) else defaultdict(dict, held)
    return state, max(steps, default=opt._steps), counters


def _streams(held: Mapping[Any, Any], param: Tensor) -> dict[str, Any]:
    """A parameter's state without Nones, which older versions of torch kept for momentum."""
    return {k: v for k, v in held.get(param, {}).items() if v is not None}


def _exported(group: Group) -> bool:
    """Whether a group is a state dict's: keys of such names may be a user's own, but not all."""
    return all(group.get(key) is not None for key in ("rule", "step", "n_averaged"))


def _is_torchs(group: Group) -> bool:
    return "rule" not in group and "nesterov" in group


def _known(opt: LaidOut, group: Group) -> GroupPlan | None:
    """The plan of the group that has had a parameter of this one."""
    plans = opt._plan.groups if opt._plan is not None else []
    plan_of = {p: plan for plan in plans for p in plan.params}
    return next((plan_of[p] for p in group["params"] if p in plan_of), None)


def _policy(opt: LaidOut, group: Group) -> Any:
    known = _known(opt, group)
    return known.policy if known is not None else opt.defaults.get("average")


def _counted(opt: LaidOut, group: Group, held: Mapping[Any, Any]) -> tuple[int, float | None]:
    """A group's samples and beta."""
    if _exported(group):
        return group["n_averaged"], group.get("implicit_momentum")
    known = _known(opt, group)
    if known is None:
        return 0, None
    kept = [_streams(held, p) for p in group["params"]]
    buffered = any(map(known.buffered, group["params"]))
    averaged = not buffered or any("average" in streams for streams in kept)
    moved = any("momentum_buffer" in streams for streams in kept)
    return known.n_averaged if averaged else 0, known.beta if moved else None


def _check_not_cast(name: str, param: Tensor, held: Mapping[str, Any], plan: GroupPlan) -> None:
    for stream in held.keys() & {"average", "master_param"}:
        value = held[stream]
        expected = torch.float32 if stream == "master_param" else plan.dtype_of(stream, param)
        if isinstance(value, Tensor) and value.dtype in CAST and value.dtype != expected:
            raise ValueError(
                f"the {stream} of {name} has dtype {value.dtype} (expected {expected}): "
                "torch.optim.Optimizer.load_state_dict casts state to its parameter's dtype; use "
                "opt.load_state_dict"
            )
