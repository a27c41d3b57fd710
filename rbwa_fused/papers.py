"""The papers' algorithms as they are printed, one function each, to be read beside the paper.

They take ``gradient(weights, t) -> Tensor`` for batch t = 1, 2, … and return the weights after each
batch; those at the end take these weights and return their average. Nothing of the package uses
them: they are what its tests compare it with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

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


def half_life_ema(path: Sequence[Tensor], half_life: float, every: int) -> Tensor:
    """The mean of the samples, each half as heavy as one that is half_life steps younger."""
    average = path[every - 1]
    for t in range(2 * every, len(path) + 1, every):
        beta = 0.5 ** (every / half_life)
        average = beta * average + (1 - beta) * path[t - 1]
    return average


def power_ema(path: Sequence[Tensor], gamma: float, start: int, every: int) -> Tensor:
    """Karras et al. 2024, eq. 1 and 2: beta(t) = (1 - 1/t)^(gamma + 1), where the 1 is the time
    between samples."""
    average = path[start + every - 1]
    sampled = start + every
    for step in range(start + 2 * every, len(path) + 1, every):
        t = step - start
        beta = (1 - (step - sampled) / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * path[step - 1]
        sampled = step
    return average


def decays(samples: int, decay: str) -> list[float]:
    """What a learning rate is multiplied by behind each of so many steps, 1 before the first."""
    f = {
        "linear": lambda x: 1 - x,
        "sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }[decay]
    return [f(i / samples) for i in range(samples + 1)]


def merged(path: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Checkpoints merged in place of a decay (WSM, Tian et al. 2025): theta_j has the weight
    c_j = f_(j-1) - f_j, where f are the factors of the learning rate."""
    weights = [before - behind for before, behind in pairwise(factors)]
    return sum((c * w for c, w in zip(weights[1:], path[1:], strict=True)), weights[0] * path[0])


def decayed(w: Tensor, gradients: Sequence[Tensor], lr: float, factors: Sequence[float]) -> Tensor:
    """SGD on given gradients, with a learning rate that decays."""
    for g, f in zip(gradients, factors, strict=True):
        w = w - lr * f * g
    return w


def tabled(path: Sequence[Tensor], weights: Sequence[float], initial: Tensor | None) -> Tensor:
    """Samples with given weights; the last one is that of all later ones."""
    average = path[0] if initial is None else initial + weights[0] * (path[0] - initial)
    for i, w in enumerate(path[1:], start=1):
        average = average + weights[min(i, len(weights) - 1)] * (w - average)
    return average


def yolo_ema(path: Sequence[Tensor], initial: Tensor, decay: float, tau: float) -> Tensor:
    """ModelEMA of YOLOv5: a copy of the model, averaged with decay (1 - e^(-updates / tau))."""
    average = initial
    for updates, w in enumerate(path, start=1):
        d = decay * (1 - math.exp(-updates / tau))
        average = d * average + (1 - d) * w
    return average
