"""Saved: what an optimizer consists of, and what state dicts, pickle and deepcopy see of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from rbwa_fused import adopted, checkpoint, form, rules
from rbwa_fused.averages import Averages
from rbwa_fused.buffers import KEY, Buffers, LoadedBuffers
from rbwa_fused.clipping import Clipping
from rbwa_fused.engine import backends, checks
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.tables import Counts, Options
from rbwa_fused.engine.upkeep import Swapped
from rbwa_fused.in_backward import InBackward

BUFFERS_LEFT = (
    "the averages of buffers start again: torch.optim.Optimizer.load_state_dict hands over none, "
    "and those that there are belong to another step (expected opt.load_state_dict)"
)


class Saved(Averages, Clipping):
    """Base of FusedOptimizer, which has the step: an engine, and what becomes of it where groups
    and state are exchanged, saved or loaded."""

    _early: InBackward | None = None  # the hooks that step inside the backward pass
    _beside: Buffers | None = None  # of a model, averaged beside the parameters
    _rule = rules.SGD  # of a state that names none, such as torch.optim.Optimizer's
    # Hyperparameters of the class, whatever a checkpoint says.
    _always: ClassVar[Mapping[str, Any]] = {}

    def _begin(self, engine: Engine) -> None:
        self._weak_self = weakref.ref(self)
        self.engine = engine
        engine.beside = self._beside
        if engine.options.in_backward:
            self._early = InBackward(self, engine, weakref.WeakMethod(self._rebuild))

    @property
    def _itself(self) -> Any:
        """The optimizer behind a wrapper that takes on its class, as Lightning's do: such a wrapper
        finds the class's attributes before the optimizer's, and keeps what is assigned to it."""
        itself = self._weak_self()
        assert itself is not None
        return itself

    def _rebuild(self) -> None:
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

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        step: int | None = None,
        averages: checkpoint.Averages = "load",
    ) -> None:
        """Loads a checkpoint of this class or of torch's; tensors are copied.

        Where torch's class went on with a checkpoint of this class, the averages in it are older
        than the weights: they are left out, with a warning, and start again.

        Args:
            step (int, steps, >= 0): how many were taken when the checkpoint was written. Ours say
                it themselves; torch's do not, and without it counting starts at 0, with a warning
                where a policy goes by the step (default: None).
            averages (str): ``"drop"`` leaves those of the checkpoint out, so that it loads into an
                optimizer with another policy, whose averages start again, or with none (default:
                ``"load"``).

        Raises:
            ValueError: for another optimizer's checkpoint, another rule, another kind of policy,
                write-back, ``initial`` or dtype, other shapes or groups, or another ``step`` than
                the checkpoint's. The optimizer is as it was then.
        """
        if self is not self._itself:
            self._itself.load_state_dict(state_dict, step=step, averages=averages)
            return
        engine = self.engine
        if engine.swapped is not None and not engine.swapped.over:
            engine.refuse_inside_averaged("load_state_dict")
        engine.refuse_midway("load_state_dict")
        form.mapping("state_dict", state_dict)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hook_result = pre_hook(self, state_dict)
            if hook_result is not None:
                state_dict = hook_result
        state_dict = self._translated(state_dict)
        if not engine.tables.describes_groups(self.param_groups):
            self._rebuild()
        for group in self.param_groups:
            checks.params(group, engine.options.master_weights)
        loaded = checkpoint.read(engine, self.param_groups, state_dict, step, averages)
        of_buffers = LoadedBuffers(Counts(), {})
        if self._beside is not None:
            self._beside.follow()
        if self._beside is not None and averages == "load":
            of_buffers = self._beside.read(state_dict, loaded.notes)
        if loaded.notes:
            warnings.warn("; ".join(loaded.notes), stacklevel=backends.user_level())
        if self._beside is not None:
            self._beside.load(of_buffers.averages)
        for group, new in zip(self.param_groups, loaded.groups, strict=True):
            group.update(new, **self._always)
        checkpoint.keep_tensors(loaded.state, self.state)
        self.state, self.pending_clip = loaded.state, None
        counted = loaded.steps, loaded.counts
        engine.build(self.param_groups, loaded.state, *counted, beside=of_buffers.counts)
        engine.swapped = self._standing()  # what averaged() could not bring back is given up
        self._laid_out()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _standing(self) -> Swapped | None:
        """What the param groups say that stands in the place of the weights."""
        return None

    def _translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict in the words of the class, where it is another program's."""
        return state_dict

    def exported(self, state_dict: dict[str, Any]) -> None:
        """What a class has to add to its state dict."""

    def __getstate__(self) -> dict[str, Any]:
        engine = self.engine
        engine.refuse_inside_averaged("pickle or deepcopy")
        engine.refuse_midway("pickle or deepcopy")
        held = self.state.copy()
        for p, streams in engine.waiting().items():
            held[p] = {k: v for k, v in held[p].items() if k not in streams}
        return {
            **super().__getstate__(),
            "state": held,
            "engine": (engine.rule.name, engine.options._asdict(), engine.steps),
            "counts": engine.counts(self.param_groups, self.state),
            "beside": engine.beside_count(self.state),
            "_beside": self._beside,
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
            self.engine.refuse_inside_averaged("__setstate__")
            self.engine.refuse_midway("__setstate__")
        state = {**self.__dict__, **state}
        state.pop("pending_clip", None)
        counts, beside = state.pop("counts", None), state.pop("beside", Counts())
        if not isinstance(beside, Counts):
            beside = Counts(beside)  # of an older version
        engine = state.pop("engine", None)
        if not isinstance(engine, Engine):
            rule, options, steps = engine or (self._rule.name, {}, 0)
            engine = Engine(rules.RULES[rule], Options(**options), steps)
        steps = engine.steps
        if counts is None:
            loaded = state["state"] is not self.__dict__.get("state")
            state |= self._translated({key: state[key] for key in ("param_groups", "state")})
            self.defaults = state["defaults"]
            held, steps, counts = adopted.adopt(
                engine, self.defaults, state["param_groups"], state["state"], loaded=loaded
            )
            state["state"] = held
            if not loaded or steps == engine.steps:
                beside = engine.beside_count(held)
            elif self._beside is not None:
                warnings.warn(BUFFERS_LEFT, stacklevel=backends.user_level())
        self.__dict__.pop("pending_clip", None)  # of other gradients
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(self._always)
        self._begin(engine)
        if export not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(export)
        move = engine.options.flatten and not live
        engine.build(self.param_groups, self.state, steps, counts, move=move, beside=beside)
        self._laid_out()


def export(opt: Any, state_dict: dict[str, Any]) -> None:
    """The first hook behind ``state_dict()``; see checkpoint.export."""
    opt = opt._itself
    opt.engine.refuse_midway("state_dict")
    checkpoint.export(opt.engine, opt.param_groups, opt.state, state_dict)
    opt.exported(state_dict)
    if isinstance(opt.engine.beside, Buffers):
        state_dict[KEY] = opt.engine.beside.export(opt.engine.beside_count(opt.state))
