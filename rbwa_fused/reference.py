"""The update in plain PyTorch: what the kernels are compared with, and a backend of its own.

`update` mirrors csrc/update.h with the same local names; `step_` walks the same tables as the
kernels and runs wherever torch runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from rbwa_fused.engine.segments import COLUMN_OF, LENGTH, ROW, SAMPLING, Table, ages_of, tell
from rbwa_fused.rules import COLUMNS, KEPT_BY, Kind, aging, is_adam, mixes
from rbwa_fused.streams import AVERAGE, MASTER

Element = dict[str, Tensor]  # by the names of csrc/update.h: theta, and of g, m, z … what there is


def update(k: SimpleNamespace, kind: Kind, e: Element) -> None:
    """Lines (1)-(5) in place, on tensors of one shape; and line (6) for the averages beside the
    first, each with its sampling in ``k.further``.

    Arithmetic is float32, or float64 for float64; each result is rounded once, where it is stored.
    """
    wide = torch.float64 if e["theta"].dtype == torch.float64 else torch.float32
    old = {name: value.to(wide) for name, value in e.items()}
    theta = x = old["theta"]
    if kind != Kind.SAMPLE:
        g = k.s * old["g"]
        if kind == Kind.SCHEDULE_FREE:
            g = g / _divisor(k, e, old, g)
        g = g + k.lambda_ * theta if k.lambda_ != 0 else g  # (1)
        direction = g
        if "m" in e:
            m = k.mu * old["m"] + k.c * g  # (2)
            e["m"].copy_(m)
            direction = k.gamma * m
            if k.alpha != 0 and mixes(kind):
                direction = k.alpha * g + direction
        if "z" in e:
            z = k.mu * old["z"] + k.kappa * (g - old["previous"])  # (2) for the difference
            e["z"].copy_(z)
            e["previous"].copy_(g)
            direction = direction + k.delta * z
        if "v" in e and kind != Kind.SCHEDULE_FREE:
            direction = direction / _divisor(k, e, old, g)
        if k.rho != 0 and (kind == Kind.DECOUPLED or is_adam(kind)):
            direction = direction + k.rho * theta
        x = theta - k.eta * direction  # (3)
    if "a" in e:
        a = _toward(k.w, theta if k.current else old["a"], x)  # (4)
        e["a"].copy_(a)
        x = a if k.write_back else x  # (5)
    for further, (w, current) in k.further:
        further.copy_(_toward(w, theta if current else further.to(wide), x))  # (6)
    e["theta"].copy_(x)


def _toward(w: float, a: Tensor, x: Tensor) -> Tensor:
    """An average and its sample."""
    if w == 0:
        return a
    return x if w == 1 else a + w * (x - a)


def _divisor(k: SimpleNamespace, e: Element, old: Element, g: Tensor) -> Tensor:
    """Line (2) for v, and what it divides by."""
    v = k.nu * old["v"] + (k.q * g) * g
    e["v"].copy_(v)
    if "v_max" in e:
        v = torch.where(v <= old["v_max"], old["v_max"], v)
        e["v_max"].copy_(v)
    return _root(v) * k.bias + k.epsilon


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    table: Table,
    clip: Tensor | None = None,
) -> None:
    """The step for every segment of a table; gradients in their parameters' layout.

    Coefficients are rounded to the arithmetic of their segment first, as in the kernels. A master
    follows a parameter that somebody has written to since it was rounded from it. ``clip``
    multiplies the gradients.
    """
    segments = table.segments.tolist()
    further: dict[int, list[list[int]]] = {}
    for i, *own in [] if table.further is None else table.further.tolist():
        further.setdefault(i, []).append(own)
    ages = ages_of(segments, table.state, table.ages.tolist())
    for i, columns in enumerate(segments):
        length = columns[LENGTH]
        theta = _in_memory_order(params[i].detach(), length)
        grad = grads[i]
        kind = Kind(int(table.rows[columns[ROW], 0]))
        held = {
            name: table.state[columns[column]]
            for name, column in COLUMN_OF.items()
            if columns[column] != -1
        }
        first = bool(KEPT_BY[kind]) and ages[i] == 0 and not is_adam(kind)
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        scale, w, sample, *flags = table.samplings[columns[SAMPLING]].to(wide)
        row = table.rows[columns[ROW] + first]
        own = torch.tensor(aging(row.tolist(), ages[i]), dtype=torch.float64, device="cpu")
        bias, eta, rho = own.to(wide)
        numbers = torch.stack([*row.to(wide)[:-2], rho, eta * scale, bias, w, *flags]).tolist()
        names = (*COLUMNS, "bias", "w", "current", "write_back")
        k = SimpleNamespace(**dict(zip(names, numbers, strict=True)))
        if clip is not None:
            k.s = k.s * clip.to(wide)
        if grad is None:
            kind = Kind.SAMPLE
        e = {"theta": held.get(MASTER, theta)}
        if grad is not None:
            e["g"] = _in_memory_order(grad.detach(), length)
            e |= {name: held[name] for name in KEPT_BY[kind]}
        if sample != 0 and AVERAGE in held:
            e["a"] = held[AVERAGE]
        k.further = []
        for at, sampling in further.get(i, ()):
            _, w, sample, current, _ = table.samplings[sampling].to(wide).tolist()
            if sample != 0:
                k.further.append((table.state[at], (w, current)))
        if kind == Kind.SAMPLE and "a" not in e and not k.further:
            continue
        if MASTER in held:
            master = held[MASTER]
            master.copy_(torch.where(master.to(theta.dtype) == theta, master, theta.float()))
        update(k, kind, e)
        if MASTER in held:
            theta.copy_(held[MASTER])
        ages[i] += bool(KEPT_BY[kind])
    table.ages.copy_(torch.tensor(ages, device="cpu"))
    tell(segments, table.state, ages)


def _root(v: Tensor) -> Tensor:
    """A square root, rounded to nearest. On the CPU torch.sqrt is MKL's, which misses that in 0.6 %
    of numbers, by one unit."""
    if v.device.type != "cpu":
        return v.sqrt()
    if v.dtype == torch.float32:
        return v.double().sqrt().float()
    return v.clone().apply_(lambda x: math.sqrt(x) if x >= 0.0 else math.nan)


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
