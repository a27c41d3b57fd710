"""FusedOptimizer: torch.optim's contract around an engine that takes the step in one pass.

Hooks, closures, param groups, pickling and state dicts are here; what a step does to memory is
engine/engine.py's.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rbwa_fused import adopted, checkpoint, evaluate, form, rules
from rbwa_fused.engine import backends, checks
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.sharded import is_flattened, kind_of_shard
from rbwa_fused.engine.tables import Options
from rbwa_fused.in_backward import MIDWAY, InBackward

Group = dict[str, Any]


class FusedOptimizer(Optimizer):
    """Base of FusedSGD and RSGDM: everything but the rule and its hyperparameters.

    Attributes:
        engine: what steps the parameters; not for users.
    """

    engine: Engine
    _step_supports_amp_scaling = True
    _watched = False  # hooks and profiler are told of the step under way
    _rule = rules.SGD  # of a state that names none, such as torch.optim.Optimizer's
    _early: InBackward | None = None  # the hooks that step inside the backward pass

    def __init__(
        self, params: ParamsT, defaults: Group, rule: rules.Rule, options: Options
    ) -> None:
        if options.in_backward and options.capturable:
            raise ValueError("capturable=True does not go with in_backward=True")
        rule.check(defaults)
        checks.average(defaults, options.capturable)
        self._begin(Engine(rule, options))
        super().__init__(params, {**defaults, **dict.fromkeys(checkpoint.OURS)})
        self.register_state_dict_post_hook(export)
        self.engine.build(self.param_groups, self.state, move=options.flatten)
        self._laid_out()

    def _begin(self, engine: Engine) -> None:
        self._weak_self = weakref.ref(self)
        self.engine = engine
        if engine.options.in_backward:
            self._early = InBackward(self, engine, weakref.WeakMethod(self._rebuild))

    @property
    def backend(self) -> str:
        """The name of what runs: "cpu", "cuda", "triton" or "reference"."""
        return self.engine.tables.backend

    @property
    def _itself(self) -> Any:
        """The optimizer behind a wrapper that takes on its class, as Lightning's do: such a wrapper
        finds the class's attributes before the optimizer's, and keeps what is assigned to it."""
        itself = self._weak_self()
        assert itself is not None
        return itself

    def __repr__(self) -> str:
        """As torch.optim.Optimizer's, without the counters that the engine keeps."""
        lines = []
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            hidden = {"params", *(key for key in checkpoint.OURS if group.get(key) is None)}
            lines += [f"    {key}: {group[key]}" for key in sorted(group.keys() - hidden)]
        text = "".join(f"{line}\n" for line in lines)
        return f"{type(self).__name__} (\n{text})"

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
        if self._early is None or not self._early.finish():
            step, found = self.engine.step, self.__dict__
            scaler = found.get("grad_scale"), found.get("found_inf")  # for the time of a step
            while not step(self.param_groups, self.state, *scaler):
                self._rebuild()
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

    # ---- param groups --------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its average starts with its own first sample. See torch.optim.Optimizer."""
        if self is not self._itself:
            self._itself.add_param_group(param_group)
            return
        self._refuse_inside_averaged("add_param_group")
        self._refuse_midway("add_param_group")
        checks.duplicates(param_group)
        engine, tables = self.engine, self.engine.tables
        built = len(tables.plan.groups) > 0  # else torch's constructor adds the first groups
        # Rebuilding brings a device's counters back to the host: they have no room for a group.
        counting = engine.device_counters is not None
        if built and (counting or not tables.describes_state(self.state)):
            self._rebuild()
        before = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self._check(self.param_groups[-1])
            if built:
                engine.add(self.param_groups[before:], move=engine.options.flatten)
                self._laid_out()
        except BaseException:
            del self.param_groups[before:]  # so that it can be added again
            raise

    def _check(self, group: Group) -> None:
        """Raises for a new group that cannot be stepped."""
        options = self.engine.options
        self.engine.rule.check(group)
        rules.implementation(*map(group.get, ("foreach", "differentiable", "fused")))
        checks.average(group, options.capturable)
        checks.params(group, options.master_weights)
        kind = kind_of_shard(group["params"])
        if options.in_backward and kind is not None:
            raise ValueError(f"in_backward=True does not go with {kind} parameters")
        if any(map(is_flattened, group["params"])):
            # FSDP1's scaler tells the other ranks of an overflow in its unscale_(), which it
            # leaves out for who unscales by himself.
            self._step_supports_amp_scaling = False
        for device in {p.device for p in group["params"]}:
            backends.choose(options.backend, device)

    def _rebuild(self) -> None:
        """Follows parameters that were converted, groups and state that were replaced."""
        engine = self.engine
        for group in self.param_groups:
            if type(group.get("average", "")) is str:  # put in place from outside
                group.update(adopted.complete(engine, self.defaults, group))
            checks.average(group, engine.options.capturable)
            checks.params(group, engine.options.master_weights)
            checks.state(group, self.state)
        engine.rebuild(self.param_groups, self.state)
        self._laid_out()

    def _laid_out(self) -> None:
        """The engine has new tables."""
        if self._early is not None:
            self._early.attach()

    # ---- averaged weights ----------------------------------------------------------------------

    @property
    def n_averaged(self) -> int:
        """Samples in the average, of the group that has most."""
        opt = self._itself
        opt.engine.read_back()
        counts = opt.engine.counts(opt.param_groups, opt.state)
        return max((counted.n_averaged for counted in counts), default=0)

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
        engine = opt.engine
        if engine.swapped is not None and not engine.swapped.over:
            engine.refuse_inside_averaged("load_state_dict")
        opt._refuse_midway("load_state_dict")
        form.mapping("state_dict", state_dict)
        state_dict = dict(state_dict)
        for pre_hook in opt._optimizer_load_state_dict_pre_hooks.values():
            hook_result = pre_hook(opt, state_dict)
            if hook_result is not None:
                state_dict = hook_result
        if not engine.tables.describes_groups(opt.param_groups):
            opt._rebuild()
        for group in opt.param_groups:
            checks.params(group, engine.options.master_weights)
        loaded = checkpoint.read(engine, opt.param_groups, state_dict, step)
        if loaded.notes:
            warnings.warn("; ".join(loaded.notes), stacklevel=2)
        for group, new in zip(opt.param_groups, loaded.groups, strict=True):
            group.update(new)
        checkpoint.keep_tensors(loaded.state, opt.state)
        opt.state = loaded.state
        engine.build(opt.param_groups, loaded.state, loaded.steps, loaded.counts)
        opt._laid_out()
        for post_hook in opt._optimizer_load_state_dict_post_hooks.values():
            post_hook(opt)
        engine.swapped = None  # what averaged() could not bring back is given up

    def __getstate__(self) -> dict[str, Any]:
        engine = self.engine
        engine.refuse_inside_averaged("pickle or deepcopy")
        self._refuse_midway("pickle or deepcopy")
        held = self.state.copy()
        for p, streams in engine.waiting().items():
            held[p] = {k: v for k, v in held[p].items() if k not in streams}
        return {
            **super().__getstate__(),
            "state": held,
            "engine": (engine.rule.name, engine.options._asdict(), engine.steps),
            "counts": engine.counts(self.param_groups, self.state),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what `__getstate__` returned, or part of it, as torch.optim.Optimizer's does:
        its own `load_state_dict`, which a program may call by the class, ends here.

        Raises:
            ValueError, TypeError: as `load_state_dict`, also for averages that torch has cast. The
                optimizer is as it was then.
        """
        live = "engine" in self.__dict__
        if live:
            self._refuse_inside_averaged("__setstate__")
            self._refuse_midway("__setstate__")
        state = {**self.__dict__, **state}
        counts = state.pop("counts", None)
        engine = state.pop("engine", None)
        if not isinstance(engine, Engine):
            rule, options, steps = engine or (self._rule.name, {}, 0)
            engine = Engine(rules.RULES[rule], Options(**options), steps)
        steps = engine.steps
        if counts is None:
            loaded = state["state"] is not self.__dict__.get("state")
            self.defaults = state["defaults"]
            held, steps, counts = adopted.adopt(
                engine, self.defaults, state["param_groups"], state["state"], loaded=loaded
            )
            state["state"] = held
        if self._early is not None:
            self._early.detach()
        super().__setstate__(state)
        self._begin(engine)
        if export not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(export)
        move = engine.options.flatten and not live
        engine.build(self.param_groups, self.state, steps, counts, move=move)
        self._laid_out()

    def _refuse_inside_averaged(self, what: str) -> None:
        self.engine.refuse_inside_averaged(what)

    def _refuse_midway(self, what: str) -> None:
        if self._early is not None and self._early.midway:
            raise RuntimeError(f"{what}() {MIDWAY}")


def export(opt: Any, state_dict: dict[str, Any]) -> None:
    """The first hook behind ``state_dict()``; see checkpoint.export."""
    opt = opt._itself
    opt._refuse_midway("state_dict")
    checkpoint.export(opt.engine, opt.param_groups, opt.state, state_dict)
