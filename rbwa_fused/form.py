"""The first half of reading a state dict: what it is made of, and whose it is.

checkpoint.py has the other half, what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from rbwa_fused.rules import (
    ADAM,
    IMPLICIT,
    RSGDM_IMPLICIT,
    RULES,
    SCHEDULE_FREE_ADAMW,
    SCHEDULE_FREE_SGD,
    Rule,
)
from rbwa_fused.streams import STREAMS

# By the names of rules: the class of torch, or of the package schedulefree, whose checkpoints they
# take, and what it has had in its groups from its first versions on, and no other class has all of.
SGDS = "torch.optim.SGD", ("lr", "momentum", "dampening", "weight_decay")
ADAMS = "torch.optim.Adam", ("lr", "betas", "eps", "weight_decay", "amsgrad")
FREE = ("lr", "weight_decay", "k", "weight_sum", "lr_max", "train_mode", "warmup_steps")
FREE_SGDS = "schedulefree.SGDScheduleFree", (*FREE, "momentum")
FREE_ADAMS = "schedulefree.AdamWScheduleFree", (*FREE, "betas", "eps")
OF_TORCH = dict.fromkeys(RULES, SGDS) | {
    ADAM.name: ADAMS,
    SCHEDULE_FREE_SGD.name: FREE_SGDS,
    SCHEDULE_FREE_ADAMW.name: FREE_ADAMS,
}


def exported(group: Mapping[str, Any]) -> bool:
    """Whether a group is of a state dict of ours: it names one of our rules, or has all counters.
    One key of such a name may be a user's own."""
    rule = group.get("rule")
    known = isinstance(rule, str) and rule in RULES
    return known or all(group.get(key) is not None for key in ("rule", "step", "n_averaged"))


def rule_of(group: Mapping[str, Any]) -> str:
    """The rule of a group that names none, by its hyperparameters."""
    if "weight_lr_power" in group:
        return (SCHEDULE_FREE_ADAMW if "betas" in group else SCHEDULE_FREE_SGD).name
    return "adam" if "betas" in group else "sgd"


def torchs(rule: Rule) -> str:
    """The class of torch whose checkpoints a rule takes."""
    return OF_TORCH[rule.name][0]


def check(state_dict: Any, rule: Rule) -> None:
    """Raise ValueError or TypeError for what no optimizer's ``state_dict()`` returns, ours or that
    of torch's class."""
    mapping("state_dict", state_dict)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"Invalid state_dict: no {key!r} among its keys {short(list(state_dict))} "
                "(expected what an optimizer's state_dict() returns)"
            )
    state, groups = state_dict["state"], state_dict["param_groups"]
    mapping("state in the checkpoint", state)
    _sequence("param_groups in the checkpoint", groups)
    known = set()
    for i, group in enumerate(groups):
        name = f"param group {i} in the checkpoint"
        mapping(name, group)
        for param in _params(name, group):
            if param in known:
                raise ValueError(f"Invalid params of {name}: {short(param)} is named twice")
            known.add(param)
        if not exported(group):
            of_torch(name, group, rule)
        else:
            _numbers(group)
    for key, held in state.items():
        if key in known:
            mapping(f"state of parameter {short(key)} in the checkpoint", held)
        elif isinstance(held, Mapping) and held.keys() & STREAMS:
            raise ValueError(
                f"Invalid state in the checkpoint: that of {short(key)}, which is no parameter "
                f"(expected some of {short(sorted(known, key=str))})"
            )


def mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"Invalid {name}: {short(value)} (expected a dict)")


def _sequence(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"Invalid {name}: {short(value)} (expected a list)")


def _params(name: str, group: Mapping[str, Any]) -> list[int | str]:
    """The numbers by which a group names its parameters, or names after a conversion."""
    if "params" not in group:
        raise ValueError(f"Invalid {name}: no 'params' among its keys {short(list(group))}")
    params = group["params"]
    _sequence(f"params of {name}", params)
    for param in params:
        if not isinstance(param, int | str):
            raise TypeError(f"Invalid params of {name}: {short(param)} (expected a number)")
    names = group.get("param_names")
    if names is not None:
        _sequence(f"param_names of {name}", names)
        if len(names) != len(params) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"Invalid param_names of {name}: {short(names)} (expected {len(params)} texts)"
            )
    return list(params)


def of_torch(name: str, group: Mapping[str, Any], rule: Rule) -> None:
    """Raise for a group of another class of optimizer than the rule's of torch."""
    theirs, needed = OF_TORCH[rule.name]
    missing = [key for key in needed if key not in group]
    if missing:
        keys = [key for key in group if key not in ("params", "param_names")]
        raise ValueError(
            f"Invalid {name}: another optimizer's, with {', '.join(map(str, keys)) or 'no keys'} "
            f"and without {', '.join(missing)} (expected one of rbwa_fused's or of {theirs})"
        )


def count(name: str, value: Any) -> None:
    """Raise ValueError for what is neither None nor a count."""
    counts = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    if value is not None and not counts:
        raise ValueError(f"Invalid {name} in the checkpoint: {short(value)} (expected a count)")


def _numbers(group: Mapping[str, Any]) -> None:
    """What rbwa_fused adds to a group, as far as its type goes; checkpoint.py reads it."""
    for key in ("step", *(key for key in group if str(key).startswith("n_averaged"))):
        count(key, group.get(key))
    beta = group.get(IMPLICIT)
    implicit = group.get("rule") == RSGDM_IMPLICIT.name
    if beta is not None and not (implicit and isinstance(beta, float) and 0.0 <= beta < 1.0):
        raise ValueError(
            f"Invalid implicit_momentum in the checkpoint: {short(beta)} (expected None, or the "
            "momentum at implicit RSGDM's first step)"
        )
