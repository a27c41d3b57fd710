"""Clipping by the norm of all gradients, in the pass of the step.

`clip_grad_norm_` reads the gradients once, and the step multiplies them by the coefficient as it
reads them. The coefficient belongs to the gradients that it was computed from: a step that finds
others drops it, and one that finds some of them changed raises.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from rbwa_fused.engine import doors
from rbwa_fused.engine.doors import Call, Grads
from rbwa_fused.engine.sharded import is_flattened, is_sharded, is_sharded_as, laid_out_as, local
from rbwa_fused.numbers import flag, number
from rbwa_fused.total_norm import total_norm

PLAIN = {Tensor, type(None)}  # types of gradients that are no DTensor
FSDP1 = "torch.distributed.fsdp"  # without which no parameter is FullyShardedDataParallel's
CHANGED = (
    "gradients were changed after clip_grad_norm_; call it last, or use "
    "torch.nn.utils.clip_grad_norm_ (behind a step that was left out, call the optimizer's "
    "zero_grad(), not the model's, which may leave the same gradients with other values)"
)
SCALED = "clip_grad_norm_ saw scaled gradients; call scaler.unscale_(optimizer) first"
IN_BACKWARD = (
    "clip_grad_norm_ with in_backward=True: parameters step inside the backward pass, before the "
    "norm of all gradients is known"
)
FLATTENED = (
    "clip_grad_norm_ with FullyShardedDataParallel parameters, of which this process has a part "
    "and no word of the others (expected model.clip_grad_norm_(max_norm))"
)


class Share:
    """An optimizer's part of a coefficient: what multiplies its gradients, if they are the same.

    Attributes:
        coefficient: float64, on the device of the first gradient.
        spent: a step has taken it. It counts again for a further step with the same gradients, as
            if they had been multiplied, and forbids nothing.
        mixed: gradients of other optimizers were multiplied by the same coefficient, in place.
    """

    def __init__(
        self, params: list[Tensor], grads: Grads, coefficient: Tensor, mixed: bool
    ) -> None:
        self.coefficient = coefficient
        self.mixed = mixed
        self.spent = False
        self._params = params
        shards = _shards(grads)
        self._grads = [None if g is None else weakref.ref(g) for g in shards]
        self._versions = _versions(grads, shards)
        self._shares: list[weakref.ref[Share]] = []  # of all optimizers, this one's too

    @staticmethod
    def join(shares: Sequence[Share]) -> None:
        """Makes them parts of one coefficient: all are looked at before the first one steps."""
        everyone = [weakref.ref(share) for share in shares]
        for share in shares:
            share._shares = everyone

    def gradients(self) -> Literal["same", "new", "changed"]:
        """What has become of them. One that is gone is none of a step."""
        grads = doors.gradients(self._params)[0]
        shards = _shards(grads)
        known = [None if grad is None else grad() for grad in self._grads]
        versions = _versions(grads, shards)
        same = new = False
        if versions == self._versions and all(map(is_, shards, known)):
            return "same" if any(g is not None for g in shards) else "new"
        for shard, before, version, version_before in zip(
            shards, known, versions, self._versions, strict=True
        ):
            if shard is None:
                continue
            if shard is not before:
                new = True
            elif version != version_before:
                return "changed"
            else:
                same = True
        return ("changed" if new else "same") if same else "new"

    def check(self) -> None:
        """Raises where gradients were changed."""
        if not self.spent and self.gradients() == "changed":
            raise RuntimeError(CHANGED)

    def claim(self, params: list[Tensor]) -> bool:
        """Whether a step of these parameters is to be multiplied.

        Raises:
            RuntimeError: where gradients of one of the optimizers were changed.
        """
        found = self.gradients()
        if found == "new" or (self.spent and found == "changed"):
            return False
        if found == "changed" or (
            not (len(params) == len(self._params) and all(map(is_, params, self._params)))
            and any(p.grad is not None for p in set(params).difference(self._params))
        ):
            raise RuntimeError(CHANGED)
        for one in self._shares:
            share = one()
            if share is not None and share is not self:  # its optimizer has not stepped so far
                share.check()
        return True


def _shards(grads: Grads) -> Grads:
    if set(map(type, grads)) <= PLAIN:
        return grads
    return [None if g is None else local(g) for g in grads]


def _versions(grads: Grads, shards: Grads) -> list[int]:
    """Who writes to a DTensor changes its version, or that of the shard in it."""
    if grads is shards:
        return [0 if g is None else g._version for g in grads]
    pairs = zip(grads, shards, strict=True)
    return [0 if g is None or s is None else g._version + s._version for g, s in pairs]


class Target(Protocol):
    """An optimizer whose step multiplies the gradients."""

    pending_clip: Share | None
    engine: Any


class Clipping(Optimizer):
    """Base of FusedOptimizer: the coefficient between clip_grad_norm_ and the step."""

    pending_clip: Share | None = None  # for the step to come
    engine: Any
    _itself: Any

    @property
    def clipping_target(self) -> Target:
        """What steps by the coefficient. Not for users."""
        own: Target = self._itself
        return own

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float | Literal["inf"] = 2.0,
        error_if_nonfinite: bool = False,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """Clips the norm of all gradients together, as torch.nn.utils.clip_grad_norm_ does, where
        the step reads them: ``p.grad`` stays as it is.

        Gradients are read once for their norm, and the next `step` multiplies them by
        min(1, max_norm / (norm + 1e-6)). Call it last before the step, behind
        ``scaler.unscale_(optimizer)``. A step that is skipped, `zero_grad` and `load_state_dict`
        forget it, and so does a step that finds new gradients alone. Called again for the same
        gradients it counts instead.

        Args:
            max_norm (float, >= 0): the norm is at most so large behind it.
            norm_type (float, or ``"inf"``): of the p-norm, infinite for the largest absolute value
                (default: 2.0).
            error_if_nonfinite (bool): raise where the norm is infinite or NaN; waits for a GPU
                (default: False).
            in_place (bool): multiply ``p.grad`` itself, now, as torch does (default: False).

        Returns:
            The norm before, 0-dim: float64 where some gradient is, else float32, also of 16-bit
            gradients. On the device of the first gradient; 0 without any. The same bits for any
            number of threads, and from every backend where ``norm_type`` is 2.

        Raises:
            ValueError, TypeError: naming the argument and the value received; for DTensor gradients
                that are terms of a sum.
            RuntimeError: where gradients were changed since the last call; with in_backward=True
                and for FullyShardedDataParallel's parameters; in torch's words for a norm that is
                not finite. The `step` raises where gradients were changed since this call, and
                where they are still scaled by a GradScaler.
        """
        return clip_grad_norm_(self, max_norm, norm_type, error_if_nonfinite, in_place=in_place)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        self._itself.pending_clip = None
        super().zero_grad(set_to_none)

    def _claim_clip(self, grad_scale: Tensor | None) -> tuple[Tensor, list[Call]] | tuple[()]:
        """The coefficient of the step under way, and what spends it with the step; or nothing."""
        assert self.pending_clip is not None
        if not self.pending_clip.claim([p for group in self.param_groups for p in group["params"]]):
            self.pending_clip = None
            return ()
        if grad_scale is not None:
            raise RuntimeError(SCALED)
        return self.pending_clip.coefficient, [(setattr, self.pending_clip, "spent", True)]

    def _forget_unspent_clip(self) -> None:
        """Behind a step: it was skipped."""
        if self.pending_clip is not None and not self.pending_clip.spent:
            self.pending_clip = None


def target_of(opt: Optimizer) -> Target | None:
    """What takes the coefficient of an optimizer, also in accelerate's wrapper; None where its
    gradients are to be scaled."""
    inside = getattr(opt, "optimizer", None)
    return getattr(opt, "clipping_target", getattr(inside, "clipping_target", None))


@torch._disable_dynamo  # as a step is
@torch.no_grad()
def clip_grad_norm_(
    optimizers: Optimizer | Iterable[Optimizer],
    max_norm: float,
    norm_type: float | Literal["inf"] = 2.0,
    error_if_nonfinite: bool = False,
    *,
    in_place: bool = False,
) -> Tensor:
    """`FusedSGD.clip_grad_norm_` by one norm over the gradients of several optimizers.

    All of them are looked at before the first one steps. Gradients of optimizers that are not of
    this package are multiplied in place, now, since nobody else would do it; where it is called
    again for the same gradients, so are all others, by the coefficient that waits.

    Args:
        optimizers: one, or several that share no parameter.
        max_norm, norm_type, error_if_nonfinite, in_place: as `FusedSGD.clip_grad_norm_`'s.

    Raises:
        ValueError: also for a parameter in two of the optimizers.

    Example:
        >>> muon, adamw = Muon(matrices), rbwa_fused.FusedSGD(rest)
        >>> loss.backward()
        >>> rbwa_fused.clip_grad_norm_([muon, adamw], max_norm=1.0)
        >>> muon.step(), adamw.step()
    """
    opts = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for opt in opts:
        if not isinstance(opt, Optimizer):
            raise TypeError(f"Invalid optimizers: {opt!r} (expected torch.optim.Optimizer)")
    limit = number("max_norm", max_norm)
    order = math.inf if norm_type == "inf" else number("norm_type", norm_type)
    if not limit >= 0.0:
        raise ValueError(f"Invalid max_norm: {max_norm} (expected at least 0)")
    if order != order:
        raise ValueError(f"Invalid norm_type: {norm_type}")
    flag("error_if_nonfinite", error_if_nonfinite)
    flag("in_place", in_place)
    params = [[p for group in opt.param_groups for p in group["params"]] for opt in opts]
    everyone = list(chain.from_iterable(params))
    if len(opts) > 1 and len(everyone) != len(set(everyone)):
        raise ValueError("Invalid optimizers: a parameter is in two of them")
    targets = [target_of(opt) for opt in opts]
    for target in targets:
        if target is not None and target.engine.options.in_backward:
            raise RuntimeError(IN_BACKWARD)
        if target is not None and target.pending_clip is not None:
            target.pending_clip.check()
    if FSDP1 in sys.modules and any(map(is_flattened, everyone)):
        raise RuntimeError(FLATTENED)

    grads = [_gradients(own) for own in params]
    mixed = None in targets
    for target, of_own in zip(targets, grads, strict=True):
        if mixed and target is not None and target.pending_clip is not None:
            share = target.pending_clip
            if share.mixed and share.gradients() == "same":
                _scale_(of_own, share.coefficient)  # as those of the others have been
                target.pending_clip = None
    present = [g for g in chain.from_iterable(grads) if g is not None]
    fused = [target.engine.options.backend for target in targets if target is not None]
    total = total_norm(present, order, fused[0] if fused else "auto")
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    coefficient = (limit / (total + 1e-6)).clamp(max=1.0)
    shares = []
    for target, own, of_own in zip(targets, params, grads, strict=True):
        if target is None or in_place:
            _scale_(of_own, coefficient)
        if target is not None:
            target.pending_clip = None
            if present and not in_place:
                target.pending_clip = Share(own, of_own, coefficient.double(), mixed)
                shares.append(target.pending_clip)
    Share.join(shares)
    return total


def _gradients(params: list[Tensor]) -> Grads:
    """Those of parameters, laid out as they are: a step would do the same, and communicate."""
    grads = doors.gradients(params)[0]
    if not set(map(type, grads)) <= PLAIN:
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if is_sharded(g) and not is_sharded_as(g, p):
                p.grad = grads[i] = laid_out_as(p, g)
    return grads


def _scale_(grads: Grads, coefficient: Tensor) -> None:
    """As torch.nn.utils.clip_grads_with_norm_."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for shard in _shards(grads):
        if shard is not None:
            by_kind.setdefault((shard.device, shard.dtype), []).append(shard)
    for (device, _), alike in by_kind.items():
        torch._foreach_mul_(alike, coefficient.to(device))
