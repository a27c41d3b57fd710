"""ZeRO-1: each rank keeps the optimizer state of its own parameters, and steps those.

torch.distributed.optim.ZeroRedundancyOptimizer does this with our optimizers as they are, and their
state dicts say what it does not carry: it saves the state of every parameter, but of the groups
only what every optimizer has there. `ZeroRedundancyOptimizer` adds that, and the modes of
schedule-free optimizers; `averaged` needs nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import optim
from torch.distributed.algorithms.join import JoinHook

from rbwa_fused.checkpoint import OURS, OWN
from rbwa_fused.clipping import Target, clip_grad_norm_
from rbwa_fused.distributed.exchange import explained
from rbwa_fused.distributed.shares import averaged, broadcast, params_of, shares_of
from rbwa_fused.fused import FusedOptimizer
from rbwa_fused.modes import EXPORTED_K, PACKAGES, ScheduleFree
from rbwa_fused.progress import START, progress
from rbwa_fused.renumbered import KEYS
from rbwa_fused.rules import MEMORY

# What the state dict of a rank says of a group, or adds to it.
ADDED = {*OURS, *(OWN + key for key in OURS), "average", *START, EXPORTED_K, *PACKAGES, *KEYS}


class ZeroRedundancyOptimizer(optim.ZeroRedundancyOptimizer):
    """torch's, with checkpoints that hold all of FusedSGD's or RSGDM's state, and `averaged`.

    A consolidated state dict is that of the same optimizer in one process: counters, samples and
    policies come with it. A run saved here goes on bit for bit on as many ranks; it may also go on
    on another number of them, under DistributedDataParallel or alone, and those runs here.

    What torch says of its class holds: parameters are given as tensors or groups, not by name, and
    are all of one dtype; `step` broadcasts them. It does not go with Join (see `join_hook`). A rank
    counts its own steps: one in which none of its parameters has a gradient does not count there,
    though in one process it would; `consolidate_state_dict` warns then. What schedule-free learning
    counts in its groups is the same on all ranks, as each sees all gradients.

    SGDScheduleFree and AdamWScheduleFree begin in eval mode here, too. Their `train` and `eval` are
    to be called on this optimizer and on all ranks; torch's own class has neither, so that its step
    raises.

    Args:
        params, process_group, parameters_as_bucket_view, **defaults: as torch's.
        optimizer_class: one of this package, such as FusedSGD.

    Raises:
        TypeError: for another optimizer class.
        ValueError: for ``buffers``, and for ``capturable`` of schedule-free optimizers.

    Example:
        >>> opt = rbwa_fused.distributed.ZeroRedundancyOptimizer(
        ...     model.parameters(), rbwa_fused.FusedSGD, lr=0.1, average=rbwa_fused.ema(0.999)
        ... )
        >>> with rbwa_fused.distributed.averaged(opt):
        ...     evaluate(model)
        >>> opt.consolidate_state_dict()  # on all ranks
        >>> if dist.get_rank() == 0:
        ...     torch.save(opt.state_dict(), "optimizer.pt")
    """

    def __init__(self, params: Any, optimizer_class: type[FusedOptimizer], **options: Any) -> None:
        ours = isinstance(optimizer_class, type) and issubclass(optimizer_class, FusedOptimizer)
        if not ours:
            raise TypeError(f"Invalid optimizer_class: {optimizer_class} (expected one of ours)")
        if options.get("buffers") is not None:
            raise ValueError(
                "buffers= with ZeroRedundancyOptimizer, whose state dict has no place for them "
                "(expected an Averager with buffers=True behind it)"
            )
        if options.get("capturable") and issubclass(optimizer_class, ScheduleFree):
            raise ValueError(
                f"capturable=True of {optimizer_class.__name__} with ZeroRedundancyOptimizer: a "
                "device does not know of steps that moved other ranks' parameters alone (expected "
                "False)"
            )
        self._counters: list[dict[str, Any]] = []
        super().__init__(params, optimizer_class, **options)

    @property
    def n_averaged(self) -> int:
        """Samples in the averages of this rank's parameters, of the group that has most."""
        return self.optim.n_averaged

    @property
    def clipping_target(self) -> Target:
        """This rank's optimizer. Not for users."""
        return self.optim.clipping_target

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """As `FusedSGD.clip_grad_norm_`, by the gradients of all ranks' parameters: each rank has
        all of them, and nothing is communicated."""
        return clip_grad_norm_(self, max_norm, norm_type, error_if_nonfinite, in_place=in_place)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and forgets what `clip_grad_norm_` has found."""
        self.optim.pending_clip = None
        super().zero_grad(set_to_none)

    def averaged(
        self, model: nn.Module | None = None, **options: Any
    ) -> AbstractContextManager[None]:
        """See `rbwa_fused.distributed.averaged`; `rbwa_fused.averaged_model` takes this, too."""
        return averaged(self, **options)

    @property
    def train(self) -> Callable[..., None]:
        """``train()`` of a schedule-free optimizer makes y the weights, which `step` needs: each
        rank those of its own parameters, and broadcasts them. To be called on all ranks.

        The bits that `eval` has set aside are back on every rank.

        Raises:
            AttributeError: for an optimizer without modes.
            RuntimeError: inside `averaged`, on all ranks and before any has sent a weight; where a
                process has gone, which says what the weights of this rank are.
        """
        return self._mode("train")

    @property
    def eval(self) -> Callable[..., None]:
        """``eval()`` of a schedule-free optimizer makes x the weights, as `train` makes y."""
        return self._mode("eval")

    def _mode(self, mode: str) -> Callable[..., None]:
        local = self.optim
        if not isinstance(local, ScheduleFree):
            raise AttributeError(f"{type(local).__name__} has no {mode}()")

        def switch(model: nn.Module | None = None) -> None:
            shares = shares_of(self, mode)
            getattr(local, mode)()
            for group in self.param_groups:  # which the next step brings to the local ones
                group["train_mode"] = mode == "train"
            broadcast(self, shares, mode)

        return switch

    def _local_step(self, *args: Any, **kwargs: Any) -> Any:
        """torch's, and counts in the groups of schedule-free learning what moved other ranks'
        parameters alone."""
        counts = [group.get("k") for group in self.param_groups]
        loss = super()._local_step(*args, **kwargs)
        if isinstance(self.optim, ScheduleFree):
            of_all = zip(self.param_groups, self.optim.param_groups, counts, strict=True)
            for group, own, k in of_all:
                if own["k"] == k and any(p.grad is not None for p in group["params"]):
                    group.update(progress(group).left)  # the next step brings it to `own`
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group on all ranks. See torch's.

        Raises:
            RuntimeError: inside `averaged`, on all ranks and before any has taken the group.
        """
        if self.initialized:
            self.optim.engine.refuse_inside_averaged("add_param_group")
        super().add_param_group(param_group)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Refused.

        Raises:
            RuntimeError: a rank that is through with its batches would step its parameters with
                the last gradients that it had, again and again: torch's hook gives it no others
                (seen with torch 2.15 and torch.optim.SGD).
        """
        raise RuntimeError(
            "ZeroRedundancyOptimizer under Join steps the parameters of a rank that is through "
            "with old gradients; give all ranks the same number of batches"
        )

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Brings all ranks' state to one of them. To be called on all."""
        super().consolidate_state_dict(to)
        counted = [
            ({key: group[key] for key in group.keys() & ADDED}, len(group["params"]) > 0)
            for group in self.optim.state_dict()["param_groups"]
        ]
        everyone: list[Any] = [None] * self.world_size
        with explained("consolidate_state_dict", "Weights and state of this rank are unchanged."):
            dist.all_gather_object(everyone, counted, group=self.process_group)
        self._counters = []
        steps: set[int] = set()
        for of_all in zip(*everyone, strict=True):
            # Who has no parameter of a group counts nothing in it.
            owners = [group for group, owns in of_all if owns]
            steps |= {group["step"] for group in owners}
            self._counters.append(max(owners or [of_all[0][0]], key=_progress))
        if len(steps) > 1:
            warnings.warn(
                "the ranks have counted different steps, since some have had none with a gradient "
                "of their own parameters; the state dict has the largest count",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """What was consolidated last on this rank, as the optimizer's in one process."""
        result = super().state_dict()
        known = set(self.optim.defaults)
        options = {key for key in self.defaults if key not in known}  # of the constructor alone
        result["param_groups"] = [
            {k: v for k, v in group.items() if k not in options} | counters
            for group, counters in zip(result["param_groups"], self._counters, strict=True)
        ]
        return result

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        step: int | None = None,
        averages: Literal["load", "drop"] = "load",
    ) -> None:
        """Loads this rank's part of a state dict; a FusedSGD's or torch.optim.SGD's will do.

        Args:
            step, averages: as `FusedSGD.load_state_dict`'s.

        Raises:
            ValueError: as `FusedSGD.load_state_dict`; nothing was changed then on this rank.
        """
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != [len(saved["params"]) for saved in saved_groups]:
            raise ValueError(
                f"loaded state dict has groups of {[len(s['params']) for s in saved_groups]} "
                f"parameters (expected {sizes})"
            )
        keys = chain.from_iterable(saved["params"] for saved in saved_groups)
        key_of = dict(zip(params_of(self), keys, strict=True))
        own = [
            {**_without("param_names", saved), "params": [key_of[p] for p in group["params"]]}
            for saved, group in zip(saved_groups, self.optim.param_groups, strict=True)
        ]
        wanted = set(chain.from_iterable(group["params"] for group in own))
        state = {k: held for k, held in state_dict["state"].items() if k in wanted and held}
        part = {"state": state, "param_groups": own}
        self.optim.load_state_dict(part, step=step, averages=averages)
        for group, loaded in zip(self.param_groups, self.optim.param_groups, strict=True):
            group.update(_without("params", loaded))


def _progress(group: dict[str, Any]) -> tuple[int, int, bool]:
    """How far a rank's parameters of a group have come; their first step leaves a memory."""
    return group["step"], group["n_averaged"], any(group[key] is not None for key in MEMORY)


def _without(key: str, group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != key}
