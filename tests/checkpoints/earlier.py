"""Checkpoints that an earlier version wrote, and how their runs ended there.

    python tests/checkpoints/earlier.py

writes data/first-version.pt beside it with the version that is checked out. That file stays as it
is: a later version must load every checkpoint in it and end with the same bits (test_earlier.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from runs import METHODS, Model, bits, build
from torch import nn

FILE = Path(__file__).parent / "data" / "first-version.pt"
SAVED, END = 6, 13  # steps
IN_16_BITS = ("momentum", "rsgdm explicit", "ema", "rbwa", "lookahead")


def runs() -> Iterator[tuple[str, str, torch.dtype, dict[str, Any]]]:
    """Every run's name, method, dtype and options."""
    for method in METHODS:
        if method != "scheduled":  # its policy is a function, which a checkpoint does not name
            yield method, method, torch.float32, {}
    for method in IN_16_BITS:
        yield f"{method}, float64", method, torch.float64, {}
        yield f"{method}, bfloat16", method, torch.bfloat16, {}
        yield f"{method}, float16 masters", method, torch.float16, {"master_weights": True}


def train(model: nn.Module, opt: Any, first: int, last: int) -> None:
    """Steps of gradients that are the same on every machine: no random number, no rounding."""
    for step in range(first, last + 1):
        for number, (name, p) in enumerate(model.named_parameters()):
            pattern = (torch.arange(p.numel()) * 7 + 3 * number + 5 * step) % 13 - 6
            absent = (name == "late" and step <= 4) or (name == "early" and step > 8)
            g = (pattern.reshape(p.shape).double() / 8 + p.detach().double() / 4).to(p.dtype)
            p.grad = None if absent else torch.empty_like(p).copy_(g)
        opt.step()


def started(method: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Model, Any]:
    """A model of the same weights on every machine, and its optimizer."""
    model, opt = build(method, dtype, **options)
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            pattern = (torch.arange(p.numel()) * 5 + number) % 11 - 5
            p.copy_(pattern.reshape(p.shape).double() / 4)
    return model, opt


def ended(model: nn.Module, opt: Any) -> dict[str, Any]:
    """What a run has come to: the bits of weights and state, and the counters."""
    saved = opt.state_dict()
    return {
        "weights": [bits(p) for p in model.parameters()],
        "state": {
            f"{i} {stream}": bits(value)
            for i, held in saved["state"].items()
            for stream, value in held.items()
        },
        "counters": [
            [group[key] for key in ("rule", "step", "n_averaged", "implicit_momentum")]
            for group in saved["param_groups"]
        ],
    }


def write() -> None:
    """Writes the file with this version."""
    written = {}
    for name, method, dtype, options in runs():
        model, opt = started(method, dtype, options)
        train(model, opt, 1, SAVED)
        saved = {"model": dict(model.state_dict()), "opt": opt.state_dict()}
        written[name] = deepcopy(saved)
        train(model, opt, SAVED + 1, END)
        written[name]["end"] = ended(model, opt)
    FILE.parent.mkdir(exist_ok=True)
    torch.save(written, FILE)


if __name__ == "__main__":
    write()
