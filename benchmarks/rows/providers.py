"""The rows of the tables: torch's own optimizers, ours, what users write today, and the ceiling.

Rows are built in the process that times them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from benchmarks.rows import adamw, ceiling, schedule_free, today, variants
from benchmarks.rows.graph import Capturing, captured
from benchmarks.rows.ours import METHODS, beside, ours, twice
from benchmarks.rows.provider import Row

BASELINE = "torch SGD fused"
ADAMW_BASELINE = "torch AdamW fused"
TODAY_ADAMW, TODAY_CLIPPED = (
    "AdamW fused + AveragedModel (EMA)",
    "AdamW fused + clip + AveragedModel",
)


def _row(name: str, **options: Any) -> Row:
    """A row of ours under its method's name, with what is different about it behind a comma."""
    parts = name.split(", ")
    heads = (", ".join(parts[:k]) for k in range(len(parts), 0, -1))
    method = next(head for head in heads if head in METHODS)
    return Row(name, "ours", ours(*METHODS[method], **options))


def _rows() -> list[Row]:
    return [
        Row(BASELINE, "baseline", today.torch_sgd("fused")),
        Row("torch SGD for-loop", "baseline", today.torch_sgd("for-loop")),
        Row("torch SGD foreach", "baseline", today.torch_sgd("foreach")),
        Row(ADAMW_BASELINE, "baseline", adamw.torch_adamw("fused"), not_in="float16"),
        Row("torch AdamW foreach", "baseline", adamw.torch_adamw("foreach"), not_in="float16"),
        _row("SGD, no momentum"),
        _row("SGD + momentum"),
        _row("SGD + momentum, flatten=False", flatten=False),
        _row("SGD + momentum, clipped", clipped=True),
        _row("RBWA"),
        _row("RBWA, no momentum"),
        _row("RBWA-E"),
        _row("RSGDM"),
        _row("RSGDM, explicit", difference="explicit"),
        _row("EMA"),
        _row("EMA, flatten=False", flatten=False),
        _row("EMA every 10"),
        _row("SGD + two EMAs"),
        Row("EMA + Averager (EMA)", "ours", twice()),
        _row("SWA"),
        _row("AdamW"),
        _row("AdamW + EMA"),
        _row("AdamW + EMA, clipped", clipped=True),
        _row("Schedule-Free SGD"),
        _row("Schedule-Free AdamW"),
        Row("fused + Averager (EMA)", "ours", beside()),
        Row("AdamW fused + Averager (EMA)", "ours", beside(rule="adamw"), not_in="float16"),
        Row("fused + Averager into a teacher", "ours", beside(into=True)),
        Row("fused + teacher by foreach", "today", today.foreach_teacher),
        Row("fused + clip_grad_norm_", "today", adamw.clipped),
        Row(TODAY_ADAMW, "today", adamw.averaged(), not_in="float16"),
        Row(TODAY_CLIPPED, "today", adamw.averaged(clipped=True), not_in="float16"),
        Row("fused + AveragedModel (mean)", "today", today.averaged_model("mean")),
        Row("fused + AveragedModel (EMA)", "today", today.averaged_model("ema")),
        Row("fused + timm ModelEmaV3", "today", today.timm_ema, needs="timm"),
        Row("fused + ema_pytorch EMA", "today", today.ema_pytorch_ema, needs="ema_pytorch"),
        Row("RBWA: fused + mean + copy back", "today", today.averaged_model("rbwa")),
        Row("RBWA-E: fused + EMA + copy back", "today", today.averaged_model("rbwa_e")),
        Row("RSGDM, foreach", "today", today.rsgdm_foreach),
        Row("schedule_free SGD", "today", schedule_free.package("sgd"), needs="schedulefree"),
        Row(
            "schedule_free AdamW",
            "today",
            schedule_free.package("adamw"),
            needs="schedulefree",
            not_in="float16",
        ),
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
    "SGD + two EMAs",
    "SWA",
    "SGD + momentum, flatten=False",
    "fused + Averager (EMA)",
    "fused + AveragedModel (EMA)",
    "fused + timm ModelEmaV3",
    "fused + ema_pytorch EMA",
    ADAMW_BASELINE,
    "AdamW",
    "AdamW + EMA",
    "AdamW + EMA, clipped",
    "Schedule-Free AdamW",
    TODAY_CLIPPED,
    "schedule_free AdamW",
)
HOST_GROUP_ROWS: tuple[str, ...] = (BASELINE, "SGD + momentum", "RBWA", "EMA")


def selected(patterns: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows that match one of the patterns (all that are not slow if there are none), and always
    the first, which is the baseline.

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
        or row is rows[0]
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


def _trained_adamw(capturable: bool = False) -> tuple[Row, ...]:
    """The same with AdamW, whose baseline is torch's."""
    options = {"backend": "auto", "capturable": capturable}
    return (
        *named((ADAMW_BASELINE, "torch AdamW foreach")),
        *(_row(name, **options) for name in ("AdamW", "AdamW + EMA")),
        _row("AdamW + EMA, clipped", **options, clipped=True),
        _row("AdamW + EMA" + IN_BACKWARD, **options, in_backward=True),
        *named(("AdamW fused + Averager (EMA)", TODAY_ADAMW, TODAY_CLIPPED)),
    )


TRAINED = _trained()
ON_GPU = (*TRAINED, *BY_HAND)
CAPTURED = (*_trained(capturable=True), *BY_HAND)  # what cannot be captured says so
TRAINED_ADAMW, CAPTURED_ADAMW = _trained_adamw(), _trained_adamw(capturable=True)


# ---- optimizer steps on a GPU: by torch, by hand, ours; some under a graph

GPU_TODAY: tuple[Row, ...] = (
    Row(BASELINE, "baseline", today.torch_sgd("fused")),
    Row("torch SGD foreach", "baseline", today.torch_sgd("foreach")),
    Row("fused + AveragedModel (EMA)", "today", today.averaged_model("ema")),
    Row("RBWA: fused + AveragedModel + copy back", "today", today.averaged_model("rbwa")),
    *BY_HAND,
    *named((ADAMW_BASELINE, TODAY_ADAMW, TODAY_CLIPPED)),
)
APEX = Row("apex FusedSGD", "baseline", today.apex_sgd, needs="amp_C")  # apex's own extension
GPU_OURS = (
    *("SGD + momentum", "RBWA", "RBWA-E", "RSGDM", "EMA", "SWA", "EMA every 10"),
    *("AdamW", "AdamW + EMA", "Schedule-Free AdamW"),
)
GPU_CLIPPED = ("SGD + momentum", "AdamW + EMA")
GPU_CAPTURED = ("SGD + momentum", "RBWA", "EMA")
CAPTURED_BACKEND = "cuda"


def under_graph(row: Row, device: Capturing) -> Row:
    """The same row, replayed by a CUDA graph."""
    build = captured(row.build, device)
    return replace(row, name=f"{row.name}, graph", build=build, captured=True)


def gpu_rows(backends: Sequence[str], device: Capturing) -> list[Row]:
    """The table's rows in its order, ours once for each of these backends."""
    table = [*GPU_TODAY, *(under_graph(row, device) for row in GPU_TODAY), APEX]
    for backend in backends:
        for name in GPU_OURS:
            table.append(_row(f"{name}, {backend}", backend=backend))
        for name in GPU_CLIPPED:
            table.append(_row(f"{name}, clipped, {backend}", backend=backend, clipped=True))
    table += variants.rows(backends)
    for name in GPU_CAPTURED if CAPTURED_BACKEND in backends else ():
        row = _row(f"{name}, {CAPTURED_BACKEND}", backend=CAPTURED_BACKEND, capturable=True)
        table.append(under_graph(row, device))
    return table
