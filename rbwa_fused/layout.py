"""What lies where and who counts it: param groups, segment tables, state, counters.

The first half of FusedOptimizer (fused.py); the step is the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from rbwa_fused import adopted, checkpoint, rules, streams
from rbwa_fused.engine import backends, checks, memory, segments
from rbwa_fused.engine.counters import Deferred
from rbwa_fused.engine.rows import GroupPlan, Plan
from rbwa_fused.engine.sharded import is_flattened, kind_of_shard, local, shard_of
from rbwa_fused.in_backward import MIDWAY, InBackward
from rbwa_fused.swap import Swap

Group = dict[str, Any]
Counters = list[tuple[int, float | None]]  # of each group: samples, beta of implicit RSGDM


class LaidOut(Optimizer):
    """An optimizer whose parameters and state are segments of tables that a kernel takes.

    Attributes:
        rule, rule_name, streams, hyperparameters: what a subclass gives, see FusedOptimizer.
        backend: the name of what runs.
    """

    rule: rules.Rule
    rule_name: str
    streams: tuple[str, ...] = ("momentum_buffer",)
    hyperparameters: Callable[[Group], tuple[Any, ...]]
    _step_supports_amp_scaling = True
    _plan: Plan | None = None
    _warned = False  # that the reference runs
    # What a state without them, such as torch.optim.Optimizer's, is taken for.
    _backend_name = "auto"
    _flatten = True
    _capturable = _master_weights = _in_backward = False
    _steps = 0
    _evaluating: Swap | None = None  # inside averaged(), or after one that could not be undone
    _deferred: dict[torch.device, Deferred] | None = None  # where the host does not count
    _early: InBackward | None = None  # the hooks that step inside the backward pass

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        backend: str,
        flatten: bool,
        capturable: bool,
        master_weights: bool,
        in_backward: bool,
    ) -> None:
        if in_backward and capturable:
            raise ValueError("capturable=True does not go with in_backward=True")
        self._weak_self = weakref.ref(self)
        self._backend_name = backend
        self._flatten = flatten
        self._capturable = capturable
        self._master_weights = master_weights
        self._in_backward = in_backward
        self._early = InBackward(self) if in_backward else None
        self._steps = 0
        self._check_hyperparameters(defaults)
        checks.average(defaults, capturable)
        super().__init__(params, {**defaults, **dict.fromkeys(checkpoint.OURS)})
        self.register_state_dict_post_hook(checkpoint.export)
        self._build(self.param_groups, move=flatten)

    @property
    def _itself(self) -> Any:
        """The optimizer behind a wrapper that takes on its class, as Lightning's do: such a wrapper
        finds the class's attributes before the optimizer's, and keeps what is assigned to it."""
        itself = self._weak_self()
        assert itself is not None
        return itself

    # ---- param groups, tables, state -----------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its average starts with its own first sample. See torch.optim.Optimizer."""
        if self is not self._itself:
            self._itself.add_param_group(param_group)
            return
        self._refuse_inside_averaged("add_param_group")
        self._refuse_midway("add_param_group")
        checks.duplicates(param_group)
        if self._plan is not None and (
            self._deferred is not None  # the host counts again, so that the group is counted in
            or self.state is not self._known_state
            or len(self.state) != self._known_size
        ):
            self._rebuild()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_hyperparameters(group)
            rules.implementation(*map(group.get, ("foreach", "differentiable", "fused")))
            checks.average(group, self._capturable)
            checks.params(group, self._master_weights)
            kind = kind_of_shard(group["params"])
            if self._in_backward and kind is not None:
                raise ValueError(f"in_backward=True does not go with {kind} parameters")
            if any(map(is_flattened, group["params"])):
                # FSDP1's scaler tells the other ranks of an overflow in its unscale_(), which it
                # leaves out for who unscales by himself.
                self._step_supports_amp_scaling = False
            for device in {p.device for p in group["params"]}:
                backends.choose(self._backend_name, device)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._plan is not None:
            self._add(self._plan, [group], move=self._flatten)

    @classmethod
    def _check_hyperparameters(cls, group: Group) -> None:
        rules.check(group)

    # dynamo cannot follow a table's making; torch hides its own `add_param_group` from it, too.
    @torch._disable_dynamo
    def _build(self, groups: list[Group], move: bool, counters: Counters | None = None) -> None:
        """Makes tables and rows anew and takes over the state and the counters there are."""
        self._plan = plan = Plan(
            self.rule, self._check_hyperparameters, self.hyperparameters, self._master_weights
        )
        self._deferred = None
        self._tables: dict[tuple[torch.device, int], segments.Segments] = {}
        self._add(plan, groups, move, counters)

    @torch._disable_dynamo
    def _add(
        self, plan: Plan, groups: list[Group], move: bool, counters: Counters | None = None
    ) -> None:
        known = [p for table in self._tables.values() for p in table.params]
        known_turns = [turn for (_, turn), table in self._tables.items() for _ in table.params]
        new = [p for group in groups for p in group["params"]]
        turns, alone = memory.launch_order(known + new, known_turns)
        if self._early is not None:  # a launch for each parameter
            turns = list(range(len(turns)))
        turn_of = dict(zip(known + new, turns, strict=True))
        if move:
            memory.move([p for p, own in zip(new, alone[len(known) :], strict=True) if own])
        for group, counted in zip(groups, counters or [(0, None)] * len(groups), strict=True):
            group_plan = plan.add(group, *counted)
            for index, p in enumerate(group["params"]):
                table = self._tables.setdefault((p.device, turn_of[p]), segments.Segments())
                row, sampling = group_plan.row(first=False), group_plan.sampling(p)
                table.add(p, group_plan.index, index, row, sampling)
        self.backend = (
            backends.choose(self._backend_name, torch.device("cpu")).name if not new else ""
        )
        self._launches: list[tuple[segments.Segments, backends.Backend]] = []
        for (device, _), table in self._tables.items():  # each turn's is made after those before it
            backend = backends.choose(self._backend_name, device)
            self.backend = backend.name
            self._launches.append((table, backend))
            if self.backend == "reference" and self._backend_name == "auto" and not self._warned:
                self._warned = True
                backends.warn_of_reference(device)
            self._take_over_state(plan, table, set(new))
        custom = any(p.policy is not None and p.policy.custom for p in plan.groups)
        self._may_defer = not custom and all(b.advance is not None for _, b in self._launches)
        self._kernels_check = all(backend.checks for _, backend in self._launches)
        plan.starting = True
        self._known_state, self._known_size = self.state, len(self.state)
        if self._early is not None:
            owners = {p for p, own in zip(known + new, alone, strict=True) if own}
            self._early.attach(self._launches, owners)

    def _take_over_state(self, plan: Plan, table: segments.Segments, new: set[Tensor]) -> None:
        for stream in streams.STREAMS:
            values: dict[int, Tensor | None] = {}
            for i, p in enumerate(table.params):
                held = self.state.get(p, {}) if p in new else {}
                group = plan.groups[table.groups[i]]
                gone = {"average": not group.buffered(p), "master_param": not group.mastered(p)}
                if gone.get(stream):
                    held.pop(stream, None)  # a conversion has made the parameter that itself
                if held.get(stream) is not None:
                    values[i] = shard_of(held[stream], p)
            self._attach(plan, table, stream, values)

    def _attach(
        self, plan: Plan, table: segments.Segments, stream: str, values: dict[int, Tensor | None]
    ) -> None:
        dtypes = {i: plan.groups[table.groups[i]].dtype_of(stream, table.params[i]) for i in values}
        for i, view in table.attach(stream, values, dtypes).items():
            self.state[table.params[i]][stream] = view

    def _rebuild(self, counters: Counters | None = None) -> None:
        """Follows parameters that were converted, and state that was replaced."""
        for group in self.param_groups:
            if type(group.get("average", "")) is str:  # put in place from outside
                group.update(adopted.complete(self, group))
            checks.average(group, self._capturable)
            checks.params(group, self._master_weights)
            checks.state(group, self.state)
        waiting = self._settle()
        if counters is None and self._steps == 0:
            if self._deferred is None:
                checkpoint.refuse_uncounted(self.state)
            for held in self.state.values():  # all steps so far were skipped
                held.pop("average", None)
        counters = counters or self._counters()
        for p in waiting:
            for stream in self.streams:
                self.state.get(p, {}).pop(stream, None)
        self._build(self.param_groups, move=False, counters=counters)

    def _describes(self, plan: Plan) -> bool:
        """Whether the plan is of the groups that there are, with the parameters in them."""
        return len(plan.groups) == len(self.param_groups) and all(
            map(GroupPlan.describes, plan.groups, self.param_groups)
        )

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
                # No kernel marks what is empty; but before the first step nothing can have started.
                if not marks[p.device].pop(0) and (local(p).numel() > 0 or self._steps == 0):
                    waiting.append(p)
        return waiting

    def _writes_back(self, group: GroupPlan, param: Tensor) -> bool:
        """Whether this step may write the average to a parameter that has no gradient."""
        if self._deferred is not None:
            return group.policy is not None and group.policy.write_back_every > 0
        return group.sampler.written_back and group.buffered(param)

    def _refuse_inside_averaged(self, what: str) -> None:
        if self._evaluating is not None:
            self._evaluating.refuse(what)

    def _refuse_midway(self, what: str) -> None:
        if self._early is not None and self._early.stepped is not None:
            raise RuntimeError(f"{what}() {MIDWAY}")
