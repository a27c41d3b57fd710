"""The update in plain PyTorch: what the kernels are compared with, and a backend of its own.

`update` mirrors csrc/update.h with the same local names; `step_` walks the same tables as the
kernels and runs wherever torch runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rbwa_fused.engine.segments import COLUMN_OF, LENGTH, ROW, SAMPLING
from rbwa_fused.streams import STREAMS

MU = 2  # column of the table of rows


class Coefficients(NamedTuple):
    """What the tables say of one segment; the names of csrc/update.h."""

    s: float
    lambda_: float
    mu: float
    c: float
    kappa: float
    alpha: float
    gamma: float
    delta: float
    eta: float
    w: float
    current: float
    write_back: float


def update(
    k: Coefficients,
    theta: Tensor,
    g: Tensor | None,
    m: Tensor | None,
    z: Tensor | None,
    previous: Tensor | None,
    a: Tensor | None,
) -> None:
    """Lines (1)-(5) in place, on tensors of one shape; None is a stream that the segment lacks.

    Arithmetic is float32, or float64 for float64; each result is rounded once, where it is stored.
    """
    wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
    x = theta.to(wide)
    if g is not None:
        g = k.s * g.to(wide)
        g = g + k.lambda_ * x if k.lambda_ != 0 else g  # (1)
        direction = g
        if m is not None:
            new_m = k.mu * m.to(wide) + k.c * g  # (2)
            m.copy_(new_m)
            direction = k.alpha * g + k.gamma * new_m if k.alpha != 0 else k.gamma * new_m
        if z is not None and previous is not None:
            new_z = k.mu * z.to(wide) + k.kappa * (g - previous.to(wide))  # (2), the difference
            z.copy_(new_z)
            previous.copy_(g)
            direction = direction + k.delta * new_z
        x = x - k.eta * direction  # (3)
    if a is not None:
        average = theta.to(wide) if k.current else a.to(wide)
        if k.w != 0:
            average = x if k.w == 1 else average + k.w * (x - average)  # (4)
        a.copy_(average)
        x = average if k.write_back else x  # (5)
    theta.copy_(x)


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Sequence[Tensor],
    segments: Tensor,
    rows: Tensor,
    samplings: Tensor,
) -> None:
    """The step for every segment of a table; gradients in their parameters' layout.

    Coefficients are rounded to the arithmetic of their segment first, as in the kernels. A master
    follows a parameter that somebody has written to since it was rounded from it.
    """
    for param, grad, columns in zip(params, grads, segments.tolist(), strict=True):
        length = columns[LENGTH]
        theta = _in_memory_order(param.detach(), length)
        g = None if grad is None else _in_memory_order(grad.detach(), length)
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        scale, w, sample, *flags = samplings[columns[SAMPLING]].to(wide)
        *rule, eta = rows[columns[ROW]].to(wide)
        k = Coefficients(*torch.stack([*rule, eta * scale, w, *flags]).tolist())
        momentum = rows[columns[ROW], MU] != 0  # also where the arithmetic rounds it to 0
        streams: dict[str, Tensor | None] = dict.fromkeys(STREAMS)
        for name, column in COLUMN_OF.items():
            buffer, offset = columns[column : column + 2]
            touched = {"average": sample != 0, "master_param": True}.get(name, momentum)
            if buffer != -1 and touched:
                streams[name] = state[buffer][offset : offset + length]
        m, a, z, previous, master = streams.values()
        if g is None and a is None:
            continue
        if master is None:
            update(k, theta, g, m, z, previous, a)
        else:
            master.copy_(torch.where(master.to(theta.dtype) == theta, master, theta.float()))
            update(k, master, g, m, z, previous, a)
            theta.copy_(master)


def _in_memory_order(tensor: Tensor, length: int) -> Tensor:
    return tensor.as_strided((length,), (1,))


def mean(replicas: Sequence[Tensor]) -> Tensor:
    """The mean of one parameter over K models, in the arithmetic's dtype; the names of update.h."""
    wide = torch.float64 if replicas[0].dtype == torch.float64 else torch.float32
    first = replicas[0].detach().to(wide)
    distance = torch.zeros_like(first)
    for theta in replicas[1:]:
        distance = distance + (theta.detach().to(wide) - first)
    share = _rounded(1.0 / len(replicas), wide)
    return first + share * distance


def pull_(replicas: Sequence[Tensor], alpha: float) -> None:
    """One parameter of K models, each pulled to their mean in place; any layouts."""
    average = mean(replicas)
    alpha = _rounded(alpha, average.dtype)
    if alpha == 0:
        return
    for replica in replicas:
        theta = replica.detach().to(average.dtype)
        replica.detach().copy_(pulled_(average.clone(), theta, alpha))


def pulled_(average: Tensor, theta: Tensor, alpha: float) -> Tensor:
    """Weights that are pulled to their average, in its place; both in the arithmetic's dtype."""
    if _rounded(alpha, average.dtype) == 1:
        return average
    return correction_(average, theta, alpha).add_(theta)


def correction_(average: Tensor, theta: Tensor, alpha: float) -> Tensor:
    """What a pull adds to weights, in the place of their average."""
    return average.sub_(theta).mul_(alpha)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as the arithmetic has it; on the host, whatever torch.set_default_device says."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))
