"""The update in plain PyTorch, and the papers' algorithms as they are printed.

`update` mirrors csrc/update.h with the same local names; `step_` walks the same tables as the
kernels and runs wherever torch runs. The functions below them are oracles, one per paper, written
to be read beside it: they take ``gradient(weights, t) -> Tensor`` for batch t = 1, 2, … and return
the weights after each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rbwa_fused.flat import LENGTH, ROW, SAMPLING, STREAMS

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
    """The step for every segment of the tables (flat.py); gradients in their parameters' layout.

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
        for name, column in STREAMS.items():
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


Gradient = Callable[[Tensor, int], Tensor]


def sgd(w: Tensor, gradient: Gradient, lr: float, steps: int) -> list[Tensor]:
    """Plain SGD, the inner step of every averaging algorithm below."""
    path = []
    for t in range(1, steps + 1):
        w = w - lr * gradient(w, t)
        path.append(w)
    return path


def sgdm(w: Tensor, gradient: Gradient, lr: float, beta: float, steps: int) -> list[Tensor]:
    """SGD with momentum as the RSGDM paper writes it."""
    m = torch.zeros_like(w)
    path = []
    for t in range(1, steps + 1):
        m = beta * m + (1 - beta) * gradient(w, t)
        w = w - lr * m
        path.append(w)
    return path


def rsgdm(w: Tensor, gradient: Gradient, lr: float, beta: float, steps: int) -> list[Tensor]:
    """RSGDM, Algorithm 1 of its paper: momentum plus beta times the average difference."""
    m = torch.zeros_like(w)
    z = torch.zeros_like(w)
    previous = None
    path = []
    for t in range(1, steps + 1):
        g = gradient(w, t)
        difference = torch.zeros_like(g) if previous is None else g - previous
        m = beta * m + (1 - beta) * g
        z = beta * z + (1 - beta) * difference
        w = w - lr * (m + beta * z)
        previous = g
        path.append(w)
    return path


def swa(
    w: Tensor, gradient: Gradient, lr: float, steps: int, start: int, cycle: int
) -> tuple[list[Tensor], Tensor]:
    """SWA: w_swa <- (w_swa n_models + w) / (n_models + 1) at each cycle's end.

    The RBWA paper's Algorithm 1 loops from 0 and so prints another phase; cycle ends are meant.
    """
    w_swa = w
    n_models = 0
    path = []
    for t in range(1, steps + 1):
        w = w - lr * gradient(w, t)
        if t > start and (t - start) % cycle == 0:
            w_swa = (w_swa * n_models + w) / (n_models + 1)
            n_models += 1
        path.append(w)
    return path, w_swa


def rswa(
    w: Tensor, gradient: Gradient, lr: float, epochs: int, batches: int, c: int
) -> list[Tensor]:
    """RSWA: SWA of epoch ends whose average the training goes on from, after epoch c."""
    w_rswa = w
    path = []
    for n in range(1, epochs + 1):
        for j in range(batches):
            w = w - lr * gradient(w, (n - 1) * batches + j + 1)
            path.append(w)
        if n > c:
            k = n - c - 1  # epochs averaged so far
            w_rswa = (w_rswa * k + w) / (k + 1)
            w = path[-1] = w_rswa
    return path


def rbwa(
    w: Tensor, gradient: Gradient, lr: float, epochs: int, batches: int, c: int, count: str
) -> list[Tensor]:
    """RBWA, eq. 1-2 (count "running", W_n = (1/n) sum W_i) or Algorithm 2 (count "algorithm2").

    Algorithm 2 prints ``n > c`` and ``(n - c) j`` with n also the number of epochs: n is read as
    the current epoch counted from 1, j as the batch counted from 0.
    """
    average = w
    samples = 0
    path = []
    for n in range(1, epochs + 1):
        for j in range(batches):
            w = w - lr * gradient(w, (n - 1) * batches + j + 1)
            if n > c:
                k = samples if count == "running" else (n - c) * j
                average = (average * k + w) / (k + 1)
                samples += 1
                w = average
            path.append(w)
    return path


def rbwa_e(
    w: Tensor, gradient: Gradient, lr: float, epochs: int, batches: int, c: int, beta: float
) -> list[Tensor]:
    """RBWA-E, eq. 4-5: E_1 = W_1, E_n = beta E_(n-1) + (1 - beta) W_n (eq. 5 makes the first
    sample a copy; line 2 of Algorithm 2 would not)."""
    e = None
    path = []
    for n in range(1, epochs + 1):
        for j in range(batches):
            w = w - lr * gradient(w, (n - 1) * batches + j + 1)
            if n > c:
                e = w if e is None else beta * e + (1 - beta) * w
                w = e
            path.append(w)
    return path


def ema(
    w: Tensor, gradient: Gradient, lr: float, steps: int, start: int, every: int, decay: float
) -> tuple[list[Tensor], Tensor]:
    """An exponential moving average beside the weights; its first sample is a copy."""
    average = None
    path = []
    for t in range(1, steps + 1):
        w = w - lr * gradient(w, t)
        if t > start and (t - start) % every == 0:
            average = w if average is None else decay * average + (1 - decay) * w
        path.append(w)
    return path, w if average is None else average


def lookahead(
    w: Tensor, gradient: Gradient, lr: float, steps: int, k: int, alpha: float
) -> list[Tensor]:
    """Lookahead (Zhang et al. 2019): phi <- phi + alpha (theta - phi) every k steps."""
    phi = w
    path = []
    for t in range(1, steps + 1):
        w = w - lr * gradient(w, t)
        if t % k == 0:
            phi = phi + alpha * (w - phi)
            w = phi
        path.append(w)
    return path


def switch_ema(
    w: Tensor, gradient: Gradient, lr: float, epochs: int, batches: int, decay: float
) -> list[Tensor]:
    """Switch-EMA (Li et al. 2024): the weights become their average at each epoch's end."""
    average = None
    path = []
    for n in range(epochs):
        for j in range(batches):
            w = w - lr * gradient(w, n * batches + j + 1)
            average = w if average is None else decay * average + (1 - decay) * w
            path.append(w)
        assert average is not None
        w = path[-1] = average
    return path


def elastic(
    models: list[Tensor],
    gradients: Sequence[Gradient],
    lr: float,
    epochs: int,
    batches: int,
    every: int,
) -> list[list[Tensor]]:
    """K models trained alone and, every few batches, pulled to their mean (the blog on it):
    theta_k <- theta_k + alpha (mean - theta_k), alpha = 1 - T / T_max, T finished epochs.

    T is 0 all through the first epoch, so what is pulled in it is equal. The shared-gradient update
    that the blog also writes is not well defined, and left out.
    """
    path = []
    for t in range(1, epochs * batches + 1):
        models = [w - lr * gradient(w, t) for w, gradient in zip(models, gradients, strict=True)]
        if t % every == 0:
            average = sum(models[1:], models[0]) / len(models)
            alpha = 1 - (t // batches) / epochs
            models = [w + alpha * (average - w) for w in models]
        path.append(models)
    return path
