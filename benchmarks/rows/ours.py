"""Ours: the fused optimizers as providers, and what each method computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

import rbwa_fused as rf
from benchmarks.rows import adamw, today
from benchmarks.rows.maths import CLIP, Average, Maths
from benchmarks.rows.problem import MOMENTUM, WEIGHT_DECAY, Problem
from benchmarks.rows.provider import Build, Provider, use_gradients_of
from rbwa_fused.streams import AVERAGES

STEPS_PER_EPOCH = 100
SECOND_EMA_DECAY = 0.99

Difference = Literal["implicit", "explicit"]


def ours(
    maths: Maths,
    average: rf.Average | list[rf.Average] | None = None,
    *,
    flatten: bool = True,
    difference: Difference = "implicit",
    backend: str = "cpu",
    capturable: bool = False,
    in_backward: bool = False,
    clipped: bool = False,
) -> Build:
    """A builder for the optimizer whose maths they are; of several averages those of the last."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        of_sgd: dict[str, Any] = {
            "momentum": 0.0 if maths.rule == "plain" else MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
        }
        options: dict[str, Any] = {
            "average": average,
            "backend": backend,
            "flatten": flatten,
            "capturable": capturable,
            "in_backward": in_backward,
        }
        opt: rf.FusedSGD | rf.RSGDM | rf.FusedAdamW | rf.SGDScheduleFree | rf.AdamWScheduleFree
        if maths.rule == "rsgdm":
            opt = rf.RSGDM(problem.groups(model), difference=difference, **of_sgd, **options)
        elif maths.rule == "adamw":
            opt = rf.FusedAdamW(problem.groups(model), **options)
        elif maths.rule == "schedule_free":
            opt = rf.SGDScheduleFree(problem.groups(model), momentum=MOMENTUM, **options)
            opt.train()
        elif maths.rule == "schedule_free_adamw":
            opt = rf.AdamWScheduleFree(problem.groups(model), **options)
            opt.train()
        else:
            opt = rf.FusedSGD(problem.groups(model), **of_sgd, **options)
        params: list[Tensor] = list(model.parameters())

        def clip_and_step() -> None:
            opt.clip_grad_norm_(CLIP)
            opt.step()

        def averages() -> list[Tensor] | None:
            keys = [key for key in AVERAGES if key in opt.state.get(params[0], {})]
            return [opt.state[p][keys[-1]] for p in params] if keys else None

        def moved() -> tuple[float, float]:
            """From the state itself: theta and each buffer are read and written, g is read, for its
            norm once more."""
            streams = {k: v.element_size() for k, v in opt.state.get(params[0], {}).items()}
            average_bytes = 2 * sum(streams.pop(key, 0) for key in AVERAGES)
            streams.pop("step", None)  # one number
            item = params[0].element_size()
            without = (4 if clipped else 3) * item + 2 * sum(streams.values())
            return without, without + average_bytes

        return Provider(
            name=name,
            kind="ours",
            maths=replace(maths, clipped=clipped),
            params=params,
            step=clip_and_step if clipped else opt.step,
            use_gradients=use_gradients_of(problem, model),
            averages=averages,
            state=lambda: [t for s in opt.state.values() for t in s.values()],
            moved=moved,
            period=average.every if isinstance(average, rf.Average) else 1,
            model=model,
        )

    return build


def twice() -> Build:
    """FusedSGD with an EMA, and an Averager behind it with another, which is a second pass."""

    def build(problem: Problem, name: str) -> Provider:
        made = ours(*METHODS["EMA"])(problem, name)
        assert made.model is not None
        averager = rf.Averager(made.model, rf.ema(SECOND_EMA_DECAY))
        step, moved, state = made.step, made.moved, made.state
        averages = [averager.state[p]["average"] for p in made.params]
        item, wide = made.params[0].element_size(), averages[0].element_size()

        def step_and_update() -> None:
            step()
            averager.update()

        def moved_twice() -> tuple[float, float]:
            once = moved()
            assert once is not None
            second = item + 2 * wide
            return once[0] + second, once[1] + second

        made.maths = Maths("momentum", Average(today.ema(SECOND_EMA_DECAY)))
        made.step, made.averages, made.moved = step_and_update, lambda: averages, moved_twice
        made.state = lambda: [*state(), *averages]
        return made

    return build


def beside(into: bool = False, rule: Literal["momentum", "adamw"] = "momentum") -> Build:
    """An Averager behind torch's fused SGD or AdamW, with averages of its own or in a teacher."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        # A 16-bit teacher could not move with this decay.
        wide = torch.promote_types(problem.dtype, torch.float32)
        teacher = problem.copy().to(wide) if into else None
        sgd = rule == "momentum"
        opt = today.sgd(problem, model) if sgd else adamw.adamw(problem, model)
        accesses = today.FUSED if sgd else adamw.FUSED
        policy = rf.ema(today.EMA_DECAY)
        averager = rf.Averager(model, policy, optimizer=opt, into=teacher)
        weight = today.ema(today.EMA_DECAY)
        made = today.provider(
            problem,
            name,
            model,
            opt,
            accesses + today.LERP,
            "ours",
            average=Average((lambda n: 1 - today.EMA_DECAY) if into else weight),
            rule=rule,
        )
        params = list(model.parameters())
        averages = [averager.state[p]["average"] for p in params]
        made.averages = lambda: averages
        item = problem.dtype.itemsize
        moved = float((accesses + 1) * item + 2 * wide.itemsize)
        made.moved = lambda: (moved, moved)
        of_torch = made.state
        made.state = lambda: [*of_torch(), *averages]
        return made

    return build


def averaging(weight: Callable[[int], float], every: int = 1, back: bool = False) -> Maths:
    """SGD with momentum and an average."""
    return Maths("momentum", Average(weight, every, back))


# What each of our rows computes, and the policy that asks for it.
METHODS: dict[str, tuple[Maths, rf.Average | list[rf.Average] | None]] = {
    "SGD, no momentum": (Maths("plain"), None),
    "SGD + momentum": (Maths("momentum"), None),
    "RBWA": (averaging(today.mean, back=True), rf.rbwa(STEPS_PER_EPOCH, start_epoch=0)),
    "RBWA, no momentum": (
        Maths("plain", Average(today.mean, written_back=True)),
        rf.rbwa(STEPS_PER_EPOCH, start_epoch=0),
    ),
    "RBWA-E": (
        averaging(today.ema(today.RBWA_E_BETA), back=True),
        rf.rbwa_e(today.RBWA_E_BETA, steps_per_epoch=STEPS_PER_EPOCH, start_epoch=0),
    ),
    "RSGDM": (Maths("rsgdm"), None),
    "EMA": (averaging(today.ema(today.EMA_DECAY)), rf.ema(today.EMA_DECAY)),
    "EMA every 10": (
        averaging(today.ema(today.EMA_DECAY), every=10),
        rf.ema(today.EMA_DECAY, every=10),
    ),
    "SGD + two EMAs": (
        averaging(today.ema(SECOND_EMA_DECAY)),
        [rf.ema(today.EMA_DECAY), rf.ema(SECOND_EMA_DECAY)],
    ),
    "SWA": (averaging(today.mean), rf.swa(start=0, every=1)),
    "AdamW": (Maths("adamw"), None),
    "AdamW + EMA": (
        Maths("adamw", Average(today.ema(today.EMA_DECAY))),
        rf.ema(today.EMA_DECAY),
    ),
    "Schedule-Free SGD": (Maths("schedule_free"), None),
    "Schedule-Free AdamW": (Maths("schedule_free_adamw"), None),
}
