"""An optimizer of rbwa_fused and its twin, built from the same description, and compared."""

from __future__ import annotations

from typing import Any

import torch
from agreement import agree, compare
from bounds import Value
from program import Case, GroupSpec, TensorSpec, laid_out, numbers, overrun, within
from rules import ALGORITHMS
from torch import Tensor, nn
from twin import AVERAGE, Group, Member, Twin


def equal(left: tuple[list[Tensor], str], right: tuple[list[Tensor], str]) -> bool:
    """Whether two results of `SideBySide.held` are the same."""
    pairs = zip(left[0], right[0], strict=True)
    return left[1] == right[1] and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def own(options: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters whose tensors are nobody else's."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}


class SideBySide:
    """An optimizer, its model, and their twin.

    Attributes:
        tried: what this case has tried, in words.
        bases, twin_bases: memory that parameters share.
        shares: the parameters that lie in it.
    """

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.tried: set[str] = set()
        self.rule = ALGORITHMS[case.rule]
        self.twin = Twin(self.rule, case.master_weights)
        self.model = nn.ParameterList()
        self.bases: dict[tuple[int, torch.dtype], Tensor] = {}
        self.twin_bases: dict[tuple[int, torch.dtype], Value] = {}
        self.shares: dict[int, TensorSpec] = {}
        self.opt = self.optimizer([self.group(spec) for spec in case.groups], case.flatten)
        self.check()

    def optimizer(self, groups: list[dict[str, Any]], flatten: bool) -> Any:
        more: dict[str, Any] = {
            "average": self.case.average,
            "backend": self.backend,
            "flatten": flatten,
            "capturable": self.case.capturable,
            "master_weights": self.case.master_weights,
            "in_backward": self.case.in_backward,
        }
        return self.rule.cls(groups, **self.rule.constructor, **more)

    def group(self, spec: GroupSpec) -> dict[str, Any]:
        """Adds a group to the model and to the twin, and returns what the optimizer takes."""
        policy = self.case.average if spec.average is None else spec.average or None
        members, params = [], []
        for tensor in spec.tensors:
            if tensor.base:
                key = tensor.base, tensor.dtype
                if key not in self.bases:
                    base = numbers((tensor.base,), tensor.base).to(tensor.dtype)
                    self.bases[key], self.twin_bases[key] = base, Value.of(base)
                shared = self.twin_bases[key]
                v, off = within(shared.v, tensor), within(shared.off, tensor)
                theta = Value(v, off, shared.arithmetic)
                p = nn.Parameter(within(self.bases[key], tensor))
                self.shares[len(self.model)] = tensor
            else:
                values = numbers(tensor.shape, tensor.seed)
                p = nn.Parameter(laid_out(values, tensor.dtype, tensor.layout))
                theta = Value.of(p)
            members.append(Member(theta, tensor.dtype, self.case.master_weights))
            params.append(p)
            self.model.append(p)
            self.tried.add(f"{'shared' if tensor.base else tensor.layout} memory")
        self.twin.groups.append(Group(own(spec.options), policy, members))
        chosen = {} if spec.average is None else {"average": spec.average}
        return {"params": params, **own(spec.options), **chosen}

    # ---- comparison ----------------------------------------------------------------------------

    def check(self) -> None:
        """Compares everything; the twin then goes on from the optimizer's numbers."""
        for key, base in self.bases.items():
            compare(f"base {key}", base, self.twin_bases[key], key[1])
        agree(self.opt, [*self.model], self.twin, shared=self.shares, backend=self.backend)
        for key, base in self.bases.items():
            self.twin_bases[key].v.copy_(base)
            self.twin_bases[key].off.zero_()
        for i, p in enumerate(self.model):
            assert i in self.shares or not overrun(p), f"beside parameter {i}"

    def held(self, weights: bool = True) -> tuple[list[Tensor], str]:
        """Weights, state and counters: what must come back, or must not change."""
        saved = self.opt.state_dict()
        tensors = [p.detach().clone() for p in self.model] if weights else []
        tensors += [t.clone() for i in sorted(saved["state"]) for t in saved["state"][i].values()]
        return tensors, repr(saved["param_groups"])

    # ---- averages ------------------------------------------------------------------------------

    def averages(self) -> dict[int, Value]:
        """The averages that are not the parameters themselves, once there is a sample."""
        found, i = {}, 0
        for group in self.twin.groups:
            for member in group.members:
                if group.samples > 0 and AVERAGE in member.state and group.average_dtype(member):
                    found[i] = member.state[AVERAGE][0]
                i += 1
        return found

    def evaluated(self, beside: bool) -> dict[int, Value]:
        """What `averaged()` puts in place, in the parameters' dtypes."""
        twin = self.twin
        if twin.rule.modes and not beside:
            return {i: member.x(beta) for i, member, beta in twin.with_z() if twin.trains}
        return {i: a.stored(self.model[i].dtype) for i, a in self.averages().items()}

    def live(self, beside: bool) -> list[Value]:
        """The weights inside `averaged()`; where parameters overlap, the last one has the say."""
        bases = {key: value.clone() for key, value in self.twin_bases.items()}
        thetas = []
        for i, member in enumerate(self.twin.members):
            spec = self.shares.get(i)
            theta = member.theta.clone()
            if spec:
                base = bases[spec.base, spec.dtype]
                theta = Value(within(base.v, spec), within(base.off, spec), base.arithmetic)
            thetas.append(theta)
        for i, average in self.evaluated(beside).items():
            thetas[i].v.copy_(average.v)
            thetas[i].off.copy_(average.off)
        return thetas
