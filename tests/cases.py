"""What every backend runs: the rules of rules.py with averages, dtypes and parameter layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from rules import RULES
from torch import Tensor, nn

import rbwa_fused as rf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

AVERAGES: dict[str, rf.Average | None] = {
    "none": None,
    "mean": rf.mean(start=2, every=1),
    "mean-write-back": rf.mean(start=1, every=2, write_back_every=4),
    "ema": rf.ema(0.7, start=1, every=2),
    "swa-current": rf.swa(start=2, every=2, initial="current"),
    "ema-now": rf.ema(0.7, start=3, every=2, initial="now", offset=1),
    "rswa": rf.rswa(steps_per_epoch=2, start_epoch=1),
    "rbwa": rf.rbwa(steps_per_epoch=2, start_epoch=1),
    "algorithm2": rf.rbwa(steps_per_epoch=3, start_epoch=1, count="algorithm2"),
    "rbwa-e": rf.rbwa_e(0.6, steps_per_epoch=2, start_epoch=1),
    "lookahead": rf.lookahead(k=2, alpha=0.3),
    "switch-ema": rf.switch_ema(0.8, steps_per_epoch=3),
    "custom": rf.Average(lambda n, step: 0.5 / n + step / 100, write_back_every=3),
    "same-dtype": None,  # replaced by `policy_for`: an average in the parameter's own dtype
}

# Policies that differ in the weights of their samples alone, for what counts and weighs them.
SCHEDULES: dict[str, rf.Average] = {
    "half-life": rf.ema(half_life=5, start=1, every=2),
    "count": rf.ema(0.4, ramp=rf.ramp.count(floor=0.3), initial="current"),
    "inverse": rf.ema(0.97, every=2, ramp=rf.ramp.inverse(1.5, 0.75)),
    "exponential": rf.ema(half_life=30, ramp=rf.ramp.exponential(4)),
    "both": rf.ema(0.9, half_life=30, ramp=rf.ramp.inverse()),
    "power": rf.power_ema(0.1, start=2, every=3),
    "power-now": rf.power_ema(gamma=0.5, start=1, every=3, offset=2, initial="now"),
    "linear": rf.merge(3, 6),
    "sqrt": rf.merge(2, 11, "sqrt", every=2),
    "cosine": rf.merge(1, 14, "cosine", every=2),
    "weights": rf.merge(2, decay=[1, 0, 2, 5], every=2),
    "table": rf.table([0.9, 0.5, 0.25], every=2, write_back_every=4, initial="current"),
    "table-first": rf.table([0.9, 0.5, 0.25], start=1),
}

# Several averages in one pass, of which only the first may be written back.
SEVERAL: dict[str, list[rf.Average]] = {
    "three": [
        rf.ema(0.7, start=1, every=2),
        rf.swa(start=2, every=2, initial="current"),
        rf.ema(0.6, start=3, every=2, initial="now", offset=1),
    ],
    "lookahead-and-mean": [rf.lookahead(k=2, alpha=0.3), rf.mean(start=2)],
    "rbwa-and-ema": [rf.rbwa(steps_per_epoch=2, start_epoch=1), rf.ema(0.6)],
    "custom-behind": [rf.mean(), rf.Average(lambda n, step: 0.5 / n + step / 100, start=2)],
}

STEPS = 8


def policy_for(name: str, rule: str, dtype: torch.dtype) -> Any:
    if name in SEVERAL:
        return SEVERAL[name]
    if name == "same-dtype":
        return rf.Average(rf.Ema(0.5), start=1, dtype=RULES[rule].kept(dtype))
    return SCHEDULES.get(name) or AVERAGES[name]


def products(
    dtypes: Iterable[torch.dtype], rules: Iterable[str], averages: Iterable[str]
) -> list[tuple[torch.dtype, str, str]]:
    """All combinations, but for masters of parameters that have none, and for averages that are
    written back by a rule that cannot have them."""
    return [
        (dtype, rule, average)
        for dtype, rule, average in itertools.product(dtypes, rules, averages)
        if (not RULES[rule].master or RULES[rule].kept(dtype) != dtype)
        and RULES[rule].takes(policy_for(average, rule, dtype))
    ]


def params(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Sizes around vector widths, several chunks, and every layout that a user may bring."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = [random(n) for n in (0, 1, 7, 8, 9, 15, 17, 33, 4097)]
    tensors += [
        random(),  # 0-dimensional
        random(64, 65),
        random(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        random(6, 5).t(),
        random(3).as_strided((1, 3, 1), (7, 1, 5)),  # strides that mean nothing
        random(41)[1:],  # off the alignment, and its storage is larger
        random(12, 7)[:, ::2],  # not dense
        random(300)[3:103].view(10, 10),
        random(700),  # the last vectors of a block: 16 bytes of float64, of float32
        random(1100),
    ]
    return [nn.Parameter(t) for t in tensors]


def moved(tensor: Tensor, device: str) -> Tensor:
    """The same view of the same storage on another device: strides, offset and all."""
    storage = tensor.detach().untyped_storage().to(device=torch.device(device))
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """Non-zero gradients of a step, in the parameters' dtypes; some in another layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    grads = []
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)  # on the CPU
        if (i + step) % 3 == 0 and p.dim() == 4:
            g = g.contiguous(memory_format=torch.channels_last)
        if (i + step) % 4 == 0 and p.dim() == 1:  # a view off the alignment, as DDP's buckets are
            g = torch.cat([g[:1], g])[1:]
        grads.append(g)
    return grads
