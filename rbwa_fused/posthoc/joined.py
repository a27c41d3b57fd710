"""Shards of several ranks put together: whole tensors out of a file for each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rbwa_fused.engine.sharded import is_flattened, is_sharded
from rbwa_fused.posthoc.tensors import Kind, Reader, Writer

Place = tuple[list[int], list[int]]  # the shape of the whole, and where in it a shard begins


def places_of(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Where the shards of this rank are in their wholes: of DTensors and of what every rank has
    whole, not of FSDP1's flat shards."""
    found: dict[str, Place] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            if not is_flattened(tensor):
                found[name] = list(tensor.shape), [0] * tensor.dim()
        else:
            from torch.distributed.tensor import DTensor
            from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

            assert isinstance(tensor, DTensor)
            _, offset = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            found[name] = list(tensor.shape), list(offset)
    return found


def whole_kinds(
    ranks: Sequence[Mapping[str, Kind]], places: Sequence[Mapping[str, Place]]
) -> dict[str, Kind] | None:
    """What the wholes are; None where a shard's place is not known, as of FSDP1's flat ones."""
    kinds = {}
    if any(of_rank.keys() != ranks[0].keys() for of_rank in ranks):
        return None  # such as the stages of a pipeline
    for name, kind in ranks[0].items():
        here = [of_rank.get(name) for of_rank in places]
        if None in here:
            return None
        known = [place for place in here if place is not None]
        blocks = {  # ranks may have replicas of one
            (tuple(offset), of_rank[name].shape)
            for (_, offset), of_rank in zip(known, ranks, strict=True)
        }
        shape = tuple(known[0][0])
        if sum(prod(block) for _, block in blocks) != prod(shape):
            return None
        kinds[name] = Kind(kind.dtype, shape)
    return kinds


def join(
    files: Sequence[Path],
    places: Sequence[Mapping[str, Place]],
    kinds: Mapping[str, Kind],
    out: Path,
) -> None:
    """Writes the wholes of a file for each rank, one whole tensor in the memory at a time."""
    readers = [Reader(file) for file in files]
    with Writer(out, kinds, readers[0].metadata) as writer:
        for name in writer.names:
            whole = torch.empty(kinds[name].shape, dtype=kinds[name].dtype)
            for reader, of_rank in zip(readers, places, strict=True):
                shape = reader.kinds[name].shape
                _, offset = of_rank[name]
                block = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                whole[block] = reader.read(name).reshape(shape)
            writer.append(whole)
