"""A model's state dict with other values in place of some parameters and buffers.

`state_dict()` usually returns the model's own parameters and buffers, of which some are exchanged
here for others. A module may return something else: `_save_to_state_dict`, hooks and
`get_extra_state` make copies, casts and products of weights. Of those nobody knows where they come
from, so the other values stand in the parameters while such a model is asked again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from rbwa_fused.engine.sharded import is_flattened, is_sharded, local, reshard


def state_dict_with(model: nn.Module, other: Mapping[Tensor, Tensor]) -> dict[str, Any]:
    """The model's state dict with others in place of some parameters and buffers; every tensor is a
    copy."""
    own = chain(model.parameters(), model.buffers())
    other = {t: other[t] for t in own if t in other}
    if any(map(is_flattened, model.parameters())):  # FSDP1 gathers copies, on all ranks
        return _asked_with(model, other)
    result = model.state_dict(keep_vars=True)  # with the metadata that loading asks for
    members = dict.fromkeys(chain(model.parameters(), model.buffers()))
    placed = {_place(t): t for t in members}
    sources = {  # members that share memory are told apart by what they are
        name: value if value in members else placed.get(_place(value))
        for name, value in result.items()
        if isinstance(value, Tensor)
    }
    # All of them must be found: of a model that is gathered on one rank the others return nothing,
    # and must ask as often.
    found = set(filter(other.__contains__, sources.values()))
    missing = other.keys() - found - set(model.buffers())  # which need not be persistent
    if other and (None in sources.values() or len(sources) < len(result) or missing):
        return _asked_with(model, other)
    for name, source in sources.items():
        if source in other:
            result[name] = other[source].to(source.dtype)
    return copied(result)


def copied(result: dict[str, Any]) -> dict[str, Any]:
    """A state dict, all of whose tensors it gives memory of their own, that anybody may use."""
    with torch.inference_mode(False):
        for name, value in result.items():
            result[name] = tree_map_only(Tensor, lambda t: t.detach().clone(), value)
    return result


def _asked_with(model: nn.Module, other: Mapping[Tensor, Tensor]) -> dict[str, Any]:
    with _standing_in(model, other):
        return copied(model.state_dict())


def _place(tensor: Tensor) -> Hashable:
    """What tensors have in common that show the same memory in the same way."""
    memory = local(tensor)
    if memory.layout != torch.strided or is_traceable_wrapper_subclass(memory):
        return id(tensor)
    seen_as = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg(), is_sharded(tensor))
    return (memory.device, memory.data_ptr(), *seen_as)


@contextmanager
def _standing_in(model: nn.Module, other: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """The parameters have other values inside, and the very bits of before again after it; written
    through `.data`, which leaves their versions alone, since a backward pass may still need them.
    """
    own = {p: local(p).detach().clone() for p in other}
    try:
        _write(other)
        yield
    finally:
        reshard(model)
        _write(own)


def _write(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        with torch.inference_mode() if p.is_inference() else nullcontext():  # a buffer made there
            local(p).data.copy_(local(value))
    torch.clear_autocast_cache()  # of 16-bit copies, which does not look at versions
