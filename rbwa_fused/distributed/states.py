"""State that one rank has and all must have: taken over as it is, also where inputs were uneven.

DistributedDataParallel keeps weights equal, not what an optimizer keeps beside them: that is equal
as long as all ranks take the same steps. Under torch.distributed.algorithms.Join they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.distributed.optim import ZeroRedundancyOptimizer

from rbwa_fused.distributed.exchange import Group, explained
from rbwa_fused.engine.sharded import kind_of_shard


class _Elsewhere(NamedTuple):
    """In the place of a tensor that is sent by itself."""

    shape: torch.Size
    dtype: torch.dtype
    device: str


def synchronize(opt: Any, source: int, group: Group = None) -> None:
    """Gives every rank the optimizer state that one rank has.

    State tensors (momentum, averages, masters), counters and hyperparameters: what `state_dict`
    returns there is loaded everywhere else, to the last bit. Weights are not part of an optimizer's
    state, nor of this: DistributedDataParallel broadcasts them from rank 0 when it is built and,
    under Join, at the end. So rank 0 alone may load a checkpoint, of the model before it is wrapped
    and of the optimizer, and ``synchronize(opt, 0)`` tells the others.

    All ranks of the group must call it. Tensors are broadcast one by one, never pickled.

    Args:
        opt: an optimizer, with any state or none so far; or what else has `state_dict` and
            `load_state_dict`, such as a learning rate scheduler.
        source: global rank of whom to follow, as torch.distributed.broadcast's ``src``.
        group: the processes; None is the default group.

    Raises:
        ValueError: on a rank whose optimizer has other groups, shapes or another kind of average;
            on a process outside the group.
        TypeError: for a ZeroRedundancyOptimizer or sharded parameters, whose ranks have different
            states.
        RuntimeError: where a process has gone.

    Example:
        >>> if dist.get_rank() == 0:
        ...     saved = torch.load("checkpoint.pt")
        ...     model.load_state_dict(saved["model"])
        ...     opt.load_state_dict(saved["optimizer"])
        >>> model = DistributedDataParallel(model)
        >>> rbwa_fused.distributed.synchronize(opt, 0)
    """
    _refuse_sharded(opt)
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    device = _device(opt)
    leads = dist.get_rank() == source
    tensors: list[Tensor] = []
    structure = [_apart(opt.state_dict(), tensors) if leads else None]

    def received(sent: _Elsewhere) -> Tensor:
        tensor = torch.empty(sent.shape, dtype=sent.dtype, device=device)
        dist.broadcast(tensor, src=source, group=group)
        return tensor if device.type == sent.device else tensor.to(sent.device)

    with explained("synchronize", "The state of this rank is unchanged."):
        dist.broadcast_object_list(structure, src=source, group=group)
        for tensor in tensors:
            dist.broadcast(tensor.detach().to(device).contiguous(), src=source, group=group)
        state = None if leads else _together(structure[0], received)
    if not leads:
        opt.load_state_dict(state)


class Joined(Joinable):
    """An optimizer in torch.distributed.algorithms.Join: at the end all ranks have the same state.

    Where ranks have different numbers of batches, those that are through shadow the others'
    communication and take no steps. At the end DistributedDataParallel broadcasts the weights of a
    rank that joined last; momentum, averages, counters and hyperparameters of the others have
    lagged behind, and the next step would drive their weights apart. This takes the optimizer's
    state from the same rank: of those that joined last the one of the largest number.

    It takes part in no step. A learning rate scheduler that is stepped with the optimizer lags just
    so: name it, too.

    Args:
        opt: the optimizer, of DistributedDataParallel's model: no ZeroRedundancyOptimizer, which
            does not go with Join.
        others: what else has `state_dict` and `load_state_dict` and is to follow.
        group: the processes, the same as the model's; None is the default group.

    Raises:
        TypeError: for a ZeroRedundancyOptimizer or sharded parameters.
        ValueError: where it comes first in Join's list, which must be the model.

    Example:
        >>> with Join([ddp_model, rbwa_fused.distributed.Joined(opt, scheduler)]):
        ...     for x, y in loader:
        ...         loss_fn(ddp_model(x), y).backward()
        ...         opt.step()
        ...         opt.zero_grad()
        ...         scheduler.step()
    """

    def __init__(self, opt: Any, *others: Any, group: Group = None) -> None:
        _refuse_sharded(opt)
        super().__init__()
        self._followers = (opt, *others)
        self._group = dist.group.WORLD if group is None else group

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        return _device(self._followers[0])

    @property
    def join_process_group(self) -> Any:
        return self._group

    def __setattr__(self, name: str, value: Any) -> None:
        # The first in Join's list must tell at each step that it has not joined yet; without a
        # collective of its own at a step, this one cannot, and Join would wait for it in vain.
        if name == "_join_config" and value.enable and value.is_first_joinable:
            raise ValueError("Joined(opt) is the first in Join's list (expected the model there)")
        super().__setattr__(name, value)

    def follow(self, is_last_joiner: bool) -> None:
        """Takes over the state of the rank whose model DistributedDataParallel broadcasts."""
        rank = dist.get_rank(self._group) if is_last_joiner else -1
        largest = torch.tensor([rank], device=self.join_device)
        with explained("Joined", "The state of this rank is unchanged."):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        assert self._group is not None
        source = dist.get_global_rank(self._group, int(largest.item()))
        for follower in self._followers:
            synchronize(follower, source, self._group)


class _Hook(JoinHook):
    def __init__(self, joined: Joined) -> None:
        self._joined = joined

    def post_hook(self, is_last_joiner: bool) -> None:
        self._joined.follow(is_last_joiner)


def _refuse_sharded(opt: Any) -> None:
    if isinstance(opt, ZeroRedundancyOptimizer):
        raise TypeError("Invalid opt: a ZeroRedundancyOptimizer, whose ranks differ in their state")
    kind = kind_of_shard(_params(opt))
    if kind is not None:
        raise TypeError(f"Invalid opt: it has {kind} parameters, whose ranks differ in their state")


def _params(opt: Any) -> list[Tensor]:
    return [p for group in getattr(opt, "param_groups", []) for p in group["params"]]


def _device(follower: Any) -> torch.device:
    """Where an optimizer's parameters are, or those of a scheduler's optimizer."""
    params = _params(getattr(follower, "optimizer", follower))
    return params[0].device if params else torch.device("cpu")


def _apart(tree: Any, tensors: list[Tensor]) -> Any:
    """The tree without its tensors, which are added to the list."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return _Elsewhere(tree.shape, tree.dtype, tree.device.type)
    if isinstance(tree, dict):
        apart = copy(tree)  # of its class: a scheduler's milestones are a Counter
        for key, value in tree.items():
            apart[key] = _apart(value, tensors)
        return apart
    if type(tree) in (list, tuple):
        return type(tree)(_apart(value, tensors) for value in tree)
    return tree


def _together(tree: Any, received: Callable[[_Elsewhere], Tensor]) -> Any:
    """The tree with its tensors again, which are received in the order of `_apart`."""
    if isinstance(tree, _Elsewhere):
        return received(tree)
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = _together(value, received)
        return tree
    if type(tree) in (list, tuple):
        return type(tree)(_together(value, received) for value in tree)
    return tree
