"""Averaged weights for evaluation: put in place and taken back, with BatchNorm if need be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from rbwa_fused.model_state import state_dict_with
from rbwa_fused.sharded import is_sharded, reshard
from rbwa_fused.swap import Swap, averages

if TYPE_CHECKING:
    from rbwa_fused.fused import FusedOptimizer


@contextmanager
def averaged(opt: FusedOptimizer, model: nn.Module | None) -> Iterator[None]:
    """See FusedOptimizer.averaged."""
    if opt._evaluating is not None:
        if not opt._evaluating.over:
            yield
            return
        failure = opt._evaluating.restore()
        if failure is not None:
            raise failure
    _free_gathered(opt, model)
    swap = Swap(opt, model)
    try:
        opt._evaluating = swap
        swap.put()
        yield
    except BaseException as error:
        failure = swap.restore()
        if failure is not None:  # what was raised first stays what is raised
            failure.__context__, error.__context__ = error.__context__, failure
        raise
    failure = swap.restore()
    if failure is not None:
        raise failure


def _free_gathered(opt: FusedOptimizer, model: nn.Module | None) -> None:
    """Frees the weights that FSDP has gathered, or the next forward would not see those of now.

    Raises:
        ValueError: for DTensor parameters that are not the model's, or without a model.
    """
    params = [p for group in opt.param_groups for p in group["params"] if is_sharded(p)]
    if params and model is None:
        raise ValueError(
            "averaged() of DTensor parameters needs their model, as in averaged(model): what FSDP "
            "has gathered of it must be freed"
        )
    reshard(model)
    members = set(model.parameters()) if model is not None else set()
    missing = sum(p not in members for p in params)
    if missing:
        raise ValueError(
            f"Invalid model: {missing} of {len(params)} DTensor parameters are not its own"
        )


def averaged_state_dict(opt: FusedOptimizer, model: nn.Module) -> dict[str, Any]:
    """See FusedOptimizer.averaged_state_dict."""
    reshard(model)  # or its parameters are what FSDP has gathered
    if {p for group in opt.param_groups for p in group["params"]}.isdisjoint(model.parameters()):
        name = type(model).__name__
        raise ValueError(f"Invalid model: none of {name}'s parameters is the optimizer's")
    return state_dict_with(model, dict(averages(opt)))


@contextmanager
def averaged_model(
    opt: FusedOptimizer,
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | None = None,
) -> Iterator[nn.Module]:
    """`opt.averaged()` with BatchNorm statistics estimated anew for the averaged weights.

    The statistics of training belong to the training weights. One pass over the loader
    (torch.optim.swa_utils.update_bn) replaces them inside the context; weights and buffers come
    back on exit, also after an exception.

    Args:
        opt: the optimizer that averages the model's parameters.
        model: the model; yielded again.
        loader: of inputs, or of lists or tuples that begin with them.
        device: where the inputs are moved first; None leaves them.

    Example:
        >>> with rbwa_fused.averaged_model(opt, model, train_loader):
        ...     evaluate(model)
    """
    with opt.averaged(model):
        kept = [_Kept(module) for module in model.modules()]
        try:
            update_bn(loader, model, device=device)
            for module in kept:
                module.restore_modes()
            yield model
        finally:
            for module in kept:
                module.restore_modes()
                module.restore_buffers()


class _Kept:
    """What one module must have again after its statistics were estimated anew."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = module.training
        self.momentum = getattr(module, "momentum", None)
        with torch.inference_mode(False):
            self.buffers = {
                name: (buffer, None if buffer is None else buffer.detach().clone())
                for name, buffer in module._buffers.items()
            }

    def restore_modes(self) -> None:
        self.module.training = self.training
        if isinstance(self.module, nn.modules.batchnorm._BatchNorm):
            self.module.momentum = self.momentum

    def restore_buffers(self) -> None:
        """Each buffer has its values again, in the memory that it had, or where it was converted
        or moved inside, as parameters are, in its new memory."""
        buffers = self.module._buffers
        for name, (buffer, value) in self.buffers.items():
            if buffer is not None and value is not None:
                now = buffers.get(name)
                if now is None or now.is_meta or _kind(now) == _kind(value):
                    now = buffer
                buffer = _refilled(now, value)
            buffers[name] = buffer


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _refilled(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer with the value, or the value itself where the buffer cannot take it any more."""
    with torch.inference_mode(False), torch.no_grad():
        if buffer.shape == value.shape and not buffer.is_inference():
            with suppress(RuntimeError):  # such as for memory that several elements share
                return buffer.copy_(value)
        return value.to(buffer.device, buffer.dtype)
