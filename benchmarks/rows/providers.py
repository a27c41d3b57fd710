"""What is timed: torch's own SGD, ours, what users write today, and the ceiling.

A row is a name and a function that builds the provider for a problem. Rows are built in the
process that times them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

import rbwa_fused as rf
from benchmarks.rows import ceiling, today
from benchmarks.rows.maths import Average, Maths
from benchmarks.rows.problem import MOMENTUM, WEIGHT_DECAY, Problem
from benchmarks.rows.provider import Kind, Provider, use_gradients_of

BASELINE = "torch SGD fused"
STEPS_PER_EPOCH = 100

Build = Callable[[Problem, str], Provider]
Difference = Literal["implicit", "explicit"]


@dataclass(frozen=True)
class Row:
    """One row: its name, its group, how to build it, the module it cannot do without, whether a
    CUDA graph replays it, and whether it takes so long to build that it must be asked for."""

    name: str
    kind: Kind
    build: Build
    needs: str | None = None
    captured: bool = False
    slow: bool = False

    def available(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None


def ours(
    maths: Maths,
    average: rf.Average | None = None,
    *,
    flatten: bool = True,
    difference: Difference = "implicit",
    backend: str = "cpu",
    capturable: bool = False,
    in_backward: bool = False,
) -> Build:
    """A builder for FusedSGD, or for RSGDM where the maths are RSGDM's."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        options: dict[str, Any] = {
            "momentum": 0.0 if maths.rule == "plain" else MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "average": average,
            "backend": backend,
            "flatten": flatten,
            "capturable": capturable,
            "in_backward": in_backward,
        }
        opt: torch.optim.Optimizer
        if maths.rule == "rsgdm":
            opt = rf.RSGDM(problem.groups(model), difference=difference, **options)
        else:
            opt = rf.FusedSGD(problem.groups(model), **options)
        params: list[Tensor] = list(model.parameters())

        def averages() -> list[Tensor] | None:
            kept = [opt.state.get(p, {}).get("average") for p in params]
            return None if kept[0] is None else kept

        def moved() -> tuple[float, float]:
            """From the state itself: theta and each buffer are read and written, g is read."""
            streams = {k: v.element_size() for k, v in opt.state.get(params[0], {}).items()}
            average_bytes = 2 * streams.pop("average", 0)
            item = params[0].element_size()
            without = 3 * item + 2 * sum(streams.values())
            return without, without + average_bytes

        return Provider(
            name=name,
            kind="ours",
            maths=maths,
            params=params,
            step=opt.step,
            use_gradients=use_gradients_of(problem, model),
            averages=averages,
            state=lambda: [t for s in opt.state.values() for t in s.values()],
            moved=moved,
            period=1 if average is None else average.every,
            model=model,
        )

    return build


def averaging(weight: Callable[[int], float], every: int = 1, back: bool = False) -> Maths:
    """SGD with momentum and an average."""
    return Maths("momentum", Average(weight, every, back))


# What each of our rows computes, and the policy that asks for it.
METHODS: dict[str, tuple[Maths, rf.Average | None]] = {
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
    "SWA": (averaging(today.mean), rf.swa(start=0, every=1)),
}


def _row(name: str, **options: Any) -> Row:
    """A row of ours under its method's name, with what is different about it behind a comma."""
    method = next(m for m in (name, name.rpartition(", ")[0]) if m in METHODS)
    return Row(name, "ours", ours(*METHODS[method], **options))


def _rows() -> list[Row]:
    return [
        Row(BASELINE, "baseline", today.torch_sgd("fused")),
        Row("torch SGD for-loop", "baseline", today.torch_sgd("for-loop")),
        Row("torch SGD foreach", "baseline", today.torch_sgd("foreach")),
        _row("SGD, no momentum"),
        _row("SGD + momentum"),
        _row("SGD + momentum, flatten=False", flatten=False),
        _row("RBWA"),
        _row("RBWA, no momentum"),
        _row("RBWA-E"),
        _row("RSGDM"),
        _row("RSGDM, explicit", difference="explicit"),
        _row("EMA"),
        _row("EMA, flatten=False", flatten=False),
        _row("EMA every 10"),
        _row("SWA"),
        Row("fused + AveragedModel (mean)", "today", today.averaged_model("mean")),
        Row("fused + AveragedModel (EMA)", "today", today.averaged_model("ema")),
        Row("fused + timm ModelEmaV3", "today", today.timm_ema, needs="timm"),
        Row("fused + ema_pytorch EMA", "today", today.ema_pytorch_ema, needs="ema_pytorch"),
        Row("RBWA: fused + mean + copy back", "today", today.averaged_model("rbwa")),
        Row("RBWA-E: fused + EMA + copy back", "today", today.averaged_model("rbwa_e")),
        Row("RSGDM, foreach", "today", today.rsgdm_foreach),
        Row("schedule_free SGD", "today", today.schedule_free, needs="schedulefree"),
        Row("SGD + momentum, compiled", "today", today.compiled(average=False), slow=True),
        Row("EMA, compiled", "today", today.compiled(average=True), slow=True),
        *(
            Row(f"plain loop: {streams}", "ceiling", ceiling.loop(streams))
            for streams in ceiling.STREAMS
        ),
    ]


ROWS: tuple[Row, ...] = tuple(_rows())

HOST_ROWS: tuple[str, ...] = (
    BASELINE,
    "SGD + momentum",
    "RBWA",
    "RBWA-E",
    "EMA",
    "SWA",
    "SGD + momentum, flatten=False",
)
HOST_GROUP_ROWS: tuple[str, ...] = (BASELINE, "SGD + momentum", "RBWA", "EMA")


def selected(patterns: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows that match one of the patterns (all that are not slow if there are none), and always
    the baseline.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in rows):
            raise ValueError(f"no row matches {pattern!r}")
    return [
        row
        for row in rows
        if (not patterns and not row.slow)
        or row.name == BASELINE
        or any(fnmatch(row.name, pattern) for pattern in patterns)
    ]


def named(names: tuple[str, ...] | list[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows of these names, in the table's order."""
    return [row for row in rows if row.name in names]


# Averages by hand, in one foreach call: what a CUDA graph can replay.
BY_HAND: tuple[Row, ...] = (
    Row("EMA: fused + foreach lerp", "today", today.foreach_lerp(written_back=False)),
    Row("RBWA-E: fused + lerp + copy back", "today", today.foreach_lerp(written_back=True)),
)

IN_BACKWARD = ", in_backward"


def _trained(capturable: bool = False) -> tuple[Row, ...]:
    """Rows of a whole training step; those in the backward pass have no step of their own to
    time."""
    options = {"backend": "auto", "capturable": capturable}
    return (
        *named((BASELINE, "torch SGD foreach")),
        *(
            _row(name, **options)
            for name in ("SGD + momentum", "RBWA", "RBWA-E", "RSGDM", "EMA", "SWA")
        ),
        *(
            _row(name + IN_BACKWARD, **options, in_backward=True)
            for name in ("SGD + momentum", "EMA")
        ),
        *named(
            (
                *("fused + AveragedModel (mean)", "fused + AveragedModel (EMA)"),
                *("RBWA: fused + mean + copy back", "RSGDM, foreach"),
            )
        ),
    )


TRAINED = _trained()
ON_GPU = (*TRAINED, *BY_HAND)
CAPTURED = (*_trained(capturable=True), *BY_HAND)  # what cannot be captured says so
