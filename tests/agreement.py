"""Comparing an optimizer of rbwa_fused with its twin, after an event, to the twin's bounds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from bounds import F64, Value
from torch import Tensor
from twin import AVERAGE, MASTER, Twin


def compare(name: str, actual: Tensor, expected: Value, dtype: torch.dtype) -> None:
    """A tensor's dtype, shape and numbers."""
    assert actual.dtype == dtype, name
    assert actual.shape == expected.v.shape, name
    apart = (actual.detach().to(F64) - expected.v).abs()
    assert bool((apart <= expected.off).all()), f"{name}: {apart.max()} > {expected.off.max()}"


LATE = "max_exp_avg_sq"  # of amsgrad that was switched on


def started(state: dict[str, Any]) -> dict[str, Any]:
    """A saved state without the zeros that torch.optim.Adam asks for before a first step."""
    if float(state.get("step", 1)) > 0:
        return state
    return {key: value for key, value in state.items() if key in (AVERAGE, MASTER)}


def agree(
    opt: Any, params: Sequence[Tensor], twin: Twin, *, shared: Collection[int] = (), backend: str
) -> None:
    """Everything that can be seen. The twin then goes on from the optimizer's numbers, so that each
    bound is that of one event; not from its counters, nor from which state there is.

    Parameters that others share memory with are compared as numbers alone: `shared`.
    """
    saved = opt.state_dict()
    for theirs, ours in zip(saved["param_groups"], twin.groups, strict=True):
        for name, value in ours.options.items():
            assert theirs[name] == value, name
        if twin.rule.counts is not None:
            assert {key: theirs[key] for key in ours.counts} == ours.counts
        if twin.rule.modes:
            assert theirs["train_mode"] is twin.trains
        assert theirs["step"] == twin.steps
        assert theirs["n_averaged"] == ours.averaged
        assert theirs["implicit_momentum"] == (None if twin.rule.modes else ours.beta)
        assert theirs["average"] == (None if ours.policy is None else ours.policy.describe())
    assert opt.n_averaged == max(group.told for group in twin.groups)
    for i, (p, member) in enumerate(zip(params, twin.members, strict=True)):
        name = f"parameter {i}"
        compare(name, p, member.theta, member.dtype)
        state = started(saved["state"].get(i, {}))
        if LATE in state.keys() - member.state.keys():  # for torch, whose next step looks for it
            assert not state.pop(LATE).any(), name
        if backend == "cuda" and p.numel() == 0:
            continue  # no block runs for it, which could mark its first step
        assert state.keys() == member.state.keys(), name
        for key, (expected, dtype) in member.state.items():
            compare(f"{key} of {name}", state[key], expected, dtype)
            member.state[key] = Value.of(state[key]), dtype
        for which, equals in ((AVERAGE, twin.copied), (MASTER, twin.rounded)):
            if member in equals and i not in shared:
                source = state[which]
                assert torch.equal(p, source.to(p.dtype)), f"{name}, a copy of its {which}"
    for p, member in zip(params, twin.members, strict=True):
        member.theta.v.copy_(p.detach())
        member.theta.off.zero_()
    twin.copied, twin.rounded = [], []
