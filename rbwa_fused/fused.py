"""FusedOptimizer: torch.optim's contract around an engine that takes the step in one pass.

Hooks, closures and param groups are here, state dicts in saved.py, averages in averages.py; what a
step does to memory is engine/engine.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rbwa_fused import checkpoint, hyperparameters, renumbered, rules
from rbwa_fused.buffers import Buffers
from rbwa_fused.engine import backends, checks
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.sharded import is_flattened, kind_of_shard
from rbwa_fused.engine.tables import Options
from rbwa_fused.saved import Saved, export

Group = dict[str, Any]


class FusedOptimizer(Saved):
    """Base of FusedSGD and RSGDM: everything but the rule and its hyperparameters."""

    _step_supports_amp_scaling = True
    _watched = False  # hooks and profiler are told of the step under way

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        rule: rules.Rule,
        options: Options,
        buffers: nn.Module | None = None,
    ) -> None:
        if options.in_backward and options.capturable:
            raise ValueError("capturable=True does not go with in_backward=True")
        rule.check(defaults)
        checks.average(defaults, options.capturable)
        if buffers is not None:
            self._beside = Buffers(buffers, defaults["average"], options.capturable)
        self._begin(Engine(rule, options))
        super().__init__(params, {**defaults, **dict.fromkeys(checkpoint.OURS)})
        self.register_state_dict_post_hook(export)
        self.engine.build(self.param_groups, self.state, move=options.flatten)
        self._laid_out()

    @property
    def backend(self) -> str:
        """The name of what runs: "cpu", "cuda", "triton" or "reference"."""
        return self.engine.tables.backend

    def __repr__(self) -> str:
        """As torch.optim.Optimizer's, without the counters that the engine keeps."""
        lines = []
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            ours = (*checkpoint.OURS, *renumbered.KEYS)
            hidden = {"params", *(key for key in ours if group.get(key) is None)}
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
        self.engine.refuse_inside_averaged("step")
        if self._early is not None:
            self._early.check(closure, self.__dict__.get("found_inf"))
        loss = None
        if closure is not None:
            loss = self._call(closure)
        if self._early is None or not self._early.finish():
            step, found = self.engine.step, self.__dict__
            scaler = found.get("grad_scale"), found.get("found_inf")  # for the time of a step
            clip = () if self.pending_clip is None else self._claim_clip(scaler[0])
            while not step(self.param_groups, self.state, *scaler, *clip):
                self._rebuild()
            if clip:
                self._forget_unspent_clip()
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
        self.engine.refuse_inside_averaged("add_param_group")
        self.engine.refuse_midway("add_param_group")
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
        hyperparameters.implementation(*map(group.get, ("foreach", "differentiable", "fused")))
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
