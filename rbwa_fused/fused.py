"""FusedOptimizer: the step that hands parameters, gradients and tables to a kernel.

`_update` is the data path: gradients are gathered, the rows of the coefficient tables brought up
to date (engine/rows.py), and one call of the backend (engine/backends.py) steps every parameter of
a device. What the tables hold is layout.py's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rbwa_fused import adopted, checkpoint, evaluate, rules
from rbwa_fused.engine import backends, checks, segments
from rbwa_fused.engine.counters import Deferred
from rbwa_fused.engine.rows import Plan
from rbwa_fused.engine.sharded import local
from rbwa_fused.in_backward import InBackward
from rbwa_fused.layout import LaidOut

Grads = list[Tensor | None]
Gathered = tuple[segments.Segments, backends.Backend, Grads]


class FusedOptimizer(LaidOut):
    """Base of FusedSGD and RSGDM: everything but the rule and its hyperparameters.

    A subclass gives a ``rule`` (rules.py), the name under which checkpoints remember it, the
    ``streams`` of state that it keeps, and the ``hyperparameters`` of a group that it reads.

    A parameter's first step with momentum passes through these hands: `_start` gives it a buffer
    and points its segment at the group's first-step row, the kernel runs, `_finish` points it back.
    A segment that is to have momentum or a master but has had no gradient yet waits in
    `table.lacking`.
    Where the device counts, its `marks` say all this instead (engine/counters.py).
    """

    _watched = False  # hooks and profiler are told of the step under way

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
            return self._observed_step(*(() if closure is None else (closure,)))
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch then leaves `step` unwrapped

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._refuse_inside_averaged("step")
        if self._early is not None:
            self._early.check(closure, self.__dict__.get("found_inf"))
        loss = None
        if closure is not None:
            loss = self._call(closure)
        grad_enabled = torch.is_grad_enabled()
        try:  # around the next line, too, behind which an interrupt may come
            torch._C._set_grad_enabled(False)
            while not self._update():
                self._rebuild()
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    def _call(self, closure: Callable[[], Any]) -> Any:
        """Runs a closure, in which no GradScaler is at work: it takes none. Lightning clips
        gradients in it, and refuses optimizers that unscale them. A step in it is one of its own.
        """
        before = self._step_supports_amp_scaling, self._watched
        self._step_supports_amp_scaling = self._watched = False
        try:
            with torch.enable_grad():
                return closure()
        finally:
            self._step_supports_amp_scaling, self._watched = before

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of a `step`, by which Optimizer wraps that of a subclass, too.

        It runs the hooks and tells the profiler. Around a step that calls super().step() it would
        do so once more for each class, so of nested ones only the outermost watches.
        """
        observed = Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if self._watched:
                return func(self, *args, **kwargs)
            self._watched = True
            try:
                return observed(self, *args, **kwargs)
            finally:
                self._watched = False

        return step

    # torch's wrapper would make a small step 40 % longer (docs/benchmarks.md), so it is taken only
    # when somebody watches.
    _observed_step = torch._disable_dynamo(profile_hook_step(_step))

    def _update(self) -> bool:
        """Gather, plan, launch, count. False, with nothing changed, where tables are outdated."""
        plan = self._plan
        assert plan is not None
        if self._early is not None and self._early.stepped is not None:
            self._early.finish(self, plan)
            return True
        if not self._up_to_date(plan):
            return False
        gathered: list[Gathered] = []
        absent = present = negated = False
        if len(self._tables) > 1:
            plan.starting = True
        for table, backend in self._launches:
            grads, some_absent, some_present, some_negated = (
                backends.described(table.gradients())
                if table.shards
                else backends.gradients(table.params)
            )
            absent = absent or some_absent
            present = present or some_present
            negated = negated or some_negated
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
        if plan.starting or negated or not self._kernels_check:
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

    def _up_to_date(self, plan: Plan) -> bool:
        """Whether groups and state are what the tables were made for."""
        if (
            self.state is not self._known_state
            or len(self.state) != self._known_size
            or not self._describes(plan)
        ):
            return False
        return all(table.holds_state() and table.holds_shards() for table, _ in self._launches)

    def _start(self, plan: Plan, table: segments.Segments, grads: Grads) -> None:
        """Gives parameters the state they come to need; momentum's absence marks its first step."""
        averages: dict[int, Tensor | None] = {}
        masters: dict[int, Tensor | None] = {}
        momentum: dict[int, Tensor | None] = {}
        table.lacking = []
        for i, p in enumerate(table.params):
            group = plan.groups[table.groups[i]]
            held = self.state[p] if group.policy is not None else self.state.get(p, {})
            if group.buffered(p) and "average" not in held:
                averages[i] = local(p).detach()
            moving = group.has_momentum and "momentum_buffer" not in held
            mastering = group.mastered(p) and "master_param" not in held
            if mastering and (grads[i] is not None or "momentum_buffer" in held):
                masters[i] = local(p).detach()
                mastering = False
            if grads[i] is None:
                if moving or mastering:
                    table.lacking.append(i)
            elif moving:
                momentum[i] = None
                if self._deferred is None:  # else its mark says it
                    table.set_row(i, group.row(first=True))
                    table.first.append(i)
                if self.rule is rules.rsgdm_implicit:
                    group.beta = float(group.group["momentum"])
        self._attach(plan, table, "average", averages)
        self._attach(plan, table, "master_param", masters)
        for stream in self.streams:
            self._attach(plan, table, stream, momentum)
        self._known_size = len(self.state)

    def _launch(
        self,
        plan: Plan,
        table: segments.Segments,
        step: backends.Step,
        grads: Grads,
        deferred: Deferred | None = None,
    ) -> bool:
        """Steps one table. False, with nothing changed, where a parameter was converted."""
        if table.copies and not all(map(table.fits, range(len(table.params)))):
            return False  # the kernel would see the copy alone, in its old dtype
        for param, memory in table.copies:
            memory.copy_(param)
        tables = (table.memory, grads, table.state, *table.tensors(), *plan.tensors)
        try:
            step(*tables, deferred=deferred)
        except RuntimeError:
            refused = grads.copy()
            if not checks.fit(table, grads, self.param_groups):  # or it says what is wrong
                return False
            if all(map(is_, grads, refused)):
                raise  # what fitted was launched, perhaps in part: a second step would be one more
            step(*tables, deferred=deferred)
        for param, memory in table.copies:
            param.copy_(memory)
        return True

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
                if grad_scale is not None and g is not None and p.grad is not None:
                    unscaled = local(p.grad)
                    if g is not unscaled:  # but a copy of the parameter's layout
                        unscaled.copy_(g)
        for device, deferred in counting.items():
            advance = next(b.advance for t, b in self._launches if t.params[0].device == device)
            assert advance is not None
            advance(deferred)
        return True

    def _finish(
        self, plan: Plan, table: segments.Segments, grads: Grads, absent: bool, scale: float
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
            # A tensor: a number would be rounded to 16 bits before it multiplies 16-bit gradients.
            inverse = torch.tensor(1.0 / scale, dtype=torch.float64, device="cpu")
            for p in written:
                if p.grad is not None:
                    (p.grad if p.grad.dim() > 0 else p.grad.view(1)).mul_(inverse)

    # ---- averaged weights ----------------------------------------------------------------------

    @property
    def n_averaged(self) -> int:
        """Samples in the average, of the group that has most."""
        opt = self._itself
        opt._settle()
        return max((n_averaged for n_averaged, _ in opt._counters()), default=0)

    def averaged(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """The averaged weights are live inside the context, the training weights again after it.

        Contents change, not addresses. The training weights are set aside (as much memory again
        as the weights that have averages) and come back exactly, also after an exception; in the
        parameters' new dtype and place where these were converted or moved inside. What is written
        to the weights inside never reaches the averages. Inside, ``step``, ``load_state_dict`` and
        ``add_param_group`` raise and ``state_dict()`` returns the training state. Parameters
        without an average so far stay as they are, as do those whose average is the parameter
        itself. Of nested contexts the outermost acts.

        All or nothing: where it cannot be entered, the weights are what they were. Where a
        parameter cannot take its weights on exit, since it has another shape now or no floating
        dtype, all others do, an error names it, and every ``step`` is refused: give ``p.data`` its
        shape again and enter and leave ``averaged()`` once more, which brings the weights back, or
        load a checkpoint.

        Args:
            model: what FSDP has gathered of it is freed on entry and on exit, or the next forward
                would see the weights of before. Not needed for plain parameters.

        Raises:
            ValueError: for DTensor parameters without their model.
            RuntimeError: on entry, inside FSDP1's summon_full_params or for a parameter that its
                average does not fit; on exit, for one that cannot take its training weights. An
                exception that was raised inside comes first, with this one as its context.

        Example:
            >>> with opt.averaged():
            ...     evaluate(model)
        """
        self._itself._refuse_midway("averaged")
        return evaluate.averaged(self._itself, model)

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """A plain state dict of the model holding the averaged weights, in the weights' dtypes.

        Buffers are the model's own; every tensor is a copy. Where ``model.state_dict()`` returns
        something else than parameters and buffers, such as copies that a hook makes, the averaged
        weights are live while it is asked, as in ``averaged()``.

        Raises:
            ValueError: for a model none of whose parameters is the optimizer's.
        """
        self._itself._refuse_midway("averaged_state_dict")
        return evaluate.averaged_state_dict(self._itself, model)

    # ---- checkpoints ---------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any], *, step: int | None = None) -> None:
        """Loads a checkpoint of this class or of torch.optim.SGD; tensors are copied.

        Where torch.optim.SGD went on with a checkpoint of this class, the averages in it are older
        than the weights: they are left out, with a warning, and start again.

        Args:
            step (int, steps, >= 0): how many were taken when the checkpoint was written. Ours say
                it themselves; torch's do not, and without it counting starts at 0, with a warning
                where a policy goes by the step (default: None).

        Raises:
            ValueError: for another optimizer's checkpoint, another rule, another kind of policy,
                write-back, ``initial`` or dtype, other shapes or groups, or another ``step`` than
                the checkpoint's. The optimizer is as it was then.
        """
        opt = self._itself
        if opt._evaluating is not None and not opt._evaluating.over:
            opt._refuse_inside_averaged("load_state_dict")
        opt._refuse_midway("load_state_dict")
        checkpoint.load(opt, state_dict, step)
        opt._evaluating = None  # what averaged() could not bring back is given up

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_averaged("pickle or deepcopy")
        self._refuse_midway("pickle or deepcopy")
        held = self.state.copy()
        for p in set(self._settle()) & held.keys():
            held[p] = {k: v for k, v in held[p].items() if k not in self.streams}
        return {
            **super().__getstate__(),
            "state": held,
            "_backend_name": self._backend_name,
            "_flatten": self._flatten,
            "_capturable": self._capturable,
            "_master_weights": self._master_weights,
            "_in_backward": self._in_backward,
            "_steps": self._steps,
            "counters": self._counters(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what `__getstate__` returned, or part of it, as torch.optim.Optimizer's does:
        its own `load_state_dict`, which a program may call by the class, ends here.

        Raises:
            ValueError, TypeError: as `load_state_dict`, also for averages that torch has cast. The
                optimizer is as it was then.
        """
        self._refuse_inside_averaged("__setstate__")
        self._refuse_midway("__setstate__")
        state = {**self.__dict__, **state}
        counters = state.pop("counters", None)
        live = self._plan is not None
        self._weak_self = weakref.ref(self)
        if counters is None:
            self.defaults = state["defaults"]
            held, steps, counters = adopted.adopt(self, state["param_groups"], state["state"])
            state.update(state=held, _steps=steps)
        if self._early is not None:
            self._early.detach()
        super().__setstate__(state)
        self._early = InBackward(self) if self._in_backward else None
        if checkpoint.export not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(checkpoint.export)
        self._build(self.param_groups, self._flatten and not live, counters)
