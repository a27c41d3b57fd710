"""State dicts: what goes into one, and what must be true of one before it is loaded."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rbwa_fused.average import Average, structure
from rbwa_fused.flat import STREAMS

if TYPE_CHECKING:
    from rbwa_fused.optimizer import FusedOptimizer

# What `exported` adds to a group. A checkpoint of torch.optim.SGD has none of them.
OURS = ("rule", "step", "n_averaged", "implicit_momentum")


@contextmanager
def exported(opt: FusedOptimizer) -> Iterator[None]:
    """Makes groups and state what a checkpoint holds: primitives, and the training state."""
    policies = [group["average"] for group in opt.param_groups]
    live = opt._evaluating.averages() if opt._evaluating is not None else {}
    buffers = {p: opt.state[p]["average"] for p in live}
    try:
        for state in opt._groups:
            state.group["average"] = None if state.policy is None else repr(state.policy)
            values = opt.rule_name, opt._steps, state.n_averaged, state.beta
            state.group.update(zip(OURS, values, strict=True))
        for p, average in live.items():
            opt.state[p]["average"] = average
        yield
    finally:
        for group, policy in zip(opt.param_groups, policies, strict=True):
            group["average"] = policy
            for key in OURS:
                group.pop(key, None)
        for p, buffer in buffers.items():
            opt.state[p]["average"] = buffer


def load(opt: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Loads a state dict after checking all of it; hooks as in torch.optim.Optimizer."""
    state_dict = state_dict.copy()
    for pre_hook in opt._optimizer_load_state_dict_pre_hooks.values():
        hook_result = pre_hook(opt, state_dict)
        if hook_result is not None:
            state_dict = hook_result
    saved_groups = deepcopy(state_dict["param_groups"])
    groups = opt.param_groups
    if len(groups) != len(saved_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    lengths = [len(group["params"]) for group in groups]
    if lengths != [len(saved["params"]) for saved in saved_groups]:
        raise ValueError(
            "loaded state dict contains a parameter group "
            "that doesn't match the size of optimizer's group"
        )
    merged = []
    counters = []
    for group, saved in zip(groups, saved_groups, strict=True):
        _check_rule(opt, saved)
        _check_policy(group["average"], saved)
        counters.append([saved.get(key) for key in OURS])
        new = {k: v for k, v in saved.items() if k not in (*OURS, "params", "average")}
        new = {**group, **new}
        opt._check_hyperparameters(new)
        merged.append(new)

    ids = chain.from_iterable(saved["params"] for saved in saved_groups)
    params = chain.from_iterable(group["params"] for group in groups)
    param_of = dict(zip(ids, params, strict=True))
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, held in state_dict["state"].items():
        if key in param_of:
            state[param_of[key]] = {
                name: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
                for name, value in held.items()
                if not (name in STREAMS and value is None)
            }
        else:
            state[key] = held
    for index, (group_state, saved) in enumerate(zip(opt._groups, saved_groups, strict=True)):
        for i, p in enumerate(group_state.group["params"]):
            name = f"parameter {i} of group {index}"
            n_averaged = saved.get("n_averaged", 0)
            _check_state(name, p, state.get(p, {}), opt, group_state, n_averaged)

    for group, new in zip(groups, merged, strict=True):
        group.update(new)
    opt.state = state
    opt._steps = max((step or 0 for _, step, _, _ in counters), default=0)
    for group_state, (_, _, n_averaged, beta) in zip(opt._groups, counters, strict=True):
        group_state.n_averaged = n_averaged or 0
        group_state.beta = beta
    opt._rebuild()
    for post_hook in opt._optimizer_load_state_dict_post_hooks.values():
        post_hook(opt)


def _check_rule(opt: FusedOptimizer, saved: dict[str, Any]) -> None:
    rule = saved.get("rule", "sgd")
    if rule != opt.rule_name:
        raise ValueError(f"the checkpoint's rule is {rule!r}, the optimizer's {opt.rule_name!r}")


def _check_policy(policy: Average | None, saved: dict[str, Any]) -> None:
    theirs = saved.get("average")
    if theirs is None:
        return
    ours = None if policy is None else repr(policy)
    if theirs == ours:
        return
    if structure(theirs) != structure(ours):
        raise ValueError(f"the checkpoint's average is {theirs}, the optimizer's {ours}")
    warnings.warn(
        f"the checkpoint's average was {theirs}; going on with the optimizer's {ours}",
        stacklevel=4,
    )


def _check_state(
    name: str,
    param: Tensor,
    held: dict[str, Any],
    opt: FusedOptimizer,
    group: Any,
    n_averaged: int,
) -> None:
    for stream in STREAMS.keys() & held.keys():
        value = held[stream]
        if not isinstance(value, Tensor) or value.shape != param.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(
                f"the checkpoint's {stream} of {name} has shape {shape} "
                f"(expected {tuple(param.shape)})"
            )
    momentum = [stream for stream in opt.streams if stream in held]
    if momentum and len(momentum) != len(opt.streams):
        raise ValueError(f"the checkpoint's state of {name} has {momentum}, not all of {opt.streams}")
    if "average" in held:
        average = held["average"]
        if not group.buffered(param):
            raise ValueError(f"the checkpoint has an average for {name}, which keeps none")
        expected = group.policy.dtype_for(param.dtype)
        if average.dtype != expected:
            raise ValueError(
                f"the checkpoint's average of {name} has dtype {average.dtype} "
                f"(expected {expected})"
            )
    elif group.buffered(param) and n_averaged > 0:
        raise ValueError(f"the checkpoint counts {n_averaged} samples, but {name} has no average")
