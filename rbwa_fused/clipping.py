"""Clipping by the norm of all gradients, in the pass of the step.

`clip_grad_norm_` reads the gradients once, and the step multiplies them by the coefficient as it
reads them. The coefficient belongs to the gradients that it was computed from: a step that finds
others drops it, and one that finds some of them changed raises.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rbwa_fused.engine import backends, norm
from rbwa_fused.engine.doors import Call
from rbwa_fused.engine.memory import is_dense, is_plain
from rbwa_fused.engine.sharded import (
    SummedOver,
    is_flattened,
    is_sharded,
    is_sharded_as,
    laid_out_as,
    local,
    summed_over,
)
from rbwa_fused.numbers import flag, number
from rbwa_fused.streams import DTYPES

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


class Seen(NamedTuple):
    """A parameter, and the gradient that it had: the tensor itself (of a DTensor the shard), and
    its version. Who writes to a DTensor changes its version, or that of the shard in it."""

    param: Tensor
    grad: weakref.ref[Tensor] | None
    version: int


class Share:
    """An optimizer's part of a coefficient: what multiplies its gradients, if they are the same.

    Attributes:
        coefficient: float64, on the device of the first gradient.
        spent: a step has taken it. It counts again for a further step with the same gradients, as
            if they had been multiplied, and forbids nothing.
    """

    def __init__(self, params: Iterable[Tensor], coefficient: Tensor) -> None:
        self.coefficient = coefficient
        self.spent = False
        self._seen = {p: _seen(p) for p in params}
        self._shares: list[weakref.ref[Share]] = []  # of all optimizers, this one's too

    @staticmethod
    def join(shares: Sequence[Share]) -> None:
        """Makes them parts of one coefficient: all are looked at before the first one steps."""
        everyone = [weakref.ref(share) for share in shares]
        for share in shares:
            share._shares = everyone

    def gradients(self) -> Literal["same", "new", "changed"]:
        """What has become of them. One that is gone is none of a step."""
        same = new = False
        for param, grad, version in self._seen.values():
            if param.grad is None:
                continue
            now = local(param.grad)
            if grad is None or grad() is not now:
                new = True
            elif _version(param.grad, now) != version:
                return "changed"
            else:
                same = True
        return ("changed" if new else "same") if same else "new"

    def check(self) -> None:
        """Raises where gradients were changed."""
        if not self.spent and self.gradients() == "changed":
            raise RuntimeError(CHANGED)

    def claim(self, params: Iterable[Tensor]) -> bool:
        """Whether a step of these parameters is to be multiplied.

        Raises:
            RuntimeError: where gradients of one of the optimizers were changed.
        """
        found = self.gradients()
        if found == "new" or (self.spent and found == "changed"):
            return False
        for one in self._shares:
            share = one()
            if share is not None:  # whose optimizer has not stepped so far
                share.check()
        if any(p.grad is not None and p not in self._seen for p in params):
            raise RuntimeError(CHANGED)
        return True


def _seen(param: Tensor) -> Seen:
    if param.grad is None:
        return Seen(param, None, 0)
    grad = local(param.grad)
    return Seen(param, weakref.ref(grad), _version(param.grad, grad))


def _version(grad: Tensor, shard: Tensor) -> int:
    return shard._version if grad is shard else grad._version + shard._version


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
        norm_type: float = 2.0,
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
            norm_type (float): of the p-norm, ``inf`` for the largest absolute value (default: 2.0).
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
        if not self.pending_clip.claim(chain.from_iterable(g["params"] for g in self.param_groups)):
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


@torch.no_grad()
def clip_grad_norm_(
    optimizers: Optimizer | Iterable[Optimizer],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    in_place: bool = False,
) -> Tensor:
    """`FusedSGD.clip_grad_norm_` by one norm over the gradients of several optimizers.

    All of them are looked at before the first one steps. Gradients of optimizers that are not of
    this package are multiplied in place, now, since nobody else would do it.

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
    limit, order = number("max_norm", max_norm), number("norm_type", norm_type)
    if not limit >= 0.0:
        raise ValueError(f"Invalid max_norm: {max_norm} (expected at least 0)")
    if order != order:
        raise ValueError(f"Invalid norm_type: {norm_type}")
    flag("error_if_nonfinite", error_if_nonfinite)
    flag("in_place", in_place)
    params = [list(_params(opt)) for opt in opts]
    if sum(map(len, params)) != len(set(chain.from_iterable(params))):
        raise ValueError("Invalid optimizers: a parameter is in two of them")
    targets = [target_of(opt) for opt in opts]
    for target in targets:
        if target is not None and target.engine.options.in_backward:
            raise RuntimeError(IN_BACKWARD)
        if target is not None and target.pending_clip is not None:
            target.pending_clip.check()
    if any(is_flattened(p) for p in chain.from_iterable(params)):
        raise RuntimeError(FLATTENED)

    for p in chain.from_iterable(params):
        if is_sharded(p.grad) and not is_sharded_as(p.grad, p):
            p.grad = laid_out_as(p, p.grad)  # as the step would
    grads = [p.grad for p in chain.from_iterable(params) if p.grad is not None]
    fused = [target.engine.options.backend for target in targets if target is not None]
    total = total_norm(grads, order, fused[0] if fused else "auto")
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `parameters` is non-finite, "
            "so it cannot be clipped. To disable this error and scale the gradients by the "
            "non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    coefficient = (limit / (total + 1e-6)).clamp(max=1.0)
    shares = []
    for target, own in zip(targets, params, strict=True):
        if target is None or in_place:
            _scale_(own, coefficient)
        if target is not None:
            target.pending_clip = None
            if grads and not in_place:
                target.pending_clip = Share(own, coefficient.double())
                shares.append(target.pending_clip)
    Share.join(shares)
    return total


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0, backend: str = "auto") -> Tensor:
    """The norm of all gradients together: 0-dim, float64 where one of them is, else float32.

    Raises:
        ValueError: for a DTensor whose shards are terms of a sum.
        RuntimeError, TypeError: for a sparse gradient, or one without plain memory.
    """
    if not grads:
        return torch.tensor(0.0)
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    dtype = torch.float64 if wide else torch.float32
    if norm_type != 2.0:
        norms = [
            _norms(where, shards, norm_type).to(grads[0].device)
            for where, shards in summed_over(grads).items()
        ]
        return torch.linalg.vector_norm(torch.cat(norms), norm_type).to(dtype)
    total: Tensor | None = None
    for where, shards in summed_over(grads).items():
        own = where.total(_sum_squares(shards, backend))
        total = own if total is None else total + own.to(total.device)
    assert total is not None
    return total.sqrt().to(grads[0].device, dtype)


def _sum_squares(grads: Sequence[Tensor], backend: str) -> Tensor:
    """The sum of the squares of plain tensors, float64."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for g in grads:
        by_device.setdefault(g.device, []).append(_readable(g))
    total: Tensor | None = None
    for device, here in by_device.items():
        sums = norm.memory(here)
        backends.choose(backend, device).sum_squares(here, sums)
        total = sums[0] if total is None else total + sums[0].to(total.device)
    assert total is not None
    return total


def _readable(grad: Tensor) -> Tensor:
    """A gradient as the kernels can read it: itself, or a copy."""
    if grad.layout != torch.strided:
        raise RuntimeError("rbwa_fused does not support sparse gradients: clip_grad_norm_ got one")
    if is_traceable_wrapper_subclass(grad):
        raise TypeError(f"a gradient is a {type(grad).__name__}, which has no plain memory")
    if grad.is_complex():
        grad = torch.view_as_real(grad.resolve_conj())
    if grad.dtype not in DTYPES:
        return grad.float().contiguous()
    if (grad.is_contiguous() or is_dense(grad)) and is_plain(grad):
        return grad
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


def _norms(where: SummedOver, shards: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of each gradient, float64."""
    nothing = math.inf if p == -math.inf else 0.0  # which an empty shard adds
    each = [
        torch.linalg.vector_norm(g.abs() if g.is_complex() else g, p, dtype=torch.float64)
        if g.numel() > 0
        else torch.tensor(nothing, dtype=torch.float64, device=g.device)
        for g in shards
    ]
    norms = torch.stack([own.to(shards[0].device) for own in each])
    if not where.dims:
        return norms
    if math.isinf(p):
        return where.total(norms, "max" if p > 0 else "min")
    return where.total(norms) if p == 0 else where.total(norms**p) ** (1 / p)


def _scale_(params: Iterable[Tensor], coefficient: Tensor) -> None:
    """As torch.nn.utils.clip_grads_with_norm_."""
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            grad = local(p.grad)
            by_device.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, _), grads in by_device.items():
        torch._foreach_mul_(grads, coefficient.to(device))


def _params(opt: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in opt.param_groups)
