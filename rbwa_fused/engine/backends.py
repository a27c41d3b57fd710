"""Which backends there are, and which one serves a device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rbwa_fused import compiled, reference
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.doors import Backend, Call, Grads, door, squares_door
from rbwa_fused.engine.memory import is_dense, is_plain, same_layout
from rbwa_fused.engine.segments import Table

BACKENDS = ("cpu", "cuda", "triton", "reference")
MOST_REPLICAS = 4000  # whose addresses are kernel arguments of one launch
OWN = ("rbwa_fused", "torch")  # whose frames are not the user's
# The compiled modules, or None with the reason why.
_C, CPU_MISSING = compiled.load("_C")
_C_cuda, CUDA_MISSING = compiled.load("_C_cuda") if _C is not None else (None, CPU_MISSING)


def _reference(
    params: list[Tensor],
    grads: Grads,
    table: Table,
    counters: DeviceCounters | None = None,
    clip: Tensor | None = None,
) -> Call:
    """The step in plain PyTorch, on any device. The caller has checked that everything fits."""
    return reference.step_, params, grads, table, clip


def _advance_cuda(d: DeviceCounters) -> None:
    counted = d.counts, d.policies, d.samplings64, d.samplings32, d.marks
    torch.ops.rbwa_fused.advance_.default(*counted, d.found_inf, d.schedules)


CPU = Backend("cpu", door(_C), checks=True, sum_squares=squares_door(_C))
CUDA = Backend("cuda", door(_C_cuda), True, _advance_cuda, squares_door(_C_cuda))
REFERENCE = Backend("reference", _reference, checks=False)


def pull_(replicas: Sequence[Sequence[Tensor]], alpha: float) -> None:
    """Pulls each parameter of K models to its mean: K lists, equal in shapes, dtypes and devices.

    In one pass where a kernel serves the device and a parameter is dense in one layout, in plain
    torch elsewhere; the bits are the same.
    """
    modules = {"cpu": _C, "cuda": _C_cuda}
    fused: dict[torch.device, list[tuple[Tensor, ...]]] = {}
    for param in zip(*replicas, strict=True):
        first = param[0]
        alike = all(p.stride() == first.stride() or same_layout(p, first) for p in param)
        dense = first.is_contiguous() or is_dense(first)
        if (
            alike
            and dense
            and all(map(is_plain, param))
            and modules.get(first.device.type) is not None
            and len(param) <= MOST_REPLICAS
        ):
            fused.setdefault(first.device, []).append(param)
        else:
            reference.pull_(param, alpha)
    for params in fused.values():
        model_by_model = [p for model in zip(*params, strict=True) for p in model]
        torch.ops.rbwa_fused.pull_.default(model_by_model, len(replicas), alpha)


def choose(backend: str, device: torch.device) -> Backend:
    """The backend that serves tensors of a device, by name or by ``"auto"``.

    Raises:
        ValueError: for a name that there is not.
        RuntimeError: for a backend that is not built or does not serve the device.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"Invalid backend: {backend!r} (expected one of {('auto', *BACKENDS)})")
    if backend == "reference":
        return REFERENCE
    if backend == "auto":
        for name in BACKENDS:
            if (
                not (name == "triton" and device.type == "cpu")
                and unavailable(name, device) is None
            ):
                return choose(name, device)
    why = unavailable(backend, device)
    if why is not None:
        raise RuntimeError(f"backend {backend!r}: {why}")
    if backend == "triton":
        from rbwa_fused.triton_kernels import norm, step

        return Backend("triton", step.prepare, False, step.advance_triton, norm.sum_squares)
    return CPU if backend == "cpu" else CUDA


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve tensors of a device, or None if it can."""
    if backend == "triton":
        try:
            from rbwa_fused.triton_kernels.step import available
        except ModuleNotFoundError:  # it gets into the package by an install
            return f"{compiled.in_source_folder()}, where there is no rbwa_fused.triton_kernels"
        return available(device)
    if backend in ("cpu", "cuda") and device.type != backend:
        return f"it does not serve parameters on {device}"
    if backend == "cpu" and _C is None:
        return CPU_MISSING
    if backend == "cuda" and _C_cuda is None:
        return CUDA_MISSING
    return None


def warn_of_reference(device: torch.device) -> None:
    """Says why ``"auto"`` came down to the reference."""
    asked = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ("triton",))
    why = "; ".join(str(unavailable(name, device)) for name in asked)
    warnings.warn(f"rbwa_fused runs its slow PyTorch reference: {why}", stacklevel=user_level())


def user_level() -> int:
    """The stack level, for the caller, of the first frame outside this package and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in OWN:
        frame, level = frame.f_back, level + 1
    return level


if _C is not None:
    torch.library.register_fake("rbwa_fused::step_", lambda *tables: None)
    torch.library.register_fake("rbwa_fused::pull_", lambda params, replicas, alpha: None)
    torch.library.register_fake("rbwa_fused::sum_squares_", lambda grads, sums: None)
if _C_cuda is not None:
    torch.library.register_fake("rbwa_fused::step_deferred_", lambda *tables: None)
    torch.library.register_fake("rbwa_fused::advance_", lambda *tables: None)
