"""Following: what an Averager averages, as it is now, and the checkpoints of its averages."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from rbwa_fused import checkpoint, foreign, form, members, rules
from rbwa_fused.averages import Averages
from rbwa_fused.engine import backends, checks
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.sharded import beside, local, shard_of
from rbwa_fused.engine.tables import Counts, Group, Options
from rbwa_fused.into import Into
from rbwa_fused.members import Followed, Params, grouped
from rbwa_fused.numbers import flag, integer
from rbwa_fused.several import Averages as Several
from rbwa_fused.several import Averaging, policies_of
from rbwa_fused.streams import AVERAGE, AVERAGES

# Who writes averages back to a parameter, by the parameter.
_writers: MutableMapping[Tensor, weakref.ref[Following]] = WeakIdKeyDictionary()


class Following(Averages):
    """Base of Averager, which takes the samples: parameters by their names, wherever a module has
    them, and an engine without a rule."""

    _optimizer: weakref.ref[Optimizer] | None = None  # behind whose steps samples are taken
    _owed: tuple[Tensor | None] | None = None  # found_inf of a step not sampled so far

    def _begin(
        self,
        params: nn.Module | Params,
        average: Averaging | Several,
        buffers: bool,
        into: nn.Module | Sequence[Tensor] | None,
        exclude: Sequence[str],
        backend: str,
    ) -> None:
        """What is averaged, and where; see Averager."""
        if isinstance(exclude, str):
            raise TypeError(f"Invalid exclude: {exclude!r} (expected a sequence of patterns)")
        flag("buffers", buffers)
        self._module: Followed | None = None
        if isinstance(params, nn.Module):
            self._module = Followed(params, exclude, buffers=bool(buffers))
            self.param_groups = self._module.groups([average] * (1 + bool(buffers)))
        elif buffers:
            raise TypeError("buffers=True needs a module (expected nn.Module for params)")
        else:
            self.param_groups = grouped(params, average, exclude)
        self.state: Any = defaultdict(dict)
        self.engine = Engine(rules.NONE, Options(backend=backend, flatten=False))
        self.engine.followed = self._module
        self._into = None if into is None else Into(into)
        for group in self.param_groups:
            self._check(group)
        if self._into is not None:
            policies = self._into.policies(self.param_groups)
            for group, policy in zip(self.param_groups, policies, strict=True):
                group["average"] = policy
                self._check(group)

    def _build(self) -> None:
        """The tables of an averager that has counted nothing."""
        counts = None
        if self._into is not None:
            self._into.attach(self.param_groups, self.state)
            counts = [Counts(int(group["average"] is not None)) for group in self.param_groups]
        self.engine.build(self.param_groups, self.state, 0, counts)
        self._check_into()

    def _claim(self) -> None:
        """Raises ValueError for a parameter that another averager writes its averages back to."""
        written = [
            (checks.name_of(group, i), p)
            for group in self.param_groups
            if any(policy.write_back_every > 0 for policy in policies_of(group["average"]))
            for i, p in enumerate(group["params"])
        ]
        for name, p in written:
            writer = _writers[p]() if p in _writers else None
            if writer is not None and writer is not self:
                raise ValueError(
                    f"parameter {name} is written back to by another Averager already, {writer!r} "
                    "(expected one; remove() ends the other)"
                )
        for _, p in written:
            _writers[p] = weakref.ref(self)

    def _tell_of_buffers(self) -> None:
        """Warns of policies whose average would need no memory in an optimizer of ours."""
        policies = {id(p): p for group in self.param_groups for p in policies_of(group["average"])}
        for policy in policies.values():
            if policy.write_back_every == 1 and self._into is None:
                warnings.warn(
                    f"{policy} keeps its average in memory of its own here: behind another "
                    "optimizer's step it is not the parameter itself, as in FusedSGD",
                    stacklevel=backends.user_level(),
                )

    def _give_up(self) -> None:
        """Writes averages back to no parameter any more."""
        for p, writer in list(_writers.items()):
            if writer() is self:
                del _writers[p]

    def _check_into(self) -> None:
        if self._into is not None and self._into.attach(self.param_groups, self.state):
            raise ValueError(
                "Invalid into: its tensors share memory with the weights or each other"
            )

    def _check(self, group: Group) -> None:
        checks.average(group, capturable=False)
        checks.params(group, master_weights=False)
        for device in {p.device for p in group["params"]}:
            backends.choose(self.engine.options.backend, device)

    def _follow(self) -> None:
        """Takes over what has become of a module's parameters since the last look. What fails or is
        interrupted here is done again by the next look: the module is looked at last."""
        if self._module is None or not self._module.changed():
            return
        new = self._module.groups([group["average"] for group in self.param_groups])
        for group in new:
            self._check(group)
        self.state = members.inherited(self.param_groups, new, self.state)
        for group, own in zip(self.param_groups, new, strict=True):
            group.update(own)
        self._rebuild()
        self._module.look()

    def _rebuild(self) -> None:
        self._claim()
        for group in self.param_groups:
            self._check(group)
            for p in group["params"]:
                held = self.state.get(p) or {}
                if any(held[key].shape != p.shape for key in AVERAGES if key in held):
                    del self.state[p]  # another parameter of that name; it starts as a copy
        if self._into is not None:
            self._into.attach(self.param_groups, self.state)
        self.engine.rebuild(self.param_groups, self.state, same=True)
        self._check_into()
        if self.engine.steps == 0:
            self._prepare()

    def _prepare(self) -> None:
        """Before the first step there are averages, for whoever loads into them. With an optimizer
        its first step looks at the weights once more."""
        starting = self.engine.starting() if self._optimizer is None else []
        if starting or self.engine.steps == 0:
            self.engine.prepare(starting)

    def _look(self) -> None:
        """Before something is read: not inside ``averaged()``."""
        if self.engine.swapped is None:
            self._follow()

    # ---- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Averages and counters, in the form of ``torch.optim.Optimizer.state_dict``.

        Tensors are the live ones. Parameters are numbered in the order of their groups. Averages
        that live ``into`` a module are in that module's state dict, and not in this.
        """
        self._look()
        numbers = {
            p: i for i, p in enumerate(chain.from_iterable(g["params"] for g in self.param_groups))
        }
        groups = [
            {**group, "params": [numbers[p] for p in group["params"]]}
            for group in self.param_groups
        ]
        state = {numbers[p]: dict(held) for p, held in self.state.items() if p in numbers}
        if self._into is not None:
            state = {}
        saved = {"state": state, "param_groups": groups}
        live = [dict(group) for group in self.param_groups]
        checkpoint.export(self.engine, live, self.state, saved)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any], *, step: int | None = None) -> None:
        """Loads what ``state_dict`` has returned, or averages that another library has saved:
        torch's AveragedModel, timm's ModelEmaV3, ema-pytorch, diffusers' EMAModel, or a plain state
        dict of averaged weights. Tensors are copied, into the averages that there are.

        Args:
            step (int, steps, >= 0): how many were taken. Ours say it themselves; of others it is
                the number of their steps or samples, if they say one, and else 1 (default: None).

        Raises:
            ValueError, TypeError: for an optimizer's checkpoint, another kind of policy,
                write-back, ``initial`` or dtype, other shapes, groups or names, which are all said.
                The averager is as it was then.
        """
        engine = self.engine
        if engine.swapped is not None and not engine.swapped.over:
            engine.refuse_inside_averaged("load_state_dict")
        form.mapping("state_dict", state_dict)
        self._follow()
        if not engine.tables.describes_groups(self.param_groups):
            self._rebuild()
        if "param_groups" in state_dict:
            loaded = self._own(state_dict, step)
        else:
            loaded = self._of_others(state_dict, step)
        if loaded.notes:
            warnings.warn("; ".join(loaded.notes), stacklevel=backends.user_level())
        if not (loaded.steps or any(counted.n_averaged for counted in loaded.counts)):
            loaded = loaded._replace(state=defaultdict(dict))  # averages of nothing
        checkpoint.keep_tensors(loaded.state, self.state)
        self.state = loaded.state
        engine.build(self.param_groups, loaded.state, loaded.steps, loaded.counts)
        engine.swapped = self._owed = None
        if engine.steps == 0:
            self._prepare()

    def _own(self, state_dict: dict[str, Any], step: int | None) -> checkpoint.Loaded:
        if self._into is None:
            return checkpoint.read(self.engine, self.param_groups, state_dict, step)
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        live = {i: self.state[p] for i, p in enumerate(params)}
        loaded = checkpoint.read(
            self.engine, self.param_groups, {**state_dict, "state": live}, step
        )
        note = "the averages live in another module (into=): load its state dict, too"
        return loaded._replace(notes=[*loaded.notes, note])

    def _of_others(self, state_dict: dict[str, Any], step: int | None) -> checkpoint.Loaded:
        saved = foreign.read(state_dict)
        left_out = [] if self._module is None else self._module.names()
        state: Any = defaultdict(dict)
        plan_of = {p: plan for plan in self.engine.tables.of_groups for p in plan.params}
        for _, p, value in foreign.matched(saved, self.param_groups, left_out):
            shard = shard_of(value.detach(), p)
            dtype = plan_of[p].dtype_of(AVERAGE, p)
            own = torch.empty_like(local(p), dtype=dtype, requires_grad=False).copy_(shard)
            state[p] = {AVERAGE: beside(own, p)}
        count = saved.samples
        steps = saved.steps if step is None else integer("step", step, least=0)
        counts = [Counts(count * (group["average"] is not None)) for group in self.param_groups]
        return checkpoint.Loaded([], state, steps, counts, [])
