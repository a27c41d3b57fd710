"""Averages that other libraries have saved, in the layouts of their state dicts.

torch's AveragedModel: ``n_averaged`` and ``module.NAME``. timm's ModelEmaV3: ``module.NAME``.
ema-pytorch's EMA: ``step``, ``initted``, ``ema_model.NAME`` beside ``online_model.NAME``. EMAModel
of diffusers: ``shadow_params``, a list in the order of the parameters, and ``optimization_step``.
A plain state dict: ``NAME``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rbwa_fused.engine import checks

Group = dict[str, Any]


class Saved(NamedTuple):
    """Averages by name, or in the order of the parameters, and how many samples they have, where
    that is known."""

    averages: dict[str, Tensor] | list[Tensor]
    samples: int | None


def read(state_dict: Mapping[str, Any]) -> Saved:
    """What a state dict of one of these layouts says."""
    if "shadow_params" in state_dict:
        return Saved(list(state_dict["shadow_params"]), _count(state_dict, "optimization_step"))
    for prefix, counter in (("ema_model.", "step"), ("module.", "n_averaged")):
        named = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if named:
            return Saved(named, _count(state_dict, counter))
    return Saved(dict(state_dict), None)


def _count(state_dict: Mapping[str, Any], key: str) -> int | None:
    value = state_dict.get(key)
    return None if value is None else int(value)


def matched(
    saved: Saved, groups: Sequence[Group], left_out: Collection[str]
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, parameter and its average, of all that groups average.

    Args:
        left_out: names that a saved dict may have and groups need not, such as of buffers.

    Raises:
        ValueError: for missing or further names, all of them said, another number or another shape.
        TypeError: for what is no tensor.
    """
    params = [
        (checks.name_of(group, i), p, group.get("param_names", [None] * (i + 1))[i])
        for group in groups
        for i, p in enumerate(group["params"])
        if group["average"] is not None
    ]
    found: list[Any]
    if isinstance(saved.averages, list):
        found = saved.averages
        if len(found) != len(params):
            raise ValueError(f"the state dict has {len(found)} averages (expected {len(params)})")
    else:
        names = [name for _, _, name in params]
        if None in names:
            raise ValueError("averages by name for parameters without names (expected named ones)")
        missing = [name for name in names if name not in saved.averages]
        further = [name for name in saved.averages if name not in {*names, *left_out}]
        if missing or further:
            said = [f"no {', '.join(missing)}"] * bool(missing)
            said += [f"unknown {', '.join(further)}"] * bool(further)
            raise ValueError(f"the state dict has {' and '.join(said)}")
        found = [saved.averages[name] for name in names]
    for (name, p, _), value in zip(params, found, strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"the average of parameter {name} is {type(value).__name__}")
        if value.shape != p.shape:
            raise ValueError(
                f"the average of parameter {name} has shape {tuple(value.shape)} "
                f"(expected {tuple(p.shape)})"
            )
    return [(name, p, value) for (name, p, _), value in zip(params, found, strict=True)]
