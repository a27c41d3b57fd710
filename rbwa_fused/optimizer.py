"""FusedSGD and RSGDM: param groups, state, and the step that hands both to a kernel.

`FusedOptimizer._update` is the data path: gradients are gathered, the rows of the coefficient
table brought up to date (rules.py, average.py), and one call of the backend (ops.py) steps every
parameter of a device. Buffers and tables are flat.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer, optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from rbwa_fused import checkpoint, checks, evaluate, flat, ops, rules
from rbwa_fused.average import Average, weight_of

# Rows of the coefficient table for each param group: the usual one and that of a parameter's first
# step with momentum, for averages with a buffer and for averages that are the parameter itself.
ROWS_PER_GROUP = 4

MOMENTUM_STREAMS = ("momentum_buffer",)
EXPLICIT_STREAMS = ("momentum_buffer", "difference_buffer", "previous_gradient")
NONE = type(None)


class GroupState:
    """What belongs to a param group beside its hyperparameters."""

    def __init__(self, group: dict[str, Any], index: int) -> None:
        self.group = group
        self.index = index
        self.policy: Average | None = group["average"]
        dtypes = {p.dtype for p in group["params"]}
        self.elisions = [False]
        if self.policy is not None:
            self.elisions = sorted({self.policy.elided_for(d) for d in dtypes} or {False})
        self.n_averaged = 0
        self.next_n_averaged = 0
        self.beta: float | None = None  # of implicit RSGDM, fixed at the group's first step
        self.has_momentum = False
        self.takes_current = False  # this step starts the average at the weights before it
        self.lr = 0.0
        self.rule_inputs: tuple[Any, ...] | None = None  # what the rows hold, in two parts
        self.sampling: tuple[float, bool, bool] | None = None

    def elided(self, param: Tensor) -> bool:
        """Whether the average of a parameter is the parameter itself."""
        return self.policy is not None and self.policy.elided_for(param.dtype)

    def buffered(self, param: Tensor) -> bool:
        """Whether a parameter has an average in a buffer of its own."""
        return self.policy is not None and not self.policy.elided_for(param.dtype)


class FusedOptimizer(Optimizer):
    """Base of FusedSGD and RSGDM: everything but the rule and its hyperparameters.

    A subclass gives a ``rule`` (rules.py), the name under which checkpoints remember it, the
    state that it keeps, and the group's ``hyperparameters`` that go into a row.
    """

    rule: rules.Rule
    rule_name: str
    streams: tuple[str, ...] = MOMENTUM_STREAMS
    hyperparameters: Callable[[dict[str, Any]], tuple[Any, ...]]
    # GradScaler sets these on the instance for the time of a step.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True
    _built = False
    _evaluating: evaluate.Exchange | None = None

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], backend: str, flatten: bool, capturable: bool
    ) -> None:
        self._backend_name = backend
        self._flatten = flatten
        self._capturable = capturable
        self._steps = 0
        self._check_hyperparameters(defaults)
        self._check_average(defaults)
        super().__init__(params, defaults)
        self._build()

    # ---- param groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its average starts with its own first sample. See torch.optim.Optimizer."""
        self._refuse_inside_averaged("add_param_group")
        if isinstance(param_group, dict):
            members = param_group["params"]
            if not isinstance(members, Tensor | set):
                param_group["params"] = members = list(members)
                tensors = [m[1] if isinstance(m, tuple) else m for m in members]
                if len({id(t) for t in tensors}) != len(tensors):
                    raise ValueError(
                        "optimizer contains a parameter group with duplicate parameters"
                    )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if self._built:
                for p in group["params"]:
                    ops.choose(self._backend_name, p.device)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._built:
            self._add_groups([group], move=self._flatten)

    def _check_group(self, group: dict[str, Any]) -> None:
        checks.params(group)
        self._check_hyperparameters(group)
        self._check_average(group)
        if group["average"] is not None:
            for p in group["params"]:
                group["average"].dtype_for(p.dtype)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        rules.check(group)

    def _check_average(self, group: dict[str, Any]) -> None:
        if group["average"] is False:
            group["average"] = None
        policy = group["average"]
        if policy is not None and not isinstance(policy, Average):
            raise TypeError(
                f"Invalid average: {policy!r} (expected an rbwa_fused policy, None or False)"
            )
        if policy is not None and policy.custom and self._capturable:
            raise ValueError(
                f"Invalid average: {policy!r} with capturable=True (a custom weight runs on the "
                "host; a captured step cannot call it)"
            )

    # ---- buffers and tables --------------------------------------------------------------------

    def _build(self) -> None:
        """Makes tables, buffers and rows for the groups, and takes over the state there is."""
        self._tables: dict[tuple[torch.device, int], flat.Table] = {}
        self._groups: list[GroupState] = []
        self._row_bytes = bytearray()
        self._starting = True
        self._built = True
        self._add_groups(self.param_groups, move=self._flatten)

    def _rebuild(self) -> None:
        """Follows parameters that were converted, and state that was replaced."""
        kept = self._groups
        self._tables = {}
        self._groups = []
        self._row_bytes = bytearray()
        self._add_groups(self.param_groups, move=False, kept=kept)

    def _add_groups(
        self, groups: list[dict[str, Any]], move: bool, kept: list[GroupState] | None = None
    ) -> None:
        for group in groups:
            state = GroupState(group, len(self._groups))
            if kept is not None:
                old = kept[state.index]
                state.n_averaged, state.beta = old.n_averaged, old.beta
            self._groups.append(state)
        known = [p for table in self._tables.values() for p in table.params]
        new = [p for group in groups for p in group["params"]]
        turns, alone = flat.turns(known + new)
        turn = dict(zip(known + new, turns, strict=True))
        if move:
            apart = [p for p, own in zip(new, alone[len(known) :], strict=True) if own]
            flat.move([p for p in apart if flat.may_move(p)])
        for state in self._groups[-len(groups) :]:
            for index, p in enumerate(state.group["params"]):
                key = (p.device, turn[p])
                table = self._tables.setdefault(key, flat.Table())
                table.add(p, state.index, index)
                table.set_row(len(table.params) - 1, self._row(state, p, first=False))
        grown = len(self._groups) * ROWS_PER_GROUP * rules.ROW_BYTES - len(self._row_bytes)
        self._row_bytes = self._row_bytes + bytearray(grown)
        rows = torch.frombuffer(self._row_bytes, dtype=torch.float64)
        self._rows = rows.reshape(-1, rules.ROW_BYTES // 8)
        self._launches = []
        for (device, _), table in sorted(self._tables.items(), key=lambda item: item[0][1]):
            self.backend, step = ops.choose(self._backend_name, device)
            self._launches.append((table, step))
        self._take_over_state({id(p) for p in new})
        self._starting = True

    def _take_over_state(self, new: set[int]) -> None:
        for table in self._tables.values():
            segments = [i for i, p in enumerate(table.params) if id(p) in new]
            for stream in flat.STREAMS:
                held = {i: self.state[p] for i in segments if (p := table.params[i]) in self.state}
                values = {i: s[stream] for i, s in held.items() if s.get(stream) is not None}
                if values:
                    self._attach(table, stream, values)
        for state in self._groups:
            averages = [p for p in state.group["params"] if "average" in self.state.get(p, {})]
            if not averages and any(state.buffered(p) for p in state.group["params"]):
                state.n_averaged = 0
        self._known_state = self.state
        self._known_size = len(self.state)

    def _attach(self, table: flat.Table, stream: str, values: dict[int, Tensor | None]) -> None:
        dtypes = {}
        if stream == "average":
            for i in values:
                policy = self._groups[table.groups[i]].policy
                dtypes[i] = policy.dtype_for(table.params[i].dtype) if policy else torch.float32
        for i, view in table.attach(stream, values, dtypes).items():
            self.state[table.params[i]][stream] = view
        self._known_size = len(self.state)

    def _row(self, state: GroupState, param: Tensor, first: bool) -> int:
        return ROWS_PER_GROUP * state.index + 2 * state.elided(param) + first

    # ---- the step ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step: the update and the average in one pass.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.
        """
        if torch.compiler.is_compiling() or (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
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
            self._update()
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    # torch's wrapper runs the hooks and tells the profiler; it stands in the way of every step,
    # so it is taken only when somebody watches (15 of 57 us a step are the wrapper's in torch).
    _observed_step = torch._disable_dynamo(Optimizer.profile_hook_step(_step))

    def _update(self) -> None:
        """Gather, plan, launch, count; nothing is changed before everything is checked."""
        if self.state is not self._known_state or len(self.state) != self._known_size:
            self._follow_state()
        gathered = []
        absent = present = False
        starting = len(self._tables) > 1
        for table, run in self._launches:
            grads = [p.grad for p in table.params]
            kinds = set(map(type, grads))
            absent = absent or NONE in kinds
            present = present or len(kinds) > 1 or (NONE not in kinds and bool(kinds))
            if table.lacking and any(grads[i] is not None for i in table.lacking):
                starting = True
            gathered.append((table, run, grads))
        if not present or (self.found_inf is not None and self.found_inf.item() != 0):
            return
        step = self._steps + 1
        scale = 1.0 if self.grad_scale is None else float(self.grad_scale.item())
        self._plan(step, scale, starting)
        if starting or self._starting or self.backend == "reference":
            for table, _, grads in gathered:
                if not checks.fit(table, grads, self.param_groups):
                    return self._follow_params()
            for table, _, grads in gathered:
                self._start(table, grads)
        for state in self._groups:
            if state.takes_current:
                self._sample_current(state)
        for table, run, grads in gathered:
            if not self._launch(table, run, grads):
                return self._follow_params()
        self._steps = step
        for state in self._groups:
            state.n_averaged = state.next_n_averaged
        for table, _, grads in gathered:
            self._finish(table, grads, absent, scale)

    def _plan(self, step: int, scale: float, starting: bool) -> None:
        """Brings the rows up to date with the hyperparameters and the average's schedule."""
        starting = starting or self._starting
        for state in self._groups:
            policy = state.policy
            n = state.n_averaged
            w, sample, write_back = 1.0, False, False
            state.takes_current = False
            if policy is not None and step > policy.start:
                if n == 0 and policy.initial == "current":
                    state.takes_current = True
                    n = 1
                if policy.due(step):
                    sample = True
                    w = weight_of(policy.weight, n, step)
                    write_back = policy.written_back(step)
                    n += 1
            state.next_n_averaged = n
            inputs = (*self.hyperparameters(state.group), scale, starting)
            if inputs != state.rule_inputs:
                self._pack_rule(state, inputs)
            sampling = (w, sample, write_back)
            if sampling != state.sampling:
                self._pack_sampling(state, sampling)

    def _pack_rule(self, state: GroupState, inputs: tuple[Any, ...]) -> None:
        """Lines (1)-(3) of a group's rows, whenever a hyperparameter has changed."""
        *hyperparameters, scale, starting = inputs
        group = state.group
        self._check_hyperparameters(group)
        momentum = float(group["momentum"])
        if state.beta is not None and momentum != state.beta:
            raise ValueError(
                f"Invalid momentum value: {momentum} (implicit RSGDM holds for a constant momentum "
                f'only, and this group started with {state.beta}; use difference="explicit")'
            )
        if state.has_momentum != (momentum != 0.0):
            state.has_momentum = momentum != 0.0
            self._starting = starting = True
        state.lr = float(group["lr"])
        s = (-1.0 if group["maximize"] else 1.0) / scale
        decay = float(group["weight_decay"])
        for first in (False, True) if starting else (False,):
            coefficients = self.rule(group, first)
            for elided in state.elisions:
                row = ROWS_PER_GROUP * state.index + 2 * elided + first
                at = row * rules.ROW_BYTES
                rules.RULE.pack_into(self._row_bytes, at, s, decay, *coefficients)
        # A tensor may change its value in place: such rows are packed at every step.
        state.rule_inputs = None if any(isinstance(v, Tensor) for v in hyperparameters) else inputs
        state.sampling = None

    def _pack_sampling(self, state: GroupState, sampling: tuple[float, bool, bool]) -> None:
        """The learning rate and lines (4)-(5). Where the average is the parameter itself, the
        sample's weight multiplies the learning rate and that is all (docs/equivalences.md)."""
        w, sample, write_back = sampling
        for elided in state.elisions:
            tail = (state.lr * w, 1.0, 0.0, 0.0) if elided else (state.lr, w, sample, write_back)
            for first in (0, 1):
                row = ROWS_PER_GROUP * state.index + 2 * elided + first
                at = row * rules.ROW_BYTES + rules.RULE.size
                rules.SAMPLING.pack_into(self._row_bytes, at, *tail)
        state.sampling = sampling

    def _start(self, table: flat.Table, grads: list[Tensor | None]) -> None:
        """Gives parameters the state they come to need; momentum's absence marks its first step."""
        self._starting = False
        averages: dict[int, Tensor | None] = {}
        momentum: dict[int, Tensor | None] = {}
        table.lacking = []
        for i, p in enumerate(table.params):
            group = self._groups[table.groups[i]]
            held = self.state.get(p, {})
            if group.buffered(p) and "average" not in held:
                averages[i] = p.detach() if group.n_averaged > 0 else None
            if group.has_momentum and "momentum_buffer" not in held:
                if grads[i] is None:
                    table.lacking.append(i)
                else:
                    momentum[i] = None
                    table.set_row(i, self._row(group, p, first=True))
                    table.first.append(i)
        self._attach(table, "average", averages)
        for stream in self.streams:
            self._attach(table, stream, momentum)

    def _launch(self, table: flat.Table, run: ops.Step, grads: list[Tensor | None]) -> bool:
        """Steps one table. False, with nothing changed, where a parameter was converted."""
        for param, memory in table.copies:
            memory.copy_(param)
        for attempt in (1, 2):
            segments, shapes = table.tensors()
            try:
                run(table.memory, grads, table.state, segments, shapes, self._rows)
                return True
            except RuntimeError:
                if not checks.fit(table, grads, self.param_groups):  # or it says what is wrong
                    return False
                if attempt == 2:
                    raise
        return True

    def _finish(
        self, table: flat.Table, grads: list[Tensor | None], absent: bool, scale: float
    ) -> None:
        """After the kernel: first-step marks, versions, copies, unscaled gradients."""
        for i in table.first:
            group = self._groups[table.groups[i]]
            table.set_row(i, self._row(group, table.params[i], first=False))
            if self.rule is rules.rsgdm_implicit:
                group.beta = float(group.group["momentum"])
        table.first = []
        for param, memory in table.copies:
            param.copy_(memory)
        written = table.params
        if absent:
            written = [p for p, g in zip(written, grads, strict=True) if g is not None]
        increment_version(written)
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in written if p.grad is not None], 1.0 / scale)

    def _sample_current(self, state: GroupState) -> None:
        for p in state.group["params"]:
            if state.buffered(p):
                self.state[p]["average"].copy_(p)

    def _follow_params(self) -> None:
        self._rebuild()
        self._update()

    def _follow_state(self) -> None:
        if not self.state:  # cleared: averages start again too
            for state in self._groups:
                if any(state.buffered(p) for p in state.group["params"]):
                    state.n_averaged = 0
        self._rebuild()

    # ---- averaged weights ----------------------------------------------------------------------

    @property
    def n_averaged(self) -> int:
        """Samples in the average, of the group that has most."""
        return max((state.n_averaged for state in self._groups), default=0)

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

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """A plain state dict of the model holding the averaged weights, in the weights' dtypes.

        Buffers are the model's own; every tensor is a copy.
        """
        return evaluate.averaged_state_dict(self, model)

    def _refuse_inside_averaged(self, what: str) -> None:
        if self._evaluating is not None:
            raise RuntimeError(f"{what}() inside averaged(), where the averaged weights are live")

    # ---- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's: tensors and primitives under ``state`` and
        ``param_groups``; each group also holds its counters, rule and the policy's repr."""
        with checkpoint.exported(self):
            return super().state_dict()

    @torch._disable_dynamo
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
        return {
            **super().__getstate__(),
            "_backend_name": self._backend_name,
            "_flatten": self._flatten,
            "_capturable": self._capturable,
            "_steps": self._steps,
            "_counters": [(state.n_averaged, state.beta) for state in self._groups],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        counters = state["_counters"]
        super().__setstate__({k: v for k, v in state.items() if k != "_counters"})
        self._build()
        for group, (n_averaged, beta) in zip(self._groups, counters, strict=True):
            group.n_averaged, group.beta = n_averaged, beta


class FusedSGD(FusedOptimizer):
    r"""torch.optim.SGD with the weight average in the same pass over memory.

    .. math::
        g \leftarrow g + \lambda	heta, \quad m \leftarrow \mu m + (1-	au) g, \quad
        x \leftarrow 	heta - \eta m, \quad a \leftarrow a + w (x - a), \quad
        	heta \leftarrow a 	ext{ or } x

    Without ``average`` it does what ``torch.optim.SGD`` does, and its arguments, defaults and
    errors are torch's. Parameters move into flat buffers at construction: build the optimizer
    after ``model.to(device)`` and before capturing or compiling.

    Args:
        params: float32, float64, bfloat16 or float16 parameters, named ones, or groups of them.
        lr (float or 1-element Tensor, >= 0): learning rate (default: 1e-3).
        momentum (float, >= 0): momentum factor (default: 0).
        dampening (float): of all but a parameter's first step with momentum (default: 0).
        weight_decay (float, >= 0): L2 penalty, coupled (default: 0).
        nesterov (bool): needs a momentum and no dampening (default: False).
        maximize (bool): ascend (default: False).
        average (Average, optional): a policy such as ``rbwa_fused.ema()``; a group may have its
            own, or False for none (default: None).
        backend (str): "auto", "cpu" or "reference" (default: "auto").
        flatten (bool): move parameters into flat buffers; the results are the same bits either
            way (default: True).
        capturable (bool): promise that nothing in ``step`` needs the host; refuses custom weights
            (default: False).

    Raises:
        ValueError, TypeError: naming the argument and the value received.
        RuntimeError: for a backend that is not built.

    Example:
        >>> opt = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rbwa_fused.ema(0.999))
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
        >>> opt.zero_grad()
        >>> with opt.averaged():
        ...     evaluate(model)
    """

    rule = staticmethod(rules.sgd)
    rule_name = "sgd"
    hyperparameters = itemgetter(
        "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        average: Average | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "average": average,
        }
        super().__init__(params, defaults, backend, flatten, capturable)


class RSGDM(FusedOptimizer):
    r"""SGD with momentum that corrects its lag by the gradient's difference (the RSGDM paper).

    .. math::
        m_t = eta m_{t-1} + (1-eta) g_t, \quad
        z_t = eta z_{t-1} + (1-eta)(g_t - g_{t-1}), \quad
        	heta \leftarrow 	heta - \eta (m_t + eta z_t), \quad z_1 = 0

    Args:
        params: as FusedSGD's.
        lr (float or 1-element Tensor, >= 0): learning rate (default: 0.01).
        momentum (float, 0 <= beta < 1): decay of both averages (default: 0.9).
        weight_decay (float, >= 0): L2 penalty, coupled (default: 0).
        difference (str, optional): "implicit" keeps one buffer and asks for a constant momentum
            (docs/equivalences.md); "explicit" keeps the paper's three; None is the paper's SGDM
            baseline without the difference (default: "implicit").
        maximize, average, backend, flatten, capturable: as FusedSGD's.

    Raises:
        ValueError: also where ``momentum`` changes after the first step under "implicit".
    """

    hyperparameters = itemgetter("lr", "momentum", "weight_decay", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        difference: Literal["implicit", "explicit"] | None = "implicit",
        maximize: bool = False,
        average: Average | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
    ) -> None:
        if difference not in ("implicit", "explicit", None):
            raise ValueError(
                f"Invalid difference: {difference!r} (expected 'implicit', 'explicit' or None)"
            )
        self._difference = difference
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "average": average,
        }
        super().__init__(params, defaults, backend, flatten, capturable)

    @property
    def rule(self) -> rules.Rule:  # type: ignore[override]
        return {
            "implicit": rules.rsgdm_implicit,
            "explicit": rules.rsgdm_explicit,
            None: rules.sgdm,
        }[self._difference]

    @property
    def rule_name(self) -> str:  # type: ignore[override]
        return "sgdm" if self._difference is None else f"rsgdm_{self._difference}"

    @property
    def streams(self) -> tuple[str, ...]:  # type: ignore[override]
        return EXPLICIT_STREAMS if self._difference == "explicit" else MOMENTUM_STREAMS

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        rules.check_beta(group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_difference": self._difference}
