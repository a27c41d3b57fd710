"""FusedOptimizer: param groups, state, and the step that hands both to a kernel.

`_update` is the data path: gradients are gathered, the rows of the coefficient table brought up
to date (plan.py), and one call of the backend (ops.py) steps every parameter of a device. Flat
buffers and segment tables are flat.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from rbwa_fused import checkpoint, checks, evaluate, flat, ops, rules
from rbwa_fused.deferred import Deferred
from rbwa_fused.plan import GroupPlan, Plan

Group = dict[str, Any]
Grads = list[Tensor | None]
Gathered = tuple[flat.Table, ops.Backend, Grads]
Counters = list[tuple[int, float | None]]  # of each group: samples, beta of implicit RSGDM
NONE = type(None)


class FusedOptimizer(Optimizer):
    """Base of FusedSGD and RSGDM: everything but the rule and its hyperparameters.

    A subclass gives a ``rule`` (rules.py), the name under which checkpoints remember it, the
    ``streams`` of state that it keeps, and the ``hyperparameters`` of a group that it reads.
    """

    rule: rules.Rule
    rule_name: str
    streams: tuple[str, ...] = ("momentum_buffer",)
    hyperparameters: Callable[[Group], tuple[Any, ...]]
    _step_supports_amp_scaling = True
    _plan: Plan | None = None
    _warned = False  # that the reference runs
    _evaluating: evaluate.Exchange | None = None
    _deferred: dict[torch.device, Deferred] | None = None  # where the host does not count

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        backend: str,
        flatten: bool,
        capturable: bool,
    ) -> None:
        self._backend_name = backend
        self._flatten = flatten
        self._capturable = capturable
        self._steps = 0
        self._check_hyperparameters(defaults)
        checks.average(defaults, capturable)
        super().__init__(params, defaults)
        self.register_state_dict_post_hook(checkpoint.export)
        self._build(self.param_groups, move=flatten)

    # ---- param groups, tables, state -----------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its average starts with its own first sample. See torch.optim.Optimizer."""
        self._refuse_inside_averaged("add_param_group")
        checks.duplicates(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_hyperparameters(group)
            checks.average(group, self._capturable)
            checks.params(group)
            for device in {p.device for p in group["params"]}:
                ops.choose(self._backend_name, device)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._plan is not None:
            self._add(self._plan, [group], move=self._flatten)

    @classmethod
    def _check_hyperparameters(cls, group: Group) -> None:
        rules.check(group)

    def _build(self, groups: list[Group], move: bool, counters: Counters | None = None) -> None:
        """Makes tables and rows anew and takes over the state and the counters there are."""
        self._plan = plan = Plan(self.rule, self._check_hyperparameters, self.hyperparameters)
        self._deferred = None
        self._tables: dict[tuple[torch.device, int], flat.Table] = {}
        self._add(plan, groups, move, counters)

    def _add(
        self, plan: Plan, groups: list[Group], move: bool, counters: Counters | None = None
    ) -> None:
        known = [p for table in self._tables.values() for p in table.params]
        new = [p for group in groups for p in group["params"]]
        turns, alone = flat.turns(known + new)
        turn_of = dict(zip(known + new, turns, strict=True))
        if move:
            flat.move([p for p, own in zip(new, alone[len(known) :], strict=True) if own])
        for group, counted in zip(groups, counters or [(0, None)] * len(groups), strict=True):
            group_plan = plan.add(group, *counted)
            for index, p in enumerate(group["params"]):
                table = self._tables.setdefault((p.device, turn_of[p]), flat.Table())
                row, sampling = group_plan.row(first=False), group_plan.sampling(p)
                table.add(p, group_plan.index, index, row, sampling)
        self.backend = ops.choose(self._backend_name, torch.device("cpu")).name if not new else ""
        self._launches: list[tuple[flat.Table, ops.Backend]] = []
        for (device, _), table in sorted(self._tables.items(), key=lambda item: item[0][1]):
            backend = ops.choose(self._backend_name, device)
            self.backend = backend.name
            self._launches.append((table, backend))
            if self.backend == "reference" and self._backend_name == "auto" and not self._warned:
                self._warned = True
                ops.warn_of_reference(device)
            self._take_over_state(plan, table, set(new))
        custom = any(p.policy is not None and p.policy.custom for p in plan.groups)
        self._may_defer = not custom and all(b.advance is not None for _, b in self._launches)
        plan.starting = True
        self._known_state, self._known_size = self.state, len(self.state)

    def _take_over_state(self, plan: Plan, table: flat.Table, new: set[Tensor]) -> None:
        for stream in flat.STREAMS:
            values: dict[int, Tensor | None] = {}
            for i, p in enumerate(table.params):
                held = self.state.get(p, {}) if p in new else {}
                if stream == "average" and not plan.groups[table.groups[i]].buffered(p):
                    held.pop(stream, None)  # the parameter itself has become its average
                if held.get(stream) is not None:
                    values[i] = held[stream]
            self._attach(plan, table, stream, values)

    def _attach(
        self, plan: Plan, table: flat.Table, stream: str, values: dict[int, Tensor | None]
    ) -> None:
        dtypes = {}
        for i in values if stream == "average" else ():
            policy = plan.groups[table.groups[i]].policy
            if policy is not None:
                dtypes[i] = policy.dtype_for(table.params[i].dtype)
        for i, view in table.attach(stream, values, dtypes).items():
            self.state[table.params[i]][stream] = view
        self._known_size = len(self.state)

    def _rebuild(self, counters: Counters | None = None) -> None:
        """Follows parameters that were converted, and state that was replaced."""
        for group in self.param_groups:
            checks.params(group)
            checks.state(group, self.state)
        for p in self._settle():
            for stream in self.streams:
                self.state[p].pop(stream, None)
        self._build(self.param_groups, move=False, counters=counters or self._counters())

    def _counters(self) -> Counters:
        """Of each group, as the plan that knows its parameters counts them. Where the state was
        cleared, averages in buffers start again."""
        plans = self._plan.groups if self._plan is not None else []
        plan_of = {p: plan for plan in plans for p in plan.params}
        cleared = not self.state and self._known_size > 0
        counters: Counters = []
        for group in self.param_groups:
            plan = next((plan_of[p] for p in group["params"] if p in plan_of), None)
            if plan is None:
                counters.append((0, None))
                continue
            starts_again = cleared and any(plan.buffered(p) for p in plan.params)
            n_averaged = 0 if starts_again else plan.n_averaged
            counters.append((n_averaged, None if cleared else plan.beta))
        return counters

    # ---- the step ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step: the update and the average in one pass.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
        """
        if torch.compiler.is_compiling() or (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        ):
            return self._observed_step(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch then leaves `step` unwrapped

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._refuse_inside_averaged("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            while not self._update():
                self._rebuild()
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    # torch's wrapper runs the hooks and tells the profiler. It would make a small step 40 % longer
    # (docs/benchmarks.md), so it is taken only when somebody watches.
    _observed_step = torch._disable_dynamo(Optimizer.profile_hook_step(_step))

    def _update(self) -> bool:
        """Gather, plan, launch, count. False, with nothing changed, where tables are outdated."""
        plan = self._plan
        assert plan is not None
        if (
            self.state is not self._known_state
            or len(self.state) != self._known_size
            or len(plan.groups) != len(self.param_groups)
            or not all(map(GroupPlan.describes, plan.groups, self.param_groups))
        ):
            return False
        gathered: list[Gathered] = []
        absent = present = False
        if len(self._tables) > 1:
            plan.starting = True
        for table, backend in self._launches:
            grads: Grads = [p.grad for p in table.params]
            kinds = set(map(type, grads))
            absent = absent or NONE in kinds
            present = present or (bool(kinds) and kinds != {NONE})
            if table.lacking and any(grads[i] is not None for i in table.lacking):
                plan.starting = True
            gathered.append((table, backend, grads))
        if not present:
            return True
        found_inf = self.__dict__.get("found_inf")  # GradScaler sets them for the time of a step
        grad_scale = self.__dict__.get("grad_scale")
        deferring = self._deferred is not None or (
            self._may_defer and (self._capturable or found_inf is not None)
        )
        scale = 1.0
        if deferring:
            plan.update(scale, lr_on_device=self._capturable)
            if self._deferred is None:
                self._deferred = self._defer(plan)
        elif found_inf is not None and found_inf.item() != 0:
            return True
        else:
            scale = 1.0 if grad_scale is None else float(grad_scale.item())
            plan.sample(self._steps + 1)
            plan.update(scale)
        if plan.starting or self.backend == "reference":
            if not all(checks.fit(table, grads, self.param_groups) for table, _, grads in gathered):
                return False
            for table, _, grads in gathered:
                self._start(plan, table, grads)
            plan.starting = False
        if self._deferred is not None:
            if not self._launch_deferred(plan, gathered, grad_scale, found_inf):
                return False
        else:
            for table, backend, grads in gathered:
                if not self._launch(plan, table, backend.step, grads):
                    return False
            self._steps += 1
            plan.commit()
        for table, _, grads in gathered:
            self._finish(plan, table, grads, absent, scale)
        return True

    def _start(self, plan: Plan, table: flat.Table, grads: Grads) -> None:
        """Gives parameters the state they come to need; momentum's absence marks its first step."""
        averages: dict[int, Tensor | None] = {}
        momentum: dict[int, Tensor | None] = {}
        table.lacking = []
        if any(
            plan.groups[group].buffered(p) and "average" not in self.state.get(p, {})
            for p, group in zip(table.params, table.groups, strict=True)
        ):
            self._settle()
        for i, p in enumerate(table.params):
            group = plan.groups[table.groups[i]]
            held = self.state[p] if group.policy is not None else self.state.get(p, {})
            if group.buffered(p) and "average" not in held:
                averages[i] = p.detach() if group.n_averaged > 0 else None
            if group.has_momentum and "momentum_buffer" not in held:
                if grads[i] is None:
                    table.lacking.append(i)
                else:
                    momentum[i] = None
                    if self._deferred is None:  # else its mark says it
                        table.set_row(i, group.row(first=True))
                        table.first.append(i)
                    if self.rule is rules.rsgdm_implicit:
                        group.beta = float(group.group["momentum"])
        self._attach(plan, table, "average", averages)
        for stream in self.streams:
            self._attach(plan, table, stream, momentum)
        self._known_size = len(self.state)

    def _launch(
        self,
        plan: Plan,
        table: flat.Table,
        step: ops.Step,
        grads: Grads,
        deferred: Deferred | None = None,
    ) -> bool:
        """Steps one table. False, with nothing changed, where a parameter was converted."""
        for param, memory in table.copies:
            memory.copy_(param)
        tables = (table.memory, grads, table.state, *table.tensors(), *plan.tensors)
        try:
            step(*tables, deferred=deferred)
        except RuntimeError:
            if not checks.fit(table, grads, self.param_groups):  # or it says what is wrong
                return False
            step(*tables, deferred=deferred)
        for param, memory in table.copies:
            param.copy_(memory)
        return True

    # ---- counters on the device ----------------------------------------------------------------

    def _defer(self, plan: Plan) -> dict[torch.device, Deferred]:
        """Hands the counters over to the devices, for as long as the tables stay as they are."""
        plan.sample(self._steps + 1)
        started: dict[torch.device, list[bool]] = {}
        for table, _ in self._launches:
            started.setdefault(table.params[0].device, []).extend(
                "momentum_buffer" in self.state.get(p, {}) for p in table.params
            )
        samplings = plan.tensors[1]
        return {
            device: Deferred.of(plan.samplers, samplings, self._steps, marks, device)
            for device, marks in started.items()
        }

    def _launch_deferred(
        self,
        plan: Plan,
        gathered: list[Gathered],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """Steps all tables and lets each device count, or not: nothing waits for it here."""
        assert self._deferred is not None
        lrs: list[Tensor | None] = [None] * len(plan.groups)
        if self._capturable:
            lrs = [rules.lr_on_device(group.group) for group in plan.groups]
        first = dict.fromkeys(self._deferred, 0)  # segment of a device's next table
        counting = {}
        for device, deferred in self._deferred.items():
            counting[device] = deferred.for_step(lrs, grad_scale, found_inf)
        for table, backend, grads in gathered:
            device, count = table.params[0].device, len(table.params)
            own = counting[device].of_segments(first[device], count)
            first[device] += count
            if not self._launch(plan, table, backend.step, grads, own):
                return False
            for p, g in zip(table.params, grads, strict=True):
                if grad_scale is not None and g is not None and g is not p.grad:
                    assert p.grad is not None
                    p.grad.copy_(g)  # unscaled in a copy of the parameter's layout
        for device, deferred in counting.items():
            advance = next(b.advance for t, b in self._launches if t.params[0].device == device)
            assert advance is not None
            advance(deferred)
        return True

    def _settle(self) -> list[Tensor]:
        """Reads the device's counters, if it counts. Returns parameters whose momentum buffers have
        not had their first step, since all steps so far were skipped."""
        if self._deferred is None or self._plan is None:
            return []
        deferred = next(iter(self._deferred.values()))
        self._steps, *samples = deferred.counts.tolist()
        for sampler, n_averaged in zip(self._plan.samplers, samples, strict=True):
            sampler.n_averaged = n_averaged
        waiting = []
        marks = {device: d.marks[:, 0].tolist() for device, d in self._deferred.items()}
        for table, _ in self._launches:
            for p in table.params:
                if not marks[p.device].pop(0) and p.numel() > 0:
                    waiting.append(p)
        return waiting

    def _writes_back(self, group: GroupPlan, param: Tensor) -> bool:
        """Whether this step may write the average to a parameter that has no gradient."""
        if self._deferred is not None:
            return group.policy is not None and group.policy.write_back_every > 0
        return group.sampler.written_back and group.buffered(param)

    def _finish(
        self, plan: Plan, table: flat.Table, grads: Grads, absent: bool, scale: float
    ) -> None:
        """After the kernel: first-step marks, versions, unscaled gradients."""
        for i in table.first:
            group = plan.groups[table.groups[i]]
            table.set_row(i, group.row(first=False))
        table.first = []
        written = table.params
        if absent:
            written = [
                p
                for p, g, group in zip(written, grads, table.groups, strict=True)
                if g is not None or self._writes_back(plan.groups[group], p)
            ]
        increment_version(written)
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in written if p.grad is not None], 1.0 / scale)

    # ---- averaged weights ----------------------------------------------------------------------

    @property
    def n_averaged(self) -> int:
        """Samples in the average, of the group that has most."""
        self._settle()
        return max((n_averaged for n_averaged, _ in self._counters()), default=0)

    def averaged(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """The averaged weights are live inside the context, the training weights again after it.

        Contents are exchanged, not addresses, and come back exactly, also after an exception.
        Inside, ``step``, ``load_state_dict`` and ``add_param_group`` raise and ``state_dict()``
        returns the training state. Parameters without an average so far stay as they are, as do
        those whose average is the parameter itself. Of nested contexts the outermost acts.

        Args:
            model: not needed for plain parameters.

        Example:
            >>> with opt.averaged():
            ...     evaluate(model)
        """
        return evaluate.averaged(self)

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """A plain state dict of the model holding the averaged weights, in the weights' dtypes.

        Buffers are the model's own; every tensor is a copy.
        """
        return evaluate.averaged_state_dict(self, model)

    def _refuse_inside_averaged(self, what: str) -> None:
        if self._evaluating is not None:
            raise RuntimeError(f"{what}() inside averaged(), where the averaged weights are live")

    # ---- checkpoints ---------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch.optim.SGD; tensors are copied.

        Raises:
            ValueError: for another rule, another kind of policy, write-back, ``initial`` or dtype,
                other shapes or groups. The optimizer is as it was then.
        """
        self._refuse_inside_averaged("load_state_dict")
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_averaged("pickle or deepcopy")
        self._settle()
        return {
            **super().__getstate__(),
            "_backend_name": self._backend_name,
            "_flatten": self._flatten,
            "_capturable": self._capturable,
            "_steps": self._steps,
            "counters": self._counters(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        counters = state.pop("counters")
        super().__setstate__(state)
        self.register_state_dict_post_hook(checkpoint.export)
        self._build(self.param_groups, self._flatten, counters)
