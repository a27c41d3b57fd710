"""The step as an operator: which backends there are, and one typed door to each."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rbwa_fused import reference

_C: Any = None
_missing = ""
try:
    _C = importlib.import_module("rbwa_fused._C")
except ImportError as error:
    _missing = str(error)

BACKENDS = ("cpu", "reference")
BUILD_HINT = (
    "the CPU kernels are not built; with a C++ compiler at hand run "
    "`pip install --no-build-isolation --force-reinstall --no-deps .` in rbwa_fused's folder"
)

Grads = list[Tensor | None]
Step = Callable[[list[Tensor], Grads, list[Tensor], Tensor, Tensor, Tensor, Tensor], None]


def step_cpu(
    params: list[Tensor],
    grads: Grads,
    state: list[Tensor],
    segments: Tensor,
    shapes: Tensor,
    rows: Tensor,
    samplings: Tensor,
) -> None:
    """Takes the step in place, in one pass.

    Args:
        params: n dense tensors in the layout that the tables were made for.
        grads: n gradients in their parameters' dtype, shape and layout, or None.
        state: the flat buffers that the streams lie in.
        segments: (n, COLUMNS) int64, see flat.py.
        shapes: 1-d int64, sizes and strides.
        rows: (n_rows, 9) float64, see rules.py.
        samplings: (n_samplings, 5) float64, see rules.py.

    Raises:
        RuntimeError: for a parameter or gradient that does not fit the tables; nothing has been
            changed then.
    """
    if _direct is None or torch.autograd._profiler_enabled():
        torch.ops.rbwa_fused.step_.default(params, grads, state, segments, shapes, rows, samplings)
    else:
        _direct(params, grads, state, segments, shapes, rows, samplings)


def step_reference(
    params: list[Tensor],
    grads: Grads,
    state: list[Tensor],
    segments: Tensor,
    shapes: Tensor,
    rows: Tensor,
    samplings: Tensor,
) -> None:
    """`step_cpu` in plain PyTorch, on any device. The caller has checked that everything fits."""
    reference.step_(params, grads, state, segments, rows, samplings)


def exchange_(a: list[Tensor], b: list[Tensor]) -> None:
    """Exchanges the contents of each a[i] and b[i]: dense tensors of one dtype and layout."""
    kernel = _C is not None and all(t.device.type == "cpu" for t in a)
    if kernel and a:
        torch.ops.rbwa_fused.exchange_.default(a, b)
        return
    for left, right in zip(a, b, strict=True):
        kept = left.clone()
        left.copy_(right)
        right.copy_(kept)


def choose(backend: str, device: torch.device) -> tuple[str, Step]:
    """The backend that serves tensors of a device, by name or by ``"auto"``.

    Raises:
        ValueError: for a name that there is not.
        RuntimeError: for a backend that is not built or does not serve the device.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"Invalid backend: {backend!r} (expected one of {('auto', *BACKENDS)})")
    if backend == "reference":
        return "reference", step_reference
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpu' does not serve parameters on {device}")
    if device.type == "cpu" and _C is not None:
        return "cpu", step_cpu
    if backend == "cpu":
        raise RuntimeError(f"backend 'cpu': {BUILD_HINT} ({_missing})")
    return "reference", step_reference


def warn_of_reference(device: torch.device) -> None:
    """Says why ``"auto"`` came down to the reference."""
    why = BUILD_HINT if device.type == "cpu" else f"there are no kernels for {device.type} yet"
    warnings.warn(f"rbwa_fused runs its slow PyTorch reference: {why}", stacklevel=6)


_direct: Step | None = getattr(_C, "step", None)
if _C is not None:
    torch.library.register_fake("rbwa_fused::step_", lambda *tables: None)
    torch.library.register_fake("rbwa_fused::exchange_", lambda a, b: None)
