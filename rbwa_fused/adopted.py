"""Groups and state that are put in place from outside, as by torch.optim.Optimizer.__setstate__.

Whoever calls `torch.optim.Optimizer.load_state_dict(opt, …)`, or `__setstate__` with part of the
state, hands over groups that may lack what is ours, or have what `state_dict()` puts there:
counters, rule and the policy's repr. Here they become groups of the optimizer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rbwa_fused import checkpoint, form, renumbered
from rbwa_fused.engine import backends, checks
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.rows import GroupPlan, Plan
from rbwa_fused.engine.tables import Counts
from rbwa_fused.several import policies_of
from rbwa_fused.streams import AVERAGES, NARROW

Group = dict[str, Any]


def complete(engine: Engine, defaults: Group, group: Group) -> Group:
    """A group with what it lacks of ours, and without what a state dict adds to one.

    Raises:
        ValueError: for a group of another class of optimizer.
    """
    exported = form.exported(group)
    if _is_torchs(group):
        form.of_torch("param group", group, engine.rule)
    full = {**defaults, **(checkpoint.live_keys(group) if exported else group)}
    full["params"] = group["params"]
    if exported or isinstance(group.get("average", ""), str):
        full["average"] = _policy(engine, defaults, group)
    checks.average(full, engine.options.capturable)
    return full


def adopt(
    engine: Engine, defaults: Group, groups: list[Group], held: Any, *, loaded: bool
) -> tuple[Any, int, list[Counts]]:
    """Completes the groups in place, after checking them and the state that belongs to them.

    `loaded` says that the state is another one than before.

    Returns the state, the steps taken and each group's counters: what a checkpoint's groups say of
    them, as load_state_dict takes it, or else what the optimizer has counted.

    Raises:
        ValueError, TypeError: as load_state_dict; also for float32 state that was cast to 16 bits,
            as torch.optim.Optimizer.load_state_dict does. Nothing has been changed then.
    """
    engine.read_back()
    plan = Plan(engine.rule, engine.options.dtypes)
    notes: dict[str, None] = {}
    completed = [complete(engine, defaults, group) for group in groups]
    saved = [_saved(group, loaded) for group in groups]
    for group, said in zip(groups, saved, strict=True):
        if said is not None or _is_torchs(group):
            own = group if form.exported(group) else {"rule": form.rule_of(group)}
            checkpoint.check_counters(engine.rule, own)
    told = [said for said in saved if said is not None]
    outdated = checkpoint.leave_out_outdated(engine.rule, told, notes)
    params = chain.from_iterable(group["params"] for group in groups)
    kept = {p: _kept(held[p], p in outdated) for p in params if p in held}
    counts: list[Counts] = []
    for group, said, full in zip(groups, saved, completed, strict=True):
        theirs = group if said is None else said
        if isinstance(theirs.get("average"), str):
            own = checkpoint.check_averages(full["average"], theirs, notes)
            for p in theirs["params"]:
                kept[p] = renumbered.state_of(kept.get(p, {}), own)
        engine.rule.check(full)
        checks.params(full, engine.options.master_weights)
        counts.append(_counted(engine, group, kept) if said is None else checkpoint.counted(said))
        group_plan = plan.add(full, *counts[-1])
        for i, p in enumerate(full["params"]):
            name = f"parameter {i} of group {group_plan.index}"
            streams = kept.get(p, {})
            _check_not_cast(name, p, streams, group_plan)
            checkpoint.check_state(name, p, streams, group_plan, counts[-1])
    steps = engine.steps
    if told:
        policies = [p for full in completed for p in policies_of(full["average"])]
        steps = checkpoint.steps_taken(policies, told, None, not outdated, notes)
    elif steps == 0:
        checks.refuse_uncounted(held)

    if notes:
        warnings.warn("; ".join(notes), stacklevel=backends.user_level())
    for group, full in zip(groups, completed, strict=True):
        for key in group.keys() - full.keys():
            del group[key]
        group.update(full)
    held.update(kept)
    state = held if isinstance(held, defaultdict) else defaultdict(dict, held)
    return state, steps, counts


def _kept(held: Mapping[str, Any], outdated: bool) -> dict[str, Any]:
    """A parameter's state without Nones, which older versions of torch kept for momentum."""
    return {k: v for k, v in held.items() if v is not None and not (k in AVERAGES and outdated)}


def _saved(group: Group, loaded: bool) -> Group | None:
    """What a checkpoint says of a group: all that ours have, of torch.optim.SGD's that it counts
    nothing. None where the group is of no checkpoint."""
    if form.exported(group):
        return group.copy()
    return {"params": group["params"]} if loaded and _is_torchs(group) else None


def _is_torchs(group: Group) -> bool:
    """Whether a group is not even a part of ours."""
    return not all(key in group for key in checkpoint.OURS)


def _policy(engine: Engine, defaults: Group, group: Group) -> Any:
    known = engine.tables.known(group)
    return known.average if known is not None else defaults.get("average")


def _counted(engine: Engine, group: Group, kept: Mapping[Any, Any]) -> Counts:
    """What the engine has counted for a group, and what its first step has left."""
    known = engine.tables.known(group)
    if known is None:
        return Counts()
    streams = [kept.get(p, {}) for p in group["params"]]
    buffered = any(map(known.has_buffer, group["params"]))
    averaged = not buffered or any("average" in held for held in streams)
    moved = any(stream in held for held in streams for stream in known.rule.streams[:1])
    further = [
        known.samples(key) * any(key in held for held in streams) for key in [*known.averages][1:]
    ]
    n_averaged = known.n_averaged if averaged else 0
    return Counts(n_averaged, dict(known.memory) if moved else None, tuple(further))


def _check_not_cast(name: str, param: Tensor, held: Mapping[str, Any], plan: GroupPlan) -> None:
    for stream in held.keys() & {*AVERAGES, "master_param"}:
        value = held[stream]
        expected = torch.float32 if stream == "master_param" else plan.dtype_of(stream, param)
        if isinstance(value, Tensor) and value.dtype in NARROW and value.dtype != expected:
            raise ValueError(
                f"the {stream} of {name} has dtype {value.dtype} (expected {expected}): "
                "torch.optim.Optimizer.load_state_dict casts state to its parameter's dtype; use "
                "opt.load_state_dict"
            )
