"""Training on shards: what test_fsdp.py and test_tensor_parallel.py run on each rank.

A run of `Sharded` gets gradients that depend on the whole weights, laid out as its parameters are;
a plain model in the same process gets the same ones. So every rank has both, and compares bits.
"""

from __future__ import annotations

from typing import Any

import torch
from rules import RULES
from runs import METHODS, STEPS, Model, bits, groups
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import rbwa_fused as rf

STREAMS = ("average", "master_param", *sorted({name for r in RULES.values() for name in r.keeps}))


def mesh(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh of CPUs: of all ranks in a row, or of the sizes given."""
    return init_device_mesh("cpu", sizes or (distributed.get_world_size(),), mesh_dim_names=names)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out(full: Tensor, param: Tensor) -> Tensor:
    """The part of a tensor that belongs to a parameter."""
    if not isinstance(param, DTensor):
        return full
    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


def plain(dtype: torch.dtype = torch.float32) -> Model:
    """runs.Model, but for the channels_last weight, which FSDP does not take."""
    model = Model(dtype)
    model.conv.data = model.conv.data.contiguous()
    return model


def sharded(dtype: torch.dtype = torch.float32) -> Model:
    """The same model, sharded; its scalar, which FSDP does not take either, stays a plain tensor.
    Shards are uneven, and on four ranks some are empty."""
    model = plain(dtype)
    fully_shard(model, mesh=mesh(), ignored_params={model.scalar})
    return model


def feed(model: nn.Module, step: int) -> None:
    """Gradients for a step counted from 1, as runs.feed's."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        g = (noise + 0.2 * whole(p).double()).to(p.dtype)
        absent = (name == "late" and step <= 6) or (name == "early" and step > 5)
        p.grad = None if absent else laid_out(g, p)


def train(model: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        feed(model, step)
        opt.step()


def result(model: nn.Module, opt: Any) -> dict[str, Any]:
    """All that a run has come to, as whole tensors: equal for equal bits, however it is sharded."""
    found: dict[str, Any] = {"n_averaged": opt.n_averaged}
    for name, p in model.named_parameters():
        found[name] = bits(whole(p))
        for stream in STREAMS:
            value = opt.state.get(p, {}).get(stream)
            if value is not None:
                found[f"{name}.{stream}"] = (value.dtype, tuple(value.shape), bits(whole(value)))
    saved = opt.state_dict()["param_groups"]
    found["groups"] = [
        {key: repr(value) for key, value in group.items() if key != "params"} for group in saved
    ]
    return found


def build(method: str, make: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = make(dtype)
    return model, METHODS[method](groups(model), **options)


def optimizer(model: nn.Module, rule: str = "momentum", **options: Any) -> Any:
    """A rule of the table, by its name, with an EMA unless another average is asked for."""
    return RULES[rule].made(model.named_parameters(), **{"average": rf.ema(0.5), **options})


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Where two results differ, both sides."""
    keys = ours.keys() | theirs.keys()
    return {k: (ours.get(k), theirs.get(k)) for k in keys if ours.get(k) != theirs.get(k)}


def every_method(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Of each method, how a sharded run differs from that of a plain model."""
    found = {}
    for method in METHODS:
        model, opt = build(method, sharded, dtype, **options)
        alone, other = build(method, plain, dtype, **options)
        train(model, opt, 1, STEPS)
        train(alone, other, 1, STEPS)
        found[method] = differences(result(model, opt), result(alone, other))
    return found
