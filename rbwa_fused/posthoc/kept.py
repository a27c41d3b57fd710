"""What an owner of averages keeps that is worth a snapshot: the one place that asks it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rbwa_fused import several
from rbwa_fused.average import Average
from rbwa_fused.averages import Averages
from rbwa_fused.engine.sharded import local
from rbwa_fused.posthoc.profiles import LEAST
from rbwa_fused.weights import Mean, PowerEma


class Kept(NamedTuple):
    """An average that has samples.

    Attributes:
        policy: by which it is taken.
        tensors: the live averages, by the model's names.
        weights: the parameters that it is of.
        step: behind which its last sample was taken.
        steps: that its owner has taken.
    """

    policy: Average
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]
    step: int
    steps: int

    @property
    def over(self) -> bool:
        """Whether no sample is to come."""
        return self.policy.stop is not None and self.steps >= self.policy.stop

    def lengths(self) -> tuple[float, float]:
        """The norm of the average, and its distance from the weights, of this process's shards, in
        float64."""
        norms, distances = [], []
        for name, average in self.tensors.items():
            a = local(average).detach().double()
            norms.append(torch.linalg.vector_norm(a).item())
            if name in self.weights:
                x = local(self.weights[name]).detach().double()
                distances.append(torch.linalg.vector_norm(a - x).item())
        return math.hypot(*norms), math.hypot(*distances)

    def shards(self) -> dict[str, Tensor]:
        """What a file holds of this process: the averages, and the weight, which was never trained,
        where one has not begun."""
        return {n: local(t).detach() for n, t in {**self.weights, **self.tensors}.items()}

    def rounded(self, dtype: torch.dtype) -> float:
        """The norm of what a file of that dtype loses of the shards, in float64.

        Raises:
            OverflowError: for a finite value that it would make infinite, naming the tensor.
        """
        losses = []
        for name, shard in self.shards().items():
            if shard.dtype == dtype or shard.numel() == 0:
                continue
            narrow = shard.to(dtype)
            if (narrow.isinf() & shard.isfinite()).any():
                most = shard[shard.isfinite()].abs().max().item()
                raise OverflowError(
                    f"Invalid dtype: {dtype} does not hold {most:.4g} of {name} (expected a wider "
                    "one, such as torch.float32)"
                )
            loss = shard.double() - narrow.double()
            losses.append(torch.linalg.vector_norm(loss).item())
        return math.hypot(*losses)


def gamma_of_policy(policy: Average) -> float | None:
    """The power of an average's profile, above -1/2; None for one that has no such profile. A mean
    of all is of power 0."""
    if policy.write_back_every > 0 or policy.stop is not None:
        return None
    if isinstance(policy.weight, Mean):
        return 0.0 if policy.initial == "first_sample" else None
    gamma = policy.weight.gamma if isinstance(policy.weight, PowerEma) else LEAST
    return gamma if gamma > LEAST else None


def owners_of(opt: Averages | Sequence[Averages]) -> list[Averages]:
    """One or several.

    Raises:
        TypeError: for what has no averages.
    """
    owners: list[Any] = [*opt] if isinstance(opt, list | tuple) else [opt]
    for owner in owners:
        if not isinstance(owner, Averages):
            raise TypeError(
                f"Invalid opt: {type(owner).__name__} (expected an optimizer of rbwa_fused, an "
                "Averager, or a list of them)"
            )
    if not owners:
        raise ValueError("Invalid opt: [] (expected at least one)")
    return owners


def policies_of(owner: Averages) -> list[Average]:
    """The policies of an owner's averages, also of those that have not begun.

    Raises:
        ValueError: for param groups that are averaged by different ones.
    """
    averages = [g["average"] for g in owner.param_groups if g["average"]]
    found = {tuple(p.describe() for p in several.policies_of(a)): a for a in averages}
    if len(found) > 1:
        raise ValueError(
            f"Invalid averages: the param groups have {' and '.join(map(repr, found.values()))} "
            "(expected one policy for all)"
        )
    return [policy for average in found.values() for policy in several.policies_of(average)]


def weights_of(owner: Averages, model: nn.Module | None) -> dict[str, Tensor]:
    """The parameters that an owner averages, by name, whether their averages have begun or not.

    Raises:
        TypeError: without a model, for parameters that have no names.
    """
    groups = [group for group in owner.param_groups if group["average"]]
    if model is not None:
        averaged = {p for group in groups for p in group["params"]}
        return {name: p for name, p in model.named_parameters() if p in averaged}
    if not all("param_names" in group for group in groups):
        raise TypeError("Invalid model: None (expected that by whose names averages are kept)")
    return {
        name: p
        for group in groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def kept_of(owner: Averages, model: nn.Module | None) -> list[Kept]:
    """The averages of an owner that have samples.

    Args:
        model: by whose names they are known; None for the module that an Averager follows.

    Raises:
        TypeError, ValueError: as ``owner.averages`` and ``policies_of``.
    """
    readable: Any = owner  # the model is an argument that an Averager can do without
    models = [] if model is None else [model]
    policies, steps, weights = policies_of(owner), owner.engine.steps, weights_of(owner, model)
    found = []
    for number, policy in enumerate(policies):
        last = _last_sample(policy, steps)
        tensors = readable.averages(*models, which=number) if last > policy.start else {}
        if tensors:
            found.append(Kept(policy, tensors, weights, last, steps))
    return found


def all_kept(owners: Sequence[Averages], model: nn.Module | None) -> list[Kept]:
    """The averages of several owners; those of one policy are parts of one average."""
    found: dict[str, Kept] = {}
    for kept in (kept for owner in owners for kept in kept_of(owner, model)):
        key = kept.policy.describe()
        before = found.setdefault(key, kept)
        found[key] = kept._replace(
            tensors=before.tensors | kept.tensors, weights=before.weights | kept.weights
        )
    return list(found.values())


def _last_sample(policy: Average, steps: int) -> int:
    """The last step until now that a sample was taken behind."""
    until = steps if policy.stop is None else min(steps, policy.stop)
    return until - (until - policy.origin) % policy.every
