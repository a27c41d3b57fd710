"""The papers' algorithms as they are printed, one function each, to be read beside the paper.

They take ``gradient(weights, t) -> Tensor`` for batch t = 1, 2, … and return the weights after each
batch. Nothing of the package uses them: they are what its tests compare it with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
