"""What is timed on a GPU: torch's SGD, averages by torch or by hand, ours; some under a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.rows import today, variants
from benchmarks.rows.graph import Capturing, captured
from benchmarks.rows.providers import BASELINE, BY_HAND, METHODS, Row, ours

TODAY: tuple[Row, ...] = (
    Row(BASELINE, "baseline", today.torch_sgd("fused")),
    Row("torch SGD foreach", "baseline", today.torch_sgd("foreach")),
    Row("fused + AveragedModel (EMA)", "today", today.averaged_model("ema")),
    Row("RBWA: fused + AveragedModel + copy back", "today", today.averaged_model("rbwa")),
    *BY_HAND,
)
APEX = Row("apex FusedSGD", "baseline", today.apex_sgd, needs="amp_C")  # apex's own extension
OURS = ("SGD + momentum", "RBWA", "RBWA-E", "RSGDM", "EMA", "SWA", "EMA every 10")
OURS_CAPTURED = ("SGD + momentum", "RBWA", "EMA")
CAPTURED_BACKEND = "cuda"


def under_graph(row: Row, device: Capturing) -> Row:
    """The same row, replayed by a CUDA graph."""
    build = captured(row.build, device)
    return replace(row, name=f"{row.name}, graph", build=build, captured=True)


def rows(backends: Sequence[str], device: Capturing) -> list[Row]:
    """The table's rows in its order, ours once for each of these backends."""
    table = [*TODAY, *(under_graph(row, device) for row in TODAY), APEX]
    for backend in backends:
        for name in OURS:
            build = ours(*METHODS[name], backend=backend)
            table.append(Row(f"{name}, {backend}", "ours", build))
    table += variants.rows(backends)
    for name in OURS_CAPTURED if CAPTURED_BACKEND in backends else ():
        build = ours(*METHODS[name], backend=CAPTURED_BACKEND, capturable=True)
        table.append(under_graph(Row(f"{name}, {CAPTURED_BACKEND}", "ours", build), device))
    return table
