"""BatchNorm's statistics, estimated anew for averaged weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from rbwa_fused.several import Which
from rbwa_fused.swap import Averaging


@contextmanager
def averaged_model(
    opt: Averaging,
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | None = None,
    *,
    blend: float = 1.0,
    weighted: bool = False,
    which: Which | None = None,
) -> Iterator[nn.Module]:
    """`opt.averaged()` with BatchNorm statistics estimated anew for the averaged weights.

    The statistics of training belong to the training weights. One pass over the loader replaces
    them inside the context, as torch.optim.swa_utils.update_bn does; weights and buffers come back
    on exit, also after an exception. Modules that are in eval mode while the model trains, or after
    `model.train()`, are frozen: they stay in eval mode and keep their statistics. So do those whose
    statistics are averaged themselves (``Averager(..., buffers=True)``).

    Args:
        opt: the optimizer that averages the model's parameters, or a wrapper that holds it as its
            ``optimizer``, such as accelerate's.
        model: the model; yielded again.
        loader: of inputs, or of lists or tuples that begin with them.
        device: where the inputs are moved first; None leaves them.
        blend (float, 0 to 1): how much of the average is live, the rest being the weights.
        weighted: by their numbers of inputs, as in the SWA authors' ``bn_update``, so that a last
            batch that is smaller counts for less; else batches count alike.
        which (int or str, optional): of several averages, by number, from 0, or by name; None is
            what ``opt.averaged()`` has (default: None).

    Raises:
        ValueError: for a loader without any batch, such as a generator that is used up, where there
            are statistics to estimate, or for statistics of modules that torch.jit has scripted.
        TypeError: for an optimizer that has no averages.

    Example:
        >>> with rbwa_fused.averaged_model(opt, model, train_loader):
        ...     evaluate(model)
    """
    frozen = [module for module in model.modules() if not module.training]
    options = frozen if model.training else (), blend, weighted
    with averaged_estimated(opt, model, loader, device, *options, which=which):
        yield model


@contextmanager
def averaged_estimated(
    opt: Any,
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | None,
    frozen: Collection[nn.Module],
    blend: float = 1.0,
    weighted: bool = False,
    *,
    which: Which | None = None,
) -> Iterator[None]:
    """`averaged_model`, where it is known which modules are in eval mode in training."""
    inner = _unwrapped(opt)
    own = {} if which is None else {"which": which}
    with inner.averaged(model, blend=blend, **own):
        frozen = [*frozen, *_with_averaged_statistics(inner, model, own)]
        kept = [_Kept(module) for module in model.modules()]
        try:
            _estimate(model, loader, device, frozen, weighted)
            for module in kept:
                module.restore_modes()
                if has_statistics(module.module) and _as_reset(module.module):
                    module.restore_buffers()  # forward does not come to it
            yield
        finally:
            for module in kept:
                module.restore_modes()
                module.restore_buffers()


def _with_averaged_statistics(
    opt: Any, model: nn.Module, which: dict[str, Which]
) -> list[nn.Module]:
    """The modules whose statistics are averages themselves, as an Averager's may be."""
    if not hasattr(opt, "averages"):  # as our ZeroRedundancyOptimizer has none
        return []
    names = opt.averages(model, **which)
    return [
        module
        for prefix, module in model.named_modules()
        if has_statistics(module) and f"{prefix}.running_mean".removeprefix(".") in names
    ]


def _unwrapped(opt: Any) -> Any:
    """The optimizer of ours in a wrapper that does not pass its methods on."""
    inner = opt
    while not hasattr(inner, "averaged") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not hasattr(inner, "averaged"):
        raise TypeError(f"Invalid opt: {type(opt).__name__} (expected one of rbwa_fused's)")
    return inner


@torch.no_grad()
def _estimate(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | None,
    frozen: Collection[nn.Module],
    weighted: bool,
) -> None:
    """Gives statistics the means of all batches. update_bn of torch.optim.swa_utils would reset
    frozen modules, too, pass over InstanceNorm, and take no batch for an answer."""
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    if any(getattr(module, "running_mean", None) is not None for module in scripted):
        raise ValueError(
            "Invalid model: statistics of modules that torch.jit has scripted cannot be estimated "
            "anew (expected the modules themselves)"
        )
    model.train()
    for module in frozen:
        module.training = False
    norms: list[Any] = [m for m in model.modules() if has_statistics(m) and m.training]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
    batches = inputs_so_far = 0
    for batch in loader:
        batches += 1
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        size = len(inputs) if weighted else 1
        inputs_so_far += size
        for norm in norms:  # BatchNorm counts batches by itself
            by_itself = isinstance(norm, _BatchNorm) and not weighted
            norm.momentum = None if by_itself else size / inputs_so_far
        model(inputs if device is None else inputs.to(device))
    if batches == 0:
        raise ValueError(
            "Invalid loader: it has no batch to estimate BatchNorm statistics with (a generator "
            "can be gone through once)"
        )


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running means and variances: BatchNorm, or InstanceNorm if asked."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def _as_reset(norm: Any) -> bool:
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


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
        if isinstance(self.module, _NormBase):
            self.module.momentum = self.momentum

    def restore_buffers(self) -> None:
        """Each buffer has its values again, in the memory that it had, or where it was converted
        or moved inside, as parameters are, in its new memory."""
        buffers = dict(self.module._buffers.items())
        for name, (buffer, value) in self.buffers.items():
            if buffer is not None and value is not None:
                now = buffers.get(name)
                if now is None or now.is_meta or _kind(now) == _kind(value):
                    now = buffer
                buffer = _refilled(now, value)
            if name not in buffers or buffers[name] is not buffer:
                self.module._buffers[name] = buffer


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _refilled(buffer: Tensor, value: Tensor) -> Tensor:
    """The buffer with the value, or the value itself where the buffer cannot take it any more."""
    with torch.inference_mode(False), torch.no_grad():
        if buffer.shape == value.shape and not buffer.is_inference():
            with suppress(RuntimeError):  # such as for memory that several elements share
                return buffer.copy_(value)
        return value.to(buffer.device, buffer.dtype)
