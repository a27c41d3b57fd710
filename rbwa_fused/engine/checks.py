"""What may be stepped: checks of parameters and gradients, each before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rbwa_fused.engine.memory import is_plain, same_layout
from rbwa_fused.engine.segments import Segments
from rbwa_fused.engine.sharded import is_partial, local
from rbwa_fused.numbers import number
from rbwa_fused.renumbered import KEYS, keys_of
from rbwa_fused.rules import Rule
from rbwa_fused.several import averaging, policies_of
from rbwa_fused.streams import AVERAGES, DTYPES, STEP, STREAMS, working_dtype


def duplicates(group: dict[str, Any]) -> None:
    """Raise for a parameter that a new group names twice; its list of parameters is kept."""
    if not isinstance(group, dict) or isinstance(group["params"], Tensor | set):
        return  # torch says what is wrong with it, if anything is
    members = group["params"] = list(group["params"])
    tensors = [member[1] if isinstance(member, tuple) else member for member in members]
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ValueError("optimizer contains a parameter group with duplicate parameters")


def average(group: dict[str, Any], capturable: bool) -> None:
    """Raise for what is no policy, or one that a captured step cannot follow. False is None, and
    a list or a dict becomes `Several`."""
    given = group["average"] = averaging(group["average"])
    # torch.distributed.checkpoint looks in a state dict for the keys of live groups. Those that
    # other averages have left, such as the optimizer's, are none of this group's.
    own = dict.fromkeys(keys_of(given))
    for key in KEYS:
        if group.get(key, "") is None and key not in own:
            del group[key]
    group.update({key: None for key in own if key not in group})
    for policy in policies_of(given):
        if policy.custom and capturable:
            raise ValueError(
                f"Invalid average: {policy!r} with capturable=True (a custom weight runs on the "
                "host; a captured step cannot call it)"
            )


def params(group: dict[str, Any], master_weights: bool) -> None:
    """Raise for parameters that no kernel can step or average, naming the first."""
    for i, p in enumerate(group["params"]):
        name = f"parameter {name_of(group, i)}"
        if is_lazy(p):
            raise ValueError(f"{name} is uninitialized; run the model once before")
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device; materialize it first")
        if p.layout != torch.strided:
            raise TypeError(f"{name} has layout {p.layout} (expected torch.strided)")
        if p.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {p.dtype} (expected one of {DTYPES})")
        if is_partial(p):
            raise ValueError(f"{name} is a DTensor whose shards are terms of a sum")
        p = local(p)
        if is_traceable_wrapper_subclass(p):
            raise TypeError(f"{name} is a {type(p).__name__}, which has no plain memory of its own")
        spread = zip(p.shape, p.stride(), strict=True)
        if p.numel() and any(stride == 0 and size > 1 for size, stride in spread):
            raise ValueError(f"{name} is expanded: several elements share one memory location")
        working = working_dtype(p.dtype, master_weights)
        kept = [policy.dtype_for(working) for policy in policies_of(group["average"])]
        if len(set(kept)) > 1:
            raise ValueError(
                f"Invalid average: {name} would have averages in {kept} (expected one dtype)"
            )


def state(group: dict[str, Any], held: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise for a parameter whose state no step can go on with, such as one of another shape."""
    for i, p in enumerate(group["params"]):
        own, name = held.get(p) or {}, f"parameter {name_of(group, i)}"
        for stream in own.keys() & STREAMS:
            value = own[stream]
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"Invalid {stream} of {name}: {value!r} (expected a tensor)")
            if value.is_meta or value.is_complex() or value.layout != torch.strided:
                what = f"{value.dtype}, {value.layout} on {value.device}"
                raise TypeError(f"Invalid {stream} of {name}: {what} (expected a dense real one)")
            if value.shape != p.shape:
                raise ValueError(
                    f"{name} has shape {tuple(p.shape)}, its {stream} {tuple(value.shape)}"
                )


def parts(group: dict[str, Any], held: Mapping[Tensor, dict[str, Any]], rule: Rule) -> None:
    """Raise for a parameter of whose state somebody has taken a part away, and for a step in it
    that is no number."""
    for i, p in enumerate(group["params"]):
        own, name = held.get(p) or {}, f"parameter {name_of(group, i)}"
        if rule.counts and own.get(STEP) is not None:
            number(f"step of {name}", own[STEP])
        kept, needed = rule.kept_of(own)
        if kept not in ((), needed, (STEP,)):
            raise ValueError(
                f"the state of {name} has {kept}, not all of {needed} (expected all or none: its "
                "next step is its first then)"
            )


def refuse_uncounted(state: Mapping[Any, dict[str, Any]]) -> None:
    """Raise where averages were assigned before the first step: with no sample counted, the next
    one would replace them."""
    held = [own for own in state.values() if isinstance(own, dict)]
    if any(not own.keys().isdisjoint(AVERAGES) for own in held):
        raise ValueError(
            "averages were assigned to an optimizer that has counted no step; load_state_dict "
            "loads the counters, too (torch's ZeroRedundancyOptimizer does not, "
            "rbwa_fused.distributed.ZeroRedundancyOptimizer does)"
        )


def capturing() -> bool:
    """Whether a CUDA graph is captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def captured(what: str, instead: str) -> None:
    """Raise while a CUDA graph is captured: its replays would repeat what the host says now."""
    if capturing():
        raise RuntimeError(
            f"{what} while a CUDA graph is captured, whose replays would count nothing and take "
            f"the same sample again and again (expected {instead})"
        )


def fit(table: Segments, grads: list[Tensor | None], groups: Sequence[dict[str, Any]]) -> bool:
    """Checks a table's gradients in full; copies one of another layout to its parameter's, and one
    whose memory does not hold its elements as they are.

    Returns False where a parameter has another dtype, device, shape or layout than the table.

    Raises:
        RuntimeError: for a sparse gradient, in torch's words.
        TypeError, ValueError: for another dtype, or another shape or device.
    """
    if not all(table.fits(i) for i in range(len(grads))):
        return False
    for i, g in enumerate(grads):
        if g is None:
            continue
        p, memory = local(table.params[i]), table.memory[i]
        name = f"the gradient of parameter {name_of(groups[table.groups[i]], table.index[i])}"
        if g.layout != torch.strided:
            raise RuntimeError(f"rbwa_fused does not support sparse gradients: {name} is one")
        if g.dtype != p.dtype:
            raise TypeError(f"{name} has dtype {g.dtype} (expected {p.dtype})")
        if g.shape != p.shape:
            raise ValueError(f"{name} has shape {tuple(g.shape)} (expected {tuple(p.shape)})")
        if g.device != p.device:
            raise ValueError(f"{name} is on {g.device} (expected {p.device})")
        if is_traceable_wrapper_subclass(g):
            raise TypeError(f"{name} is a {type(g).__name__}, which has no plain memory of its own")
        if not (same_layout(g, memory) and is_plain(g)):
            grads[i] = torch.empty_strided(
                memory.shape, memory.stride(), dtype=memory.dtype, device=memory.device
            ).copy_(g.detach())
    return True


def name_of(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"{index} ({names[index]!r})" if names else str(index)
