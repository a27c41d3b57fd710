"""The two modes of schedule-free optimizers, and their average, which is not kept but follows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from rbwa_fused import evaluate, progress, replicas, rules, swap
from rbwa_fused.averages import checked_blend
from rbwa_fused.engine import backends, doors
from rbwa_fused.engine.doors import Call
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.rows import GroupPlan
from rbwa_fused.engine.sharded import beside, local, shard_of
from rbwa_fused.engine.tables import Options
from rbwa_fused.engine.upkeep import Swapped
from rbwa_fused.fused import FusedOptimizer
from rbwa_fused.numbers import number
from rbwa_fused.several import Which, names_of, number_of
from rbwa_fused.streams import MASTER, NARROW, STEP, followed

X, FIRST = "x", "average"  # the names of the derived average, and of the first of ``average=``
Z, Y = "z", "y"
# The package's step asks a group for this key, and no loading gives it back.
PACKAGES = {"foreach": True}
EXPORTED_K = "exported_k"  # k when a state dict was made: the package goes on with k alone
NARROW_WEIGHTS = (
    "schedule-free steps of 16-bit parameters are lost where they are below half a unit of a "
    "weight's last place, as most are once c is small (expected master_weights=True)"
)


class EvalMode:
    """Stands where Swap does, inside averaged(): in eval mode the weights are x."""

    over = False

    def refuse(self, what: str) -> None:
        """Raises for what needs y in its place."""
        if what in ("step", "backward", "adopt"):
            raise RuntimeError(f"{what}() in eval mode (expected train() before it)")

    def restore(self) -> RuntimeError | None:
        """Nothing is missing."""
        return None


EVAL = EvalMode()


class ScheduleFree(FusedOptimizer):
    """Base of both: their modes, and the average that is not kept."""

    _warned = False  # of 16-bit weights

    def _start(
        self, params: ParamsT, defaults: dict[str, Any], options: Options, buffers: nn.Module | None
    ) -> None:
        super().__init__(params, {**defaults, **progress.START}, self._rule, options, buffers)

    def _begin(self, engine: Engine) -> None:
        super()._begin(engine)
        engine.swapped = self._standing()
        replicas.derived_averages[id(self)] = self

    def _standing(self) -> Swapped | None:
        groups = self.__dict__.get("param_groups")
        return None if groups and groups[0]["train_mode"] else EVAL

    @property
    def _trains(self) -> bool:
        return self.engine.swapped is not EVAL

    # ---- modes ---------------------------------------------------------------------------------

    def train(self, model: nn.Module | None = None) -> None:
        """Makes y the weights, which `step` needs: the very bits that `eval` has set aside, or, of
        weights that were written to since, y as x and z say it.

        Args:
            model: as in ``averaged``. Not needed for plain parameters, nor before the first step.

        Raises:
            ValueError: for DTensor parameters that have stepped, without their model.
            RuntimeError: inside ``averaged()``, or between a backward pass and its ``step()``.
        """
        self._itself._switch("train", model)

    def eval(self, model: nn.Module | None = None) -> None:
        """Makes x the weights, the average to evaluate or to save, until `train`. y is set aside in
        the state, as large as the weights.

        Args, Raises: as `train`'s.
        """
        self._itself._switch("eval", model)

    @torch._disable_dynamo
    @torch.no_grad()
    def _switch(self, mode: str, model: nn.Module | None) -> None:
        engine = self.engine
        engine.refuse_inside_averaged(mode)
        engine.refuse_midway(mode)
        trains = mode == "train"
        if trains == self._trains:
            self._mirror()
            return
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            others = swap.in_place_of(p)
            if others is not None:  # an Averager's
                others.refuse(mode)
        if not engine.tables.describes(self.param_groups, self.state):
            self._rebuild()
        started = list(self._started())
        if started:
            evaluate.free_gathered(self, model, mode)
        calls: list[Call] = []
        written: list[Tensor] = []
        for plan, p, held in started:
            before = local(p).detach()
            if trains:
                weights = self._y(plan, p, held)
                calls.append((held.pop, Y, None))
            else:
                weights = self._x(plan, p, before)
                calls.append((held.__setitem__, Y, beside(before.clone(), p)))
            calls.append((before.copy_, weights))
            written.append(p)
        calls.append((setattr, engine, "swapped", None if trains else EVAL))
        calls += [(group.__setitem__, "train_mode", trains) for group in self.param_groups]
        calls.append((torch._C._increment_version, written))
        doors.in_turn(calls)
        torch.clear_autocast_cache()  # of 16-bit copies, which does not look at versions
        engine.tables.state.look()  # `y` is nothing that tables are made for

    def _started(self) -> Iterator[tuple[GroupPlan, Tensor, dict[str, Any]]]:
        """The parameters that have a z, whose x is another tensor than their y."""
        waiting = self.engine.waiting()
        for plan in self.engine.tables.of_groups:
            plan.rule.check_memory(plan.group, plan.memory)
            for p in plan.group["params"]:
                held = self.state.get(p) or {}
                if held.get(Z) is not None and Z not in waiting.get(p, ()):
                    yield plan, p, held

    def _x(self, plan: GroupPlan, param: Tensor, weights: Tensor) -> Tensor:
        """x of a parameter that has z, and these training weights."""
        held = self.state[param]
        z = shard_of(held[Z], param).detach()
        master = shard_of(held[MASTER], param).detach() if MASTER in held else None
        theta = followed(master, weights)
        wide = torch.promote_types(theta.dtype, z.dtype)  # weights may have been converted since
        return progress.derived(theta.to(wide), z.to(wide), self._beta(plan))

    def _y(self, plan: GroupPlan, param: Tensor, held: dict[str, Any]) -> Tensor:
        """y of a parameter whose weights are x, or what somebody has written over it."""
        weights = local(param).detach()
        z = shard_of(held[Z], param).detach()
        wide = torch.promote_types(weights.dtype, z.dtype)
        computed = progress.between(weights.to(wide), z.to(wide), self._beta(plan))
        computed = computed.to(weights.dtype)
        y = held.get(Y)
        if y is None and MASTER in held:
            y = held[MASTER]
        if y is None or y.shape != param.shape:
            return computed
        y = shard_of(y, param).detach()
        x = self._x(plan, param, y).to(weights.dtype)
        untouched = (x == weights) | (x.isnan() & weights.isnan())
        return torch.where(untouched, y.to(weights.dtype), computed)

    def _beta(self, plan: GroupPlan) -> float:
        return rules.remember_beta(plan.group)[rules.BETA]

    def _mirror(self) -> None:
        """Says in the groups which mode it is, where the package has it."""
        for group in self.param_groups:
            group["train_mode"] = self._trains

    def _laid_out(self) -> None:
        super()._laid_out()
        for plan, _, _ in self._started():
            plan.memory.setdefault(rules.BETA, self._beta(plan))

    # ---- the average ---------------------------------------------------------------------------

    def averaged(
        self, model: nn.Module | None = None, *, blend: float = 1.0, which: Which = X
    ) -> AbstractContextManager[None]:
        """x is live inside the context, the training weights again after it. In eval mode x is live
        already, and nothing happens.

        Unlike a pair of `eval` and `train` it cannot be forgotten, and comes back after an
        exception, too. All else is as in FusedSGD's.

        Args:
            model: as FusedSGD's.
            blend: how much of the average is live, (1 - blend) y + blend x.
            which: ``"average"`` is that of ``average=``, of y, in the place of x; of several there
                a number or a name.

        Raises:
            ValueError, RuntimeError: as FusedSGD's; RuntimeError also in eval mode, for
                another ``which`` or ``blend``.
        """
        opt = self._itself
        if which != X:
            number = opt._of_average(which)
            opt._refuse_in_eval_mode(f"averaged(which={which!r})")
            return super().averaged(model, blend=blend, which=number)
        if blend != 1.0:
            opt._refuse_in_eval_mode(f"averaged(blend={blend})")
        opt.engine.refuse_midway("averaged")
        return evaluate.averaged(opt._derived(), model, checked_blend(blend))

    def averaged_state_dict(
        self, model: nn.Module, *, blend: float = 1.0, which: Which = X
    ) -> dict[str, Any]:
        """A plain state dict of the model holding x, in the weights' dtypes, in either mode.

        Args:
            blend, which: as `averaged`'s.

        Raises:
            ValueError, RuntimeError: as `averaged`'s; ValueError also for a model none of whose
                parameters is the optimizer's.
        """
        opt = self._itself
        if which != X:
            return super().averaged_state_dict(model, blend=blend, which=opt._of_average(which))
        if blend != 1.0:
            opt._refuse_in_eval_mode(f"averaged_state_dict(blend={blend})")
        opt.engine.refuse_midway("averaged_state_dict")
        return evaluate.averaged_state_dict(opt._derived(), model, checked_blend(blend))

    def copy_to(
        self, module: nn.Module, model: nn.Module, *, blend: float = 1.0, which: Which = X
    ) -> None:
        """As FusedSGD's, of x unless ``which`` is another, as `averaged`'s."""
        super().copy_to(module, model, blend=blend, which=which)

    def adopt(self, model: nn.Module | None = None, *, which: Which = X) -> None:
        """Refused: a run ends with `eval`.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"adopt() of {type(self).__name__}: y would be another sequence's (expected eval(), "
            "which makes x the weights)"
        )

    def _of_average(self, which: Which) -> Which:
        """Which of the averages of ``average=``."""
        averages = [group["average"] for group in self.param_groups]
        named = any(number_of(average, which) is not None for average in averages)
        if isinstance(which, str) and which != FIRST and not named:
            names = [*dict.fromkeys(name for a in averages for name in names_of(a))]
            raise ValueError(f"Invalid which: {which!r} (expected one of {(X, FIRST, *names)})")
        return 0 if which == FIRST else which

    def _derived(self) -> swap.Derived:
        if not self.engine.tables.describes(self.param_groups, self.state):
            self._rebuild()
        started = {p for _, p, _ in self._started()}  # and checks beta

        def of(plan: GroupPlan, param: Tensor) -> Tensor | None:
            if param not in started:
                return None
            others = swap.in_place_of(param)
            set_aside = None if others is None else others.set_aside(param)
            weights = local(param).detach() if set_aside is None else set_aside
            if self.engine.swapped is EVAL:
                return weights
            return self._x(plan, param, weights)

        return swap.Derived(self, of)

    def _refuse_in_eval_mode(self, what: str) -> None:
        if not self._trains:
            raise RuntimeError(f"{what} in eval mode (expected train() before it)")

    # ---- groups and checkpoints ----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in the optimizer's mode. See torch.optim.Optimizer."""
        super().add_param_group(param_group)
        self._itself._mirror()

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        narrow = any(p.dtype in NARROW for p in group["params"])
        if narrow and not self.engine.options.master_weights and not self._warned:
            self._warned = True
            warnings.warn(NARROW_WEIGHTS, stacklevel=backends.user_level())

    def __getstate__(self) -> dict[str, Any]:
        self._mirror()
        return super().__getstate__()

    def exported(self, state_dict: dict[str, Any]) -> None:
        """Adds what the package needs to go on."""
        for live, group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            counted = {key: live[key] for key in progress.COUNTED}  # as read back from a device
            group.update(PACKAGES, **counted, train_mode=self._trains)
            group[EXPORTED_K] = group["k"]

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        step: int | None = None,
        averages: Literal["load", "drop"] = "load",
    ) -> None:
        """Loads a checkpoint of this class or of the package's, and its mode with it: the model's
        weights of the same checkpoint are x where it is in eval mode, y where it is not.

        A package's AdamW counts no parameter's steps; they are the group's then. Where the package
        went on with a checkpoint of this class, the averages of ``average=`` start again.

        Args, Raises: as FusedSGD's.
        """
        super().load_state_dict(state_dict, step=step, averages=averages)

    def _translated(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The package's checkpoint in our words. Its weight_sum and lr_max may be tensors, its mode
        is the first group's, and k says how many steps it went on."""
        groups = state_dict.get("param_groups")
        state = state_dict.get("state")
        if not isinstance(groups, list | tuple) or not isinstance(state, dict):
            return state_dict  # which is refused
        translated: list[Any] = []
        state = state.copy()
        for group in groups:
            if not isinstance(group, dict) or not isinstance(group.get("params"), list | tuple):
                return state_dict
            group = self._of_group(group, groups[0].get("train_mode"))
            for p in group["params"]:
                held = state.get(p) if isinstance(p, int | str | Tensor) else None
                if isinstance(held, dict) and Z in held:
                    state[p] = self._of_param(group, held)
            if not group.pop("went on", 0):
                group.pop("foreach", None)
            translated.append(group)
        return {**state_dict, "param_groups": translated, "state": state}

    def _of_group(self, group: dict[str, Any], mode: Any) -> dict[str, Any]:
        group = group.copy()
        for key in ("weight_sum", "lr_max", "scheduled_lr"):
            if isinstance(group.get(key), Tensor) and group[key].numel() == 1:
                group[key] = float(group[key])
        if mode is not None:
            group["train_mode"] = mode
        exported, k = group.pop(EXPORTED_K, None), group.get("k")
        if isinstance(exported, int) and isinstance(k, int):
            group["went on"] = max(k - exported, 0)
        return group

    def _of_param(self, group: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        held = held.copy()
        k, went_on, step = group.get("k"), group.get("went on", 0), held.get(STEP)
        if self._rule.counts and isinstance(k, int) and (step is None or went_on):
            counted = k if step is None else number(STEP, step) + went_on
            held[STEP] = torch.tensor(float(counted), dtype=torch.float32, device="cpu")
        if group.get("train_mode"):
            held.pop(Y, None)
        return held
