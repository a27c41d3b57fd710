"""The optimizers behind whose steps an Averager samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from rbwa_fused.engine import checks
from rbwa_fused.engine.tables import Group
from rbwa_fused.several import policies_of


def steppers(
    optimizer: Optimizer | Sequence[Optimizer] | None, groups: Sequence[Group]
) -> list[Optimizer]:
    """The optimizers whose steps are counted: each behind a wrapper, such as accelerate's, that
    holds it as its ``optimizer``.

    Raises:
        TypeError: for one without hooks.
        ValueError: for trainable parameters that none of the optimizers has, and for an average
            that writes back to those of a schedule-free one.
    """
    if optimizer is None:
        return []
    several = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    found = [_inner(one) for one in several]
    if not found:
        raise ValueError("Invalid optimizer: an empty sequence")
    theirs = {p for one in found for group in one.param_groups for p in group["params"]}
    missing = [
        checks.name_of(group, i)
        for group in groups
        for i, p in enumerate(group["params"])
        if p.requires_grad and p not in theirs
    ]
    if missing:
        names = ", ".join(type(one).__name__ for one in found)
        raise ValueError(
            f"Invalid optimizer: {names} has not parameter {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + " (expected all that require gradients, or exclude=)"
        )
    _refuse_moving_schedule_free(found, groups)
    return found


def _refuse_moving_schedule_free(followed: list[Optimizer], groups: Sequence[Group]) -> None:
    """Ours and the package's, whose groups count the weights of their own average."""
    for group in groups:
        policy = next(iter(policies_of(group.get("average"))), None)
        if policy is None or policy.write_back_every == 0:
            continue
        for one in followed:
            free = [other for other in one.param_groups if "weight_sum" in other]
            if not {p for other in free for p in other["params"]}.isdisjoint(group["params"]):
                raise ValueError(
                    f"Invalid average: {policy} writes back to weights of {type(one).__name__}, "
                    "which with z say where its own average is"
                )


def _inner(optimizer: Any) -> Optimizer:
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError(
            f"Invalid optimizer: {type(optimizer).__name__} (expected a torch.optim.Optimizer; "
            "behind the steps of others call update())"
        )
    inner: Optimizer = optimizer
    return inner
