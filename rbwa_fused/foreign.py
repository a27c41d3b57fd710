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
    """Averages by name, or in the order of the parameters.

    Attributes:
        samples: in the averages; 0 where the next one is to be a copy, 1 where nothing is said.
        steps: that were taken, as far as that is known.
    """

    averages: dict[str, Tensor] | list[Tensor]
    samples: int = 1
    steps: int = 1


def read(state_dict: Mapping[str, Any]) -> Saved:
    """What a state dict of one of these layouts says."""
    if "shadow_params" in state_dict:
        steps = int(state_dict.get("optimization_step", 1))
        samples = max(0, steps - int(state_dict.get("update_after_step", 0)))
        return Saved(list(state_dict["shadow_params"]), samples, steps)
    named = _below("ema_model.", state_dict)
    if named:
        steps = int(state_dict.get("step", 1))
        return Saved(named, steps if state_dict.get("initted", True) else 0, steps)
    named = _below("module.", state_dict)
    if named:
        samples = int(state_dict.get("n_averaged", 1))
        return Saved(named, samples, samples)
    return Saved(dict(state_dict))


def _below(prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


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
