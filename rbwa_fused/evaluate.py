"""Averaged weights for evaluation: put in place and taken back, given away, or taken for good."""

from __future__ import annotations

from contextlib import AbstractContextManager, ContextDecorator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from rbwa_fused import swap
from rbwa_fused.engine.sharded import beside, gathered_by, kind_of_shard, local, reshard
from rbwa_fused.model_state import state_dict_with
from rbwa_fused.several import Which
from rbwa_fused.swap import Averaging, Swap, averages


class averaged(AbstractContextManager[None], ContextDecorator):  # noqa: N801 (as contextlib's own)
    """See FusedOptimizer.averaged.

    Not a generator: an interrupt that comes while a generator is closed is lost.
    """

    _swap: Swap | None = None  # of the outermost context

    def __init__(
        self, opt: Averaging, model: nn.Module | None, blend: float = 1.0, which: Which = 0
    ) -> None:
        self._averaging, self._model, self._blend, self._which = opt, model, blend, which

    def __enter__(self) -> None:
        if self._swap is not None and not self._swap.left:
            raise RuntimeError("averaged(): this context is entered already (expected another one)")
        engine = self._averaging.engine
        before = engine.swapped
        if before is not None:
            if not before.over:
                return
            failure = before.restore()
            if failure is not None:
                raise failure
        free_gathered(self._averaging, self._model)
        self._swap = Swap(self._averaging, self, self._model, self._blend, self._which)
        try:
            engine.swapped = self._swap
            self._swap.put()
        except BaseException as error:
            self._leave(error)
            raise

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._leave(error)

    def __del__(self) -> None:
        swap = self._swap
        if swap is not None and not swap.left and self._averaging.engine.swapped is swap:
            swap.restore()

    def _leave(self, error: BaseException | None) -> None:
        """Brings the weights back. What was raised inside stays what is raised."""
        swap = self._swap
        if swap is None:
            return
        try:
            failure = swap.restore()
        except BaseException:  # an interrupt
            swap.restore()
            raise
        if failure is not None and error is None:
            raise failure
        if failure is not None and error is not None:
            failure.__context__, error.__context__ = error.__context__, failure

    def _recreate_cm(self) -> averaged:
        return averaged(self._averaging, self._model, self._blend, self._which)


def free_gathered(opt: Averaging, model: nn.Module | None, what: str = "averaged") -> None:
    """Frees the weights that FSDP has gathered, or the next forward would not see those of now.

    Raises:
        ValueError: for sharded parameters that are not the model's, or without a model.
    """
    params = [p for group in opt.param_groups for p in group["params"] if kind_of_shard([p])]
    kind = kind_of_shard(params)
    if params and model is None:
        raise ValueError(
            f"{what}() of {kind} parameters needs their model, as in {what}(model): what FSDP has "
            "gathered of it must be freed"
        )
    reshard(model)
    members = gathered_by(model)
    missing = sum(p not in members for p in params)
    if missing:
        raise ValueError(
            f"Invalid model: {missing} of {len(params)} {kind} parameters are not its own"
        )


def averages_by_name(opt: Averaging, model: nn.Module, which: Which) -> dict[str, Tensor]:
    """See FusedOptimizer.averages."""
    reshard(model)  # or its parameters are what FSDP has gathered
    _check_members(opt, model)
    found = _standing(opt, dict(swap.live(opt, which)))
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: found[t] for name, t in named if t in found}


def _standing(opt: Averaging, found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The averages by what stands in the places of their parameters, also inside averaged()."""
    heirs = {} if opt.engine.swapped is None else swap.heirs_of(opt)
    return {heirs.get(p, p): average for p, average in found.items()}


def adopt(opt: Averaging, model: nn.Module | None, which: Which) -> None:
    """See FusedOptimizer.adopt."""
    free_gathered(opt, model)
    swap.adopt(opt, which)


def _check_members(opt: Averaging, model: nn.Module) -> None:
    members = set(model.parameters())
    if members and members.isdisjoint(p for group in opt.param_groups for p in group["params"]):
        name = type(model).__name__
        raise ValueError(f"Invalid model: none of {name}'s parameters is the optimizer's")


def averaged_state_dict(
    opt: Averaging, model: nn.Module, blend: float = 1.0, which: Which = 0
) -> dict[str, Any]:
    """See FusedOptimizer.averaged_state_dict."""
    reshard(model)  # or its parameters are what FSDP has gathered
    _check_members(opt, model)
    averaged = {p: swap.blended(opt, p, local(a), blend) for p, a in averages(opt, which)}
    live = _standing(opt, averaged)
    return state_dict_with(model, {p: beside(value, p) for p, value in live.items()})
