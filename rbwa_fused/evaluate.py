"""Averaged weights for evaluation: put in place and taken back, with BatchNorm if need be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from rbwa_fused.flat import is_plain, same_layout, turns
from rbwa_fused.ops import exchange_
from rbwa_fused.sharded import is_sharded, local, reshard

if TYPE_CHECKING:
    from rbwa_fused.fused import FusedOptimizer


class Exchange:
    """The weights of an optimizer while their averages are in their place."""

    def __init__(self, opt: FusedOptimizer) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []  # parameter, average
        # Other dtypes, and parameters that share memory, where an exchange would put one's average
        # into another's: parameter, training weights.
        self.saved: list[tuple[Tensor, Tensor]] = []
        kept = [(p, average) for p, average in averages(opt) if p.numel() > 0]
        _, alone = turns([p for p, _ in kept])
        for (p, average), own in zip(kept, alone, strict=True):
            if own and p.dtype == average.dtype:
                self.pairs.append((p, average))
            else:
                self.saved.append((p, local(p).detach().clone()))
        self._swap()
        for p, _ in self.saved:
            local(p).copy_(local(opt.state[p]["average"]))

    def undo(self) -> None:
        """Brings the training weights back, wherever the parameters are by now."""
        self._swap()
        for p, weights in self.saved:
            local(p).copy_(weights)

    def averages(self) -> dict[Tensor, Tensor]:
        """The averages that are live now instead of in their buffers, as copies."""
        return {p: p.detach().clone() for p, _ in self.pairs}

    def _swap(self) -> None:
        pairs = [(local(p), local(average)) for p, average in self.pairs]
        if all(
            p.dtype == a.dtype and p.device == a.device and same_layout(p, a) and is_plain(p)
            for p, a in pairs
        ):
            exchange_([p for p, _ in pairs], [average for _, average in pairs])
        else:  # some are not dense or plain, or were converted or moved since
            for p, average in pairs:
                kept = p.detach().clone()
                p.copy_(average)
                average.copy_(kept)
        written = [p for p, _ in self.pairs]
        torch.autograd.graph.increment_version(written)
        torch.clear_autocast_cache()  # of 16-bit copies, which does not look at versions


def averages(opt: FusedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter that has an average beside it, with that average."""
    opt._settle()
    for plan in opt._plan.groups if opt._plan is not None else ():
        if plan.n_averaged > 0:
            for p in plan.group["params"]:
                if plan.buffered(p) and "average" in opt.state.get(p, {}):
                    yield p, opt.state[p]["average"]


@contextmanager
def averaged(opt: FusedOptimizer, model: nn.Module | None) -> Iterator[None]:
    """See FusedOptimizer.averaged."""
    if opt._evaluating is not None:
        yield
        return
    _free_gathered(opt, model)
    with torch.no_grad():
        exchange = Exchange(opt)
    opt._evaluating = exchange
    try:
        yield
    finally:
        opt._evaluating = None
        reshard(model)
        with torch.no_grad():
            exchange.undo()


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
    return state_dict_with(model, dict(averages(opt)) if opt._evaluating is None else {})


def state_dict_with(model: nn.Module, other: Mapping[Tensor, Tensor]) -> dict[str, Any]:
    """The model's state dict with others in place of some parameters; every tensor is a copy."""
    result = model.state_dict(keep_vars=True)  # with the metadata that loading asks for
    for name, tensor in result.items():
        if isinstance(tensor, Tensor):
            source = other.get(tensor, tensor).detach()
            result[name] = source.to(tensor.dtype, copy=True)
    return result


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
        self.buffers = {
            name: (buffer, buffer.detach().clone())
            for name, buffer in module._buffers.items()
            if buffer is not None
        }

    def restore_modes(self) -> None:
        self.module.training = self.training
        if isinstance(self.module, nn.modules.batchnorm._BatchNorm):
            self.module.momentum = self.momentum

    def restore_buffers(self) -> None:
        with torch.no_grad():
            for name, (buffer, value) in self.buffers.items():
                self.module._buffers[name] = buffer.copy_(value)
