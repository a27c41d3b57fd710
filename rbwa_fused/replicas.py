r"""Elastic replicas: K models of one shape, trained side by side and pulled to their mean.

.. math::
    \bar w = \frac{1}{K} \sum_k \theta_k, \qquad
    \theta_k \leftarrow \theta_k + \alpha (\bar w - \theta_k)

`pull_` is that line; `Elastic` keeps the models and the schedule of alpha. Models in processes of
their own are distributed/elastic.py's, with the same schedule and checks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rbwa_fused import reference
from rbwa_fused.engine import backends, checks, memory
from rbwa_fused.engine.sharded import is_flattened, is_sharded
from rbwa_fused.model_state import state_dict_with
from rbwa_fused.numbers import integer, number

Replica = nn.Module | Iterable[Tensor]
# The living optimizers whose average follows from the weights (modes.py), by their ids. Not
# a WeakSet: one cannot be gone through while another thread makes an optimizer.
derived_averages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def pull_(replicas: Sequence[Replica], alpha: float) -> None:
    """Pulls K models to their mean in place, in one pass over memory; no mean is stored.

    Equal weights stay as they are, and alpha = 1 makes the models equal to the last bit. Arithmetic
    is float32, or float64 for float64, and a 16-bit weight is rounded once, when it is stored: of
    those, pulls below half a unit of their last place are lost. The bits are the same on every
    device and for any number of threads. Where the CPU or CUDA kernels are not built, on other
    devices, for tensors with gaps and for models in different memory formats plain torch does it,
    in several passes.

    Args:
        replicas: K >= 1 models, or K iterables of tensors: float32, float64, bfloat16 or float16,
            the same number of them in each, equal in shape, dtype and device one by one. Buffers
            of modules (BatchNorm's statistics) are not pulled.
        alpha: how far, 0 <= alpha <= 1; 0 changes nothing.

    Raises:
        ValueError, TypeError: naming the replica and the tensor, or the argument; nothing has been
            changed then. Also for tensors that share memory, within a model or between models.

    Example:
        >>> rbwa_fused.pull_([model_a, model_b], alpha=0.5)
    """
    lists = checked(replicas)
    alpha = _checked_alpha(alpha)
    if alpha == 0 or len(lists) == 1:
        return
    with torch.no_grad():
        backends.pull_(lists, alpha)
    increment_version([p for params in lists for p in params if not p.is_inference()])


class Schedule:
    """How far pulls go: alpha = 1 - T / T_max, or what is given in its place."""

    def __init__(
        self, epochs: int | None = None, alpha: float | Callable[[int], float] | None = None
    ) -> None:
        if (epochs is None) == (alpha is None):
            raise ValueError(f"expected one of epochs and alpha, got {epochs!r} and {alpha!r}")
        self._epochs = None if epochs is None else integer("epochs", epochs, least=1)
        self._alpha = alpha if alpha is None or callable(alpha) else _checked_alpha(alpha)

    def alpha(self, finished_epochs: int | None = None) -> float:
        """How far a pull goes after so many finished epochs; a constant alpha needs no count.

        Raises:
            ValueError: for a count below 0, above `epochs`, or a function's result out of range.
            TypeError: where the count is missing, or no integer.
        """
        if isinstance(self._alpha, float):
            return self._alpha
        if finished_epochs is None:
            raise TypeError("finished_epochs is missing; only a constant alpha does without")
        done = integer("finished_epochs", finished_epochs, least=0)
        if self._alpha is not None:
            return _checked_alpha(self._alpha(done))
        assert self._epochs is not None
        if done > self._epochs:
            raise ValueError(f"Invalid finished_epochs: {done} (expected at most {self._epochs})")
        return 1.0 - done / self._epochs


class Elastic(Schedule):
    r"""K models pulled to their mean, less and less: :math:`\alpha = 1 - T / T_{\max}`.

    T counts finished epochs: all through the first epoch alpha is 1, so whatever is pulled in it
    becomes equal; after the last epoch alpha is 0. How often to pull, every few steps or once an
    epoch, is the caller's choice.

    Each model is trained by an optimizer of its own. A `FusedSGD`'s momentum and the averages that
    it keeps beside the weights stay what they are, its float32 masters of 16-bit weights follow the
    pulled weights by themselves; a pull inside its `averaged()` is undone when that is left.
    There is nothing here to save in a checkpoint. Source: the blog on K models pulled to their
    mean; the shared-gradient update that it also writes is not well defined, and left out.

    Args:
        models: as the replicas of `pull_`. Of a module the parameters are looked up at each pull.
        epochs: T_max >= 1, or
        alpha: in place of that schedule a number, or a function of T; 0 <= alpha <= 1.

    Raises:
        ValueError, TypeError: as `pull_`; also for both or neither of epochs and alpha.

    Example:
        >>> elastic = rbwa_fused.Elastic(models, epochs=10)
        >>> for epoch in range(10):
        ...     for model, opt, loader in zip(models, optimizers, loaders):
        ...         train_an_epoch(model, opt, loader)
        ...     elastic.pull(epoch + 1)
        >>> averaged = copy.deepcopy(models[0])
        >>> averaged.load_state_dict(elastic.averaged_state_dict(models[0]))
        >>> torch.optim.swa_utils.update_bn(loaders[0], averaged)
    """

    def __init__(
        self,
        models: Sequence[Replica],
        *,
        epochs: int | None = None,
        alpha: float | Callable[[int], float] | None = None,
    ) -> None:
        super().__init__(epochs, alpha)
        self.models = [m if isinstance(m, nn.Module) else list(m) for m in _several(models)]
        checked(self.models)

    def pull(self, finished_epochs: int | None = None) -> None:
        """Pulls the models to their mean in place, see `pull_`, by `alpha(finished_epochs)`."""
        pull_(self.models, self.alpha(finished_epochs))

    def mean(self) -> list[Tensor]:
        """The mean of each parameter as a new tensor of its dtype and layout."""
        with torch.no_grad():
            lists = checked(self.models)
            return [
                torch.empty_like(p[0]).copy_(reference.mean(p)) for p in zip(*lists, strict=True)
            ]

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The state dict of one of the models, with the mean in place of the pulled parameters.

        Buffers are the model's own (torch.optim.swa_utils.update_bn estimates BatchNorm's anew);
        every tensor is a copy.

        Raises:
            ValueError: if none of the model's parameters is pulled.
        """
        means = self.mean()
        mean_of = {
            p: mean
            for replica in self.models
            for p, mean in zip(tensors(replica), means, strict=True)
        }
        return state_dict_with_means(model, mean_of)


def state_dict_with_means(model: nn.Module, mean_of: Mapping[Tensor, Tensor]) -> dict[str, Any]:
    """See Elastic.averaged_state_dict."""
    if not any(p in mean_of for p in model.parameters()):
        raise ValueError(f"Invalid model: none of the parameters of {model!r} is pulled")
    return state_dict_with(model, mean_of)


def tensors(replica: Replica) -> list[Tensor]:
    """The tensors of a replica."""
    return list(replica.parameters() if isinstance(replica, nn.Module) else replica)


def _several(replicas: Sequence[Replica]) -> list[Replica]:
    """The replicas, or an error where they are no sequence of them."""
    if isinstance(replicas, nn.Module | Tensor):
        raise TypeError(f"Invalid replicas: one {type(replicas).__name__} (expected K of them)")
    several = list(replicas)
    if not several:
        raise ValueError("Invalid replicas: none (expected at least 1)")
    for k, replica in enumerate(several):
        if isinstance(replica, Tensor):
            raise TypeError(f"replica {k} is a Tensor (expected a module or tensors)")
    return several


def _checked_alpha(alpha: float) -> float:
    value = number("alpha", alpha)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Invalid alpha: {alpha!r} (expected 0 to 1)")
    return value


def checked(replicas: Sequence[Replica]) -> list[list[Tensor]]:
    """The tensors of each replica, if they can be pulled."""
    several = _several(replicas)
    lists = []
    for k, replica in enumerate(several):
        try:
            lists.append(fit(replica))
        except (TypeError, ValueError) as error:
            raise type(error)(f"replica {k}: {error}") from None
        if len(lists[k]) != len(lists[0]):
            raise ValueError(
                f"replica {k} has {len(lists[k])} parameters (expected {len(lists[0])}, as the "
                "first)"
            )
        for i, (p, first) in enumerate(zip(lists[k], lists[0], strict=True)):
            if p.shape != first.shape or p.dtype != first.dtype or p.device != first.device:
                name = checks.name_of(_named(replica), i)
                raise _different(f"replica {k}: parameter {name}", p, first)
    shared = sharing([p for params in lists for p in params])
    if shared is not None:
        k, i = divmod(shared, len(lists[0]))
        raise ValueError(f"replica {k}: parameter {i} shares memory with another one")
    return lists


def fit(replica: Replica) -> list[Tensor]:
    """The tensors of a replica, if their kinds can be pulled."""
    group = _named(replica)
    for p in group["params"]:
        if not isinstance(p, Tensor):
            raise TypeError(f"{p!r} among its tensors")
        if is_sharded(p):
            raise TypeError("a DTensor among its tensors (expected shards: p.to_local())")
        if is_flattened(p):
            raise TypeError(
                "a FullyShardedDataParallel parameter among its tensors (expected shards: "
                "p.detach())"
            )
    checks.params(group, master_weights=False)
    params: list[Tensor] = group["params"]
    for opt in filter(None, (living() for living in derived_averages.valuerefs())):
        own = {p for own_group in opt.param_groups for p in own_group["params"]}
        if not own.isdisjoint(params):
            raise ValueError(
                f"weights of {type(opt).__name__} among its tensors: whoever moves them moves the "
                "average that they and z stand for"
            )
    return params


def sharing(params: Sequence[Tensor]) -> int | None:
    """The first tensor that shares memory with another one, if any does."""
    _, alone = memory.launch_order(params)
    return None if all(alone) else alone.index(False)


def _named(replica: Replica) -> dict[str, Any]:
    """A replica as a param group, for the checks."""
    group: dict[str, Any] = {"params": tensors(replica), "average": None}
    if isinstance(replica, nn.Module):
        group["param_names"] = [name for name, _ in replica.named_parameters()]
    return group


def _different(name: str, p: Tensor, first: Tensor) -> Exception:
    if p.dtype != first.dtype:
        return TypeError(f"{name} has dtype {p.dtype} (expected {first.dtype}, as the first)")
    if p.device != first.device:
        return ValueError(f"{name} is on {p.device} (expected {first.device}, as the first)")
    shape, expected = tuple(p.shape), tuple(first.shape)
    return ValueError(f"{name} has shape {shape} (expected {expected}, as the first)")
