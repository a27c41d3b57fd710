"""Averages beside others' optimizers: a model, optimizers, and each policy as a literal loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import bits
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import rbwa_fused as rf

STEPS = 13
Weights = list[Tensor]


class Net(nn.Module):
    """Layers that differ in shape, one that is tied, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.again = self.first
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.last = nn.Linear(7, 3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=made)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(torch.tanh(self.again(x))).relu())  # type: ignore[no-any-return]


class Normed(nn.Module):
    """With statistics, a count, a buffer that is assigned anew, and one that is not saved."""

    scale: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = 0.5 * self.scale + x.detach().mean()  # another tensor each time
            self.cache.add_(1)
        return self.norm(self.first(x)) * self.scale.sum()  # type: ignore[no-any-return]


FLOATING = ("scale", "cache", "norm.running_mean", "norm.running_var")  # of Normed


def loss(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return net(x.to(next(net.parameters()).dtype)).square().mean()  # type: ignore[no-any-return]


def train(net: nn.Module, optimizers: list[Any], first: int, last: int, after: Any = None) -> None:
    for step in range(first, last + 1):
        for opt in optimizers:

            def closure(opt: Any = opt, step: int = step) -> Tensor:
                opt.zero_grad()
                value = loss(net, step)
                value.backward()
                return value

            opt.step(closure)
        if after is not None:
            after(step)


# ---- the policies, as loops over what the optimizer leaves ---------------------------------------


def ema(a: Weights, x: Weights, n: int, step: int) -> bool:
    _towards(a, x, 1.0 if n == 0 else 1 - 0.75)
    return False


def mean_of_ends(a: Weights, x: Weights, n: int, step: int) -> bool:
    if step > 2 and (step - 2) % 3 == 0:
        _towards(a, x, 1 / (n + 1))
    return False


def rbwa(a: Weights, x: Weights, n: int, step: int) -> bool:
    if step > 4:
        _towards(a, x, 1 / (n + 1))
    return step > 4


def rbwa_e(a: Weights, x: Weights, n: int, step: int) -> bool:
    if step > 4:
        _towards(a, x, 1.0 if n == 0 else 1 - 0.75)
    return step > 4


def rswa(a: Weights, x: Weights, n: int, step: int) -> bool:
    end = step > 4 and (step - 4) % 4 == 0
    if end:
        _towards(a, x, 1 / (n + 1))
    return end


def lookahead(a: Weights, x: Weights, n: int, step: int) -> bool:
    """`a` begins as the initial weights, which are a sample."""
    if step % 3 == 0:
        _towards(a, x, 0.25)
    return step % 3 == 0


def swa_from(a: Weights, x: Weights, n: int, step: int) -> bool:
    """`a` begins as the weights behind step 2, which are a sample."""
    if step == 2:
        _towards(a, x, 1.0)
    elif step > 2 and (step - 2) % 3 == 0:
        _towards(a, x, 1 / (n + 1))
    return False


def ema_from_now(a: Weights, x: Weights, n: int, step: int) -> bool:
    """`a` begins as the initial weights; samples behind steps 5, 8, 11."""
    if step in (5, 8, 11):
        _towards(a, x, 1 - 0.75)
    return False


def switch_ema(a: Weights, x: Weights, n: int, step: int) -> bool:
    _towards(a, x, 1.0 if n == 0 else 1 - 0.75)
    return step % 5 == 0


def function(a: Weights, x: Weights, n: int, step: int) -> bool:
    _towards(a, x, 1.0 if n == 0 else 3 / (3 + step))
    return False


def _towards(a: Weights, x: Weights, w: float) -> None:
    for average, weight in zip(a, x, strict=True):
        average.copy_(weight if w == 1.0 else average + w * (weight - average))


POLICIES: dict[str, tuple[rf.Average, Callable[..., bool]]] = {
    "ema": (rf.ema(0.75), ema),
    "mean": (rf.mean(start=2, every=3), mean_of_ends),
    "rbwa": (rf.rbwa(4, 1), rbwa),
    "rbwa_e": (rf.rbwa_e(0.75, steps_per_epoch=4, start_epoch=1), rbwa_e),
    "rswa": (rf.rswa(4, 1), rswa),
    "lookahead": (rf.lookahead(3, 0.25), lookahead),
    "swa current": (rf.swa(start=2, every=3, initial="current"), swa_from),
    "ema now": (rf.ema(0.75, start=4, every=3, initial="now", offset=1), ema_from_now),
    "switch_ema": (rf.switch_ema(0.75, steps_per_epoch=5), switch_ema),
    "function": (rf.Average(lambda n, step: 3 / (3 + step)), function),
}


def trainable(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def two(net: nn.Module) -> list[Any]:
    params = trainable(net)
    return [
        torch.optim.SGD(params[:2], lr=0.05, momentum=0.5),
        torch.optim.RMSprop(params[2:], lr=0.01),
    ]


def muon(net: nn.Module) -> list[Any]:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    matrices = [p for p in trainable(net) if p.dim() == 2]
    rest = [p for p in trainable(net) if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "AdamW": lambda net: [torch.optim.AdamW(trainable(net), lr=0.01, foreach=False)],
    "AdamW foreach": lambda net: [torch.optim.AdamW(trainable(net), lr=0.01, foreach=True)],
    "AdamW fused": lambda net: [torch.optim.AdamW(trainable(net), lr=0.01, fused=True)],
    "RMSprop": lambda net: [torch.optim.RMSprop(trainable(net), lr=0.01)],
    "LBFGS": lambda net: [torch.optim.LBFGS(trainable(net), lr=0.1, max_iter=3)],
    "Muon": muon,
    "two": two,
    "FusedSGD": lambda net: [rf.FusedSGD(trainable(net), lr=0.05, momentum=0.5)],
}


def adamw(net: nn.Module, **options: Any) -> Any:
    return torch.optim.AdamW(trainable(net), lr=0.01, **options)


def as_bits(value: Any) -> Any:
    return tree_map_only(Tensor, bits, value)


def ends(net: nn.Module, averager: rf.Averager) -> Any:
    return as_bits((list(net.parameters()), averager.state_dict(), averager.n_averaged))
