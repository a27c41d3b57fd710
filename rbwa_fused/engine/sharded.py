"""Sharded parameters (FSDP2, tensor parallel, FSDP1): a process steps the shard that it holds.

Tables, kernels and state know plain tensors alone: the shards. What a user sees, in
``opt.state`` and in a state dict, is a DTensor again, laid out as its parameter, so that
torch.distributed.checkpoint can distribute it anew. Nothing here communicates, but where a gradient
or a checkpoint is laid out otherwise than the parameter.

FullyShardedDataParallel (FSDP1) keeps its shards in plain tensors, which need none of this. Only
what it has gathered must be freed, as FSDP2's must.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor. Where nobody has imported the class there is none, and the
    import would slow every start."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flattened(tensor: object) -> bool:
    """Whether a tensor is a parameter of FSDP1: a flat one, or a view of a flat one
    (``use_orig_params=True``), to which FSDP points it anew after each forward and backward."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def kind_of_shard(params: Iterable[Tensor]) -> str | None:
    """What the first sharded one of these parameters is called in messages; None without any."""
    for p in params:
        if is_sharded(p):
            return "DTensor"
        if is_flattened(p):
            return "FullyShardedDataParallel"
    return None


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, as the very tensor that FSDP gathers from; any other
    tensor itself."""
    if not is_sharded(tensor):
        return tensor
    shard: Any = cast(Any, tensor)._local_tensor  # where gradients count, to_local() is a view
    return shard.wait() if hasattr(shard, "wait") else shard  # of a collective that is under way


def is_sharded_as(tensor: Any, param: Any) -> bool:
    """Whether both are DTensors laid out alike, or neither is one."""
    if not (is_sharded(tensor) and is_sharded(param)):
        return is_sharded(tensor) == is_sharded(param)
    mesh, other = tensor.device_mesh, param.device_mesh
    return bool(tensor.placements == param.placements and (mesh is other or mesh == other))


def laid_out_as(param: Any, tensor: Any) -> Any:
    """A DTensor laid out as a DTensor parameter; itself if it is so already."""
    if is_sharded_as(tensor, param):
        return tensor
    return tensor.redistribute(param.device_mesh, param.placements)


def shard_of(tensor: Any, param: Any) -> Tensor:
    """The shard that belongs beside a parameter's, of a tensor of the parameter's (global) shape:
    a DTensor, laid out alike or otherwise, or a plain tensor, of which each process has all."""
    if not is_sharded(param):
        return cast(Tensor, tensor.full_tensor() if is_sharded(tensor) else tensor)
    if not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        tensor = distribute_tensor(
            tensor.to(param.device), param.device_mesh, param.placements, src_data_rank=None
        )
    return local(laid_out_as(param, tensor))


def beside(shard: Tensor, param: Tensor) -> Tensor:
    """State of a parameter, given its shard: a DTensor on the parameter's mesh that holds it."""
    if not is_sharded(param):
        return shard
    state: Any = torch.empty_like(param.detach(), dtype=shard.dtype)
    state._local_tensor = shard  # from_local() would move a shard that FSDP keeps on the host
    result: Tensor = state
    return result


def is_partial(tensor: Any) -> bool:
    """Whether a tensor is a DTensor whose shards are terms of a sum."""
    return is_sharded(tensor) and any(p.is_partial() for p in tensor.placements)


class SummedOver(NamedTuple):
    """The dimensions of a mesh on which gradients are sharded; of plain tensors none."""

    mesh: Any = None
    dims: tuple[int, ...] = ()

    def total(self, own: Tensor, op: str = "sum") -> Tensor:
        """The sum (or "max", "min") of what the shards have, each once, whichever dimensions
        replicate them."""
        if not self.dims:
            return own
        import torch.distributed as dist

        reduction = getattr(dist.ReduceOp, op.upper())
        total = own.to(self.mesh.device_type, copy=True)
        if len(self.dims) == self.mesh.ndim and self.mesh.size() == dist.get_world_size():
            dist.all_reduce(total, reduction)
        else:
            for dim in self.dims:
                dist.all_reduce(total, reduction, group=self.mesh.get_group(dim))
        return total


def summed_over(grads: Iterable[Any]) -> dict[SummedOver, list[Tensor]]:
    """The shards of gradients by the dimensions over which a sum of theirs goes on.

    Raises:
        ValueError: for a DTensor whose shards are terms of a sum.
    """
    grads = list(grads)
    if set(map(type, grads)) == {Tensor}:
        return {SummedOver(): grads}
    found: dict[SummedOver, list[Tensor]] = {}
    for grad in grads:
        where = SummedOver()
        if is_partial(grad):
            raise ValueError(
                f"clip_grad_norm_ of a DTensor gradient with placements {grad.placements}, whose "
                "shards are terms of a sum (expected Shard or Replicate)"
            )
        if is_sharded(grad):
            dims = (dim for dim, p in enumerate(grad.placements) if not p.is_replicate())
            where = SummedOver(grad.device_mesh, tuple(dims))
        found.setdefault(where, []).append(local(grad))
    return found


def reshard(model: nn.Module | None) -> None:
    """Frees what FSDP has gathered, so that the next forward gathers the shards as they are now.

    Raises:
        RuntimeError: inside FSDP1's summon_full_params, which goes on with what it has gathered.
    """
    for module in _modules(model, "FullyShardedDataParallel"):
        if module.training_state.name == "SUMMON_FULL_PARAMS":
            raise RuntimeError(
                "averaged weights inside FullyShardedDataParallel.summon_full_params(), which "
                "would write to the shards what it has gathered before (expected "
                "summon_full_params() inside averaged())"
            )
    for module in _modules(model, "FSDPModule"):
        for group in _param_groups(module):
            group.wait_for_unshard()  # of unshard(async_op=True), which outlives reshard()
        module.reshard()
    for module in _modules(model, "FullyShardedDataParallel"):
        handle = module._handle
        ran = module._is_root is not None  # before its first forward it has gathered nothing
        if ran and handle is not None and handle.uses_sharded_strategy:
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(module, handle, True)  # which it does itself, but for the root


def gathered_by(model: nn.Module | None) -> set[Tensor]:
    """The sharded parameters of which `reshard` frees what was gathered. FSDP1 gathers those of a
    module in a wrapper around it, which `model` may lack."""
    wrappers = _modules(model, "FullyShardedDataParallel")
    members = {p for wrapper in wrappers for p in wrapper.parameters()}
    return members.union(filter(is_sharded, model.parameters() if model is not None else ()))


def _modules(model: nn.Module | None, kind: str) -> Iterator[Any]:
    """The model's modules of one of FSDP's classes; none where nobody has imported them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if model is not None and fsdp is not None:
        yield from (m for m in model.modules() if isinstance(m, getattr(fsdp, kind)))


def _param_groups(module: Any) -> list[Any]:
    """What FSDP gathers by itself: several of a module, in older versions of torch one or none."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
