"""What is timed: torch's own SGD, ours, what users write today, and the ceiling.

A row is a name and a function that builds the provider for a problem. Rows are built in the
process that times them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

import rbwa_fused as rf
from benchmarks import ceiling, today
from benchmarks.check import Average, Maths
from benchmarks.problem import MOMENTUM, WEIGHT_DECAY, Problem
from benchmarks.provider import Kind, Provider, use_gradients_of

BASELINE = "torch SGD fused"
STEPS_PER_EPOCH = 100

Build = Callable[[Problem, str], Provider]
Difference = Literal["implicit", "explicit"]


@dataclass(frozen=True)
class Row:
    """One row: its name, its group, how to build it, and the module it cannot do without."""

    name: str
    kind: Kind
    build: Build
    needs: str | None = None

    def available(self) -> bool:
        return self.needs is None or find_spec(self.needs) is not None


def ours(maths: Maths, average: rf.Average | None = None, flatten: bool = True) -> Build:
    """A builder for FusedSGD, or for implicit RSGDM where the maths are RSGDM's."""
    return _ours(maths, average, flatten, "implicit")


def ours_explicit(maths: Maths) -> Build:
    """A builder for RSGDM with the paper's three buffers."""
    return _ours(maths, None, True, "explicit")


def _ours(maths: Maths, average: rf.Average | None, flatten: bool, difference: Difference) -> Build:
    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        opt: torch.optim.Optimizer
        if maths.rule == "rsgdm":
            opt = rf.RSGDM(
                problem.groups(model),
                momentum=MOMENTUM,
                weight_decay=WEIGHT_DECAY,
                difference=difference,
                average=average,
                backend="cpu",
                flatten=flatten,
            )
        else:
            opt = rf.FusedSGD(
                problem.groups(model),
                momentum=0.0 if maths.rule == "plain" else MOMENTUM,
                weight_decay=WEIGHT_DECAY,
                average=average,
                backend="cpu",
                flatten=flatten,
            )
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
        )

    return build


def _rows() -> list[Row]:
    plain, momentum, rsgdm = Maths("plain"), Maths("momentum"), Maths("rsgdm")
    plain_rbwa = Maths("plain", Average(today.mean, written_back=True))

    def averaging(weight: Callable[[int], float], every: int = 1, back: bool = False) -> Maths:
        return Maths("momentum", Average(weight, every, back))

    mean, ema, rbwa_e = today.mean, today.ema(today.EMA_DECAY), today.ema(today.RBWA_E_BETA)
    fast_rbwa = rf.rbwa(STEPS_PER_EPOCH, start_epoch=0)
    fast_rbwa_e = rf.rbwa_e(today.RBWA_E_BETA, steps_per_epoch=STEPS_PER_EPOCH, start_epoch=0)
    fast_ema = rf.ema(today.EMA_DECAY)
    return [
        Row(BASELINE, "baseline", today.torch_sgd("fused")),
        Row("torch SGD for-loop", "baseline", today.torch_sgd("for-loop")),
        Row("torch SGD foreach", "baseline", today.torch_sgd("foreach")),
        Row("SGD, no momentum", "ours", ours(plain)),
        Row("SGD + momentum", "ours", ours(momentum)),
        Row("SGD + momentum, flatten=False", "ours", ours(momentum, flatten=False)),
        Row("RBWA", "ours", ours(averaging(mean, back=True), fast_rbwa)),
        Row("RBWA, no momentum", "ours", ours(plain_rbwa, fast_rbwa)),
        Row("RBWA-E", "ours", ours(averaging(rbwa_e, back=True), fast_rbwa_e)),
        Row("RSGDM", "ours", ours(rsgdm)),
        Row("RSGDM, explicit", "ours", ours_explicit(rsgdm)),
        Row("EMA", "ours", ours(averaging(ema), fast_ema)),
        Row("EMA, flatten=False", "ours", ours(averaging(ema), fast_ema, flatten=False)),
        Row("EMA every 10", "ours", ours(averaging(ema, 10), rf.ema(today.EMA_DECAY, every=10))),
        Row("SWA", "ours", ours(averaging(mean), rf.swa(start=0, every=1))),
        Row("fused + AveragedModel (mean)", "today", today.averaged_model("mean")),
        Row("fused + AveragedModel (EMA)", "today", today.averaged_model("ema")),
        Row("fused + timm ModelEmaV3", "today", today.timm_ema, needs="timm"),
        Row("fused + ema_pytorch EMA", "today", today.ema_pytorch_ema, needs="ema_pytorch"),
        Row("RBWA: fused + mean + copy back", "today", today.averaged_model("rbwa")),
        Row("RBWA-E: fused + EMA + copy back", "today", today.averaged_model("rbwa_e")),
        Row("RSGDM, foreach", "today", today.rsgdm_foreach),
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


def selected(patterns: list[str]) -> list[Row]:
    """The rows that match one of the patterns (all if there are none), and always the baseline.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in ROWS):
            raise ValueError(f"no row matches {pattern!r}")
    return [
        row
        for row in ROWS
        if not patterns
        or row.name == BASELINE
        or any(fnmatch(row.name, pattern) for pattern in patterns)
    ]


def named(names: tuple[str, ...] | list[str]) -> list[Row]:
    """The rows of these names, in the table's order."""
    return [row for row in ROWS if row.name in names]
