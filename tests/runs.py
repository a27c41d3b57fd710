"""Short training runs of every method that can be compared bit for bit, saved, and gone on with.

`resume` is what a new process does with the checkpoints that test_checkpoint.py leaves in a folder.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rules import PLAIN, RULES, Rule
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import rbwa_fused as rf

EPOCH = 4  # steps
STEPS = 13


def scheduled(n: int, step: int) -> float:
    """A custom weight; a function of a module, so that it can be pickled."""
    return 1.0 / (1.0 + 0.5 * n + 0.01 * step)


@dataclass(frozen=True)
class Method:
    """A rule with an average; called as the optimizer's class is."""

    rule: Rule
    average: Any = None

    def __call__(self, params: ParamsT, **more: Any) -> Any:
        return self.rule.made(params, average=self.average, **more)


# Every rule without an average, then averages over one of them. The first sample comes after step
# EPOCH where a method can start late; write-backs are at multiples of EPOCH, or at every step.
METHODS: dict[str, Method] = {name: Method(rule) for name, rule in PLAIN.items()}
for _name, _rule, _average in (
    ("rsgdm ema", "rsgdm implicit", rf.ema(0.7, start=EPOCH)),
    ("rsgdm explicit lookahead", "rsgdm explicit", rf.lookahead(EPOCH)),
    ("mean", "momentum", rf.mean(start=EPOCH)),
    ("mean, written back rarely", "momentum", rf.mean(every=2, write_back_every=EPOCH)),
    ("ema", "momentum", rf.ema(0.8, start=EPOCH, every=2)),
    ("scheduled", "momentum", rf.Average(scheduled, start=EPOCH)),
    ("swa", "momentum", rf.swa(EPOCH, EPOCH)),
    ("swa current", "momentum", rf.swa(EPOCH, EPOCH, "current")),
    ("rswa", "momentum", rf.rswa(EPOCH, 1)),
    ("rbwa", "momentum", rf.rbwa(EPOCH, 1)),
    ("rbwa algorithm2", "momentum", rf.rbwa(EPOCH, 1, "algorithm2")),
    ("rbwa_e", "nesterov", rf.rbwa_e(0.7, steps_per_epoch=EPOCH, start_epoch=1)),
    ("lookahead", "momentum", rf.lookahead(EPOCH, 0.6)),
    ("switch_ema", "momentum", rf.switch_ema(0.8, steps_per_epoch=EPOCH)),
    ("several", "momentum", [rf.ema(0.8, start=EPOCH, every=2), rf.mean(start=EPOCH)]),
    (
        "several named",
        "adamw amsgrad",
        {"slow": rf.lookahead(EPOCH, 0.6), "now": rf.mean(start=EPOCH, initial="now")},
    ),
):
    METHODS[_name] = Method(RULES[_rule], _average)
AVERAGED = [name for name, method in METHODS.items() if method.average is not None]
IN_PLACE = ["rbwa", "rbwa algorithm2", "rbwa_e"]  # the average is the parameter, unless 16-bit


class Model(nn.Module):
    """A matrix, a channels_last weight, vectors, a scalar: what a layout could break."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.matrix = parameter(5, 3)
        self.conv = parameter(2, 3, 2, 2)
        self.conv.data = self.conv.data.to(memory_format=torch.channels_last)
        self.late = parameter(7)  # without a gradient in the first six steps
        self.scalar = parameter()  # without an average
        self.early = parameter(17)  # without a gradient after five steps


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two param groups, the second without an average."""
    named = dict(model.named_parameters())
    alone = [named.pop("scalar")] if "scalar" in named else []
    first: dict[str, Any] = {"params": list(named.values())}
    return [first, {"params": alone, "weight_decay": 0.1, "average": False}]


def build(method: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Model, Any]:
    model = Model(dtype)
    return model, METHODS[method](groups(model), **options)


def feed(model: nn.Module, step: int) -> None:
    """Gradients for a step counted from 1; weights enter, so every slip is carried on."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        g = (noise + 0.2 * p.detach().double()).to(p.dtype)
        absent = (name == "late" and step <= 6) or (name == "early" and step > 5)
        p.grad = None if absent else torch.empty_like(p).copy_(g)


def train(model: nn.Module, opt: Any, first: int, last: int) -> None:
    """Steps first, first + 1, …, last, counted from 1."""
    for step in range(first, last + 1):
        feed(model, step)
        opt.step()


def bits(tensor: Tensor | None) -> str | None:
    """A digest of the elements' bytes in logical order: equal for equal bits, short in a report."""
    if tensor is None:
        return None
    if tensor.layout != torch.strided:
        return bits(tensor.detach().to_dense())
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return hashlib.sha1(bytes(flat.view(torch.uint8).tolist())).hexdigest()[:12]


def _held(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), bits(value)
    return repr(value)


def result(opt: Any) -> dict[str, Any]:
    """All that a run has come to: weights, state, counters and hyperparameters."""
    params = [p for group in opt.param_groups for p in group["params"]]
    saved = opt.state_dict()
    return {
        "weights": [_held(p) for p in params],
        "state": {
            (i, key): _held(value)
            for i, p in enumerate(params)
            for key, value in opt.state.get(p, {}).items()
        },
        "groups": [{k: _held(v) for k, v in group.items()} for group in saved["param_groups"]],
        "n_averaged": opt.n_averaged,
    }


def snapshot(opt: Any) -> dict[str, Any]:
    """`result`, and where everything lies, and the gradients: what a refusal must not touch."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return {
        **result(opt),
        "addresses": [p.data_ptr() for p in params],
        "versions": [p._version for p in params],
        "grads": [bits(p.grad) for p in params],
        "state addresses": {
            (i, key): value.data_ptr()
            for i, p in enumerate(params)
            for key, value in opt.state.get(p, {}).items()
            if isinstance(value, Tensor)
        },
        "policies": [repr(group["average"]) for group in opt.param_groups],
        "live state": len(opt.state),
    }


def resume(folder: Path, steps: int) -> None:
    """Goes on with every checkpoint `method.dtype.step.pt` in a folder, up to `steps`."""
    for file in sorted(folder.glob("*.pt")):
        method, dtype, stop = file.stem.split(".")
        saved = torch.load(file, weights_only=True)
        model, opt = build(method, getattr(torch, dtype))
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        train(model, opt, int(stop) + 1, steps)
        file.with_suffix(".done").write_bytes(pickle.dumps(result(opt)))
