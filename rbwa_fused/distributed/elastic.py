r"""Elastic replicas in processes of their own: each trains one of K models, pulled to their mean.

.. math::
    \bar w = \frac{1}{K} \sum_k \theta_k, \qquad
    \theta_k \leftarrow \theta_k + \alpha (\bar w - \theta_k)

`Elastic` knows the model, the schedule and when to pull; pull.py does it. The schedule and the
checks are those of replicas.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rbwa_fused import replicas
from rbwa_fused.distributed.exchange import Group, explained
from rbwa_fused.distributed.pull import Pull
from rbwa_fused.numbers import integer


class Elastic(replicas.Schedule):
    r"""This process's model, one of K that are pulled to their mean, less and less.

    :math:`\alpha = 1 - T / T_{\max}`, where T counts finished epochs: all through the first epoch
    alpha is 1, so whatever is pulled in it becomes equal; after the last epoch alpha is 0. How
    often to pull is the caller's choice: `pull` when it suits, or `step` after each step of the
    optimizer for a pull every so many of them.
    ``Elastic(model, alpha=1.0, every=k)`` is local SGD. The processes must make the same calls in
    the same order: `pull`, `step`, `wait`, `mean` and `averaged_state_dict` exchange weights.

    The bits are those of `rbwa_fused.pull_` on the K models in one process, for any K and on any
    backend: equal weights stay as they are, and alpha = 1 makes the models equal to the last bit.
    Arithmetic is float32, or float64 for float64; a 16-bit weight travels as float32 and is rounded
    once, when it is stored. A pull exchanges one flat buffer for each device and arithmetic: every
    process sends as many bytes as in an all-reduce by a ring, and takes twice the buffer's memory
    until it is done. Several replicas in one node had better use **exact=False**, one all-reduce of
    the backend's, which sends less between nodes; it adds in an order of its own, so bits differ
    from `pull_` by rounding, alpha = 1 still makes the models equal to the last bit, and weights
    that were equal may move by a unit of their last place.

    As in `rbwa_fused.Elastic` each process has an optimizer of its own, whose momentum and averages
    stay what they are and whose float32 masters of 16-bit weights follow by themselves; buffers are
    not pulled. Of a model that is sharded within each replica give the shards, ``[p.to_local() for
    p in model.parameters()]``, and the group of those that have the same ones.

    Weights are not touched before everything has arrived. If a process has gone or does not answer
    within the group's timeout, a RuntimeError says so, and this rank's weights are as they were.
    That is so with gloo; NCCL reports in time only with TORCH_NCCL_BLOCKING_WAIT=1, and without it
    ends the process.

    **overlap=True**: a pull takes a snapshot s of the weights and returns; its mean is exchanged
    while the training goes on, and :math:`\alpha (\bar w - s)` is added to the weights when the
    next pull starts or `wait` is called. So the correction is as many steps old as there were in
    between, and alpha = 1 leaves the models apart by what each has learnt meanwhile. For 16-bit
    weights the sum is float32 and rounded once; corrections below half a unit of their last place
    are lost. With `step` the first half of the bytes moves from the pull on and the second from
    every // 2 steps later on; with `pull` alone, or every = 1, the second half moves when the
    correction is asked for. With exact=False all of it moves from the pull on. After the last step
    call `wait`, or the last correction is missing.

    Sources: elastic averaging, Zhang, Choromanska, LeCun, 2015; the schedule, the blog on K models
    pulled to their mean; local SGD, Stich, 2018; the stale correction, which for alpha = 1 is
    CoCoD-SGD's, Shen et al., 2019.

    Args:
        model: a module, whose parameters are looked up at each pull, or an iterable of tensors:
            float32, float64, bfloat16 or float16, of the same shapes and dtypes in each process.
        epochs: T_max >= 1, or
        alpha: in place of that schedule a number, or a function of T; 0 <= alpha <= 1.
        every (int, steps, >= 1): `step` pulls at every `every`-th call (default: 1).
        overlap (bool): exchange while the training goes on (default: False).
        exact (bool): the bits of `rbwa_fused.pull_`, rather than those of the backend's all-reduce
            (default: True).
        group: the processes; None is the default group. Its timeout is how long a pull waits.

    Raises:
        ValueError, TypeError: as `rbwa_fused.Elastic`; and, in every process, where the models or
            arguments differ between the ranks of the group, naming the rank.
        RuntimeError: where a process has gone.

    Example:
        >>> elastic = rbwa_fused.distributed.Elastic(model, alpha=1.0, every=8)
        >>> for x, y in loader:
        ...     loss_fn(model(x), y).backward()
        ...     opt.step()
        ...     opt.zero_grad()
        ...     elastic.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor],
        *,
        epochs: int | None = None,
        alpha: float | Callable[[int], float] | None = None,
        every: int = 1,
        overlap: bool = False,
        exact: bool = True,
        group: Group = None,
    ) -> None:
        self._group = group
        self._world = dist.get_world_size(group)
        if self._world < 1:
            raise ValueError("this process is not in the group")
        self._steps = 0
        self._under_way: Pull | None = None
        problem = None
        try:
            super().__init__(epochs, alpha)
            if isinstance(model, Tensor):
                raise TypeError("Invalid model: a Tensor (expected a module or tensors)")
            self.model = model if isinstance(model, nn.Module) else list(model)
            self._every = integer("every", every, least=1)
            self._overlap, self._exact = bool(overlap), bool(exact)
            self._kinds = [_kind(p) for p in _own(self.model)]
        except (TypeError, ValueError) as error:
            problem = error
        self._agree(problem)

    def _agree(self, problem: Exception | None) -> None:
        """Raises in all processes where they differ, or where one has a problem."""
        ours: Any = str(problem)
        if problem is None:
            alpha = self._alpha if isinstance(self._alpha, float | None) else "a function"
            ours = {"epochs": self._epochs, "alpha": alpha, "every": self._every}
            ours |= {"overlap": self._overlap, "exact": self._exact, "parameters": len(self._kinds)}
            ours |= {f"parameter {i}": kind for i, kind in enumerate(self._kinds)}
        everyone: list[Any] = [None] * self._world
        with explained("Elastic", "The weights of this rank are unchanged."):
            dist.all_gather_object(everyone, ours, group=self._group)
        if problem is not None:
            raise problem
        for rank, theirs in enumerate(everyone):
            if isinstance(theirs, str):
                raise ValueError(f"rank {rank}: {theirs}")
        for rank, theirs in enumerate(everyone):
            for name, first in everyone[0].items():
                if theirs[name] != first:
                    raise ValueError(
                        f"rank {rank} has {name} = {theirs[name]} (expected {first}, as rank 0)"
                    )

    def pull(self, finished_epochs: int | None = None) -> None:
        """Pulls this process's weights to the mean of all, by `alpha(finished_epochs)`.

        With overlap=True the correction of the pull before is added, and a new one started.

        Raises:
            ValueError, TypeError: as `alpha`; also for parameters that are not what they were.
            RuntimeError: where a process has gone.
        """
        alpha = self.alpha(finished_epochs)
        params = self._params()
        self._correct(params)
        if alpha == 0 or self._world == 1:
            return
        pull = Pull(params, alpha, self._group, self._exact)
        if self._overlap:
            self._under_way = pull
        else:
            pull.finish(params)

    def step(self, finished_epochs: int | None = None) -> None:
        """To be called after each step of the optimizer: pulls at every `every`-th call."""
        self.alpha(finished_epochs)  # raises at the first call, not at the first pull
        since = (self._steps + 1) % self._every
        if since == 0:
            self.pull(finished_epochs)
        elif since == self._every // 2 and self._under_way is not None:
            self._under_way.turn()
        self._steps += 1

    def wait(self) -> None:
        """Adds the correction of the pull that is under way (overlap=True); else does nothing."""
        if self._under_way is not None:
            self._correct(self._params())

    def mean(self) -> list[Tensor]:
        """The mean of each parameter over the processes, as a new tensor of its dtype and layout.

        Every process must ask, and has the same bits.
        """
        params = self._params()
        with torch.no_grad():
            alone = self._world == 1
            means = params if alone else Pull(params, 1.0, self._group, self._exact).means()
            return [torch.empty_like(p).copy_(m) for p, m in zip(params, means, strict=True)]

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The state dict of a model that has the pulled parameters, with the mean in their place.

        Every process must ask. Buffers are the model's own (torch.optim.swa_utils.update_bn
        estimates BatchNorm's anew); every tensor is a copy.

        Raises:
            ValueError: if none of the model's parameters is pulled.
        """
        means = dict(zip(replicas.tensors(self.model), self.mean(), strict=True))
        return replicas.state_dict_with_means(model, means)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside model and optimizer: how often `step` was called.

        Raises:
            RuntimeError: while a pull is under way, whose correction the weights lack.
        """
        self._refuse_under_way("state_dict")
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError, TypeError: for anything else.
            RuntimeError: while a pull is under way.
        """
        self._refuse_under_way("load_state_dict")
        if not isinstance(state_dict, dict) or state_dict.keys() != {"steps"}:
            raise ValueError(f"Invalid state_dict: {state_dict!r} (expected {{'steps': a count}})")
        self._steps = integer("steps", state_dict["steps"], least=0)

    def _params(self) -> list[Tensor]:
        """The tensors of the model, if they are as they were at construction."""
        params = _own(self.model)
        now = [_kind(p) for p in params]
        if len(now) != len(self._kinds):
            raise ValueError(f"the model has {len(now)} parameters (it had {len(self._kinds)})")
        for i, (kind, before) in enumerate(zip(now, self._kinds, strict=True)):
            if kind != before:
                raise ValueError(f"parameter {i} is {kind} (it was {before})")
        return params

    def _correct(self, params: list[Tensor]) -> None:
        pull, self._under_way = self._under_way, None
        if pull is not None:
            pull.correct(params)

    def _refuse_under_way(self, what: str) -> None:
        if self._under_way is not None:
            raise RuntimeError(
                f"{what}() while a pull is under way: call wait() on all ranks first"
            )


def _own(model: replicas.Replica) -> list[Tensor]:
    """The tensors of this process's model, if they can be pulled."""
    params = replicas.fit(model)
    shared = replicas.sharing(params)
    if shared is not None:
        raise ValueError(f"parameter {shared} shares memory with another one")
    return params


def _kind(p: Tensor) -> str:
    """What must agree between the processes."""
    return f"{p.dtype} of shape {tuple(p.shape)} on {p.device.type}"
