"""Checkpoints of sharded runs: what test_fsdp.py runs on ranks, and, as one rank, in itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import shards
import torch
import torch.distributed.checkpoint as dcp
from runs import bits
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor.debug import CommDebugMode

LAYOUTS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}


def save(folder: str, stop: int, make: Any = shards.sharded) -> dict[str, Any]:
    """Trains on shards and leaves a checkpoint; what it has come to."""
    model, opt = shards.build("rsgdm ema", make)
    shards.train(model, opt, 1, stop)
    for name, options in LAYOUTS.items():
        names = ("model", "optim")
        held = dict(zip(names, get_state_dict(model, opt, options=options), strict=True))
        dcp.save(held, checkpoint_id=Path(folder) / name)
    dcp.save({"model": opt.averaged_state_dict(model)}, checkpoint_id=Path(folder) / "averaged")
    return shards.result(model, opt)


def load(folder: str, layout: str, first: int, last: int, make: Any = shards.sharded) -> Any:
    """Loads it on however many ranks; what it is, and what it comes to."""
    model, opt = shards.build("rsgdm ema", make)
    options = LAYOUTS[layout]
    held = dict(zip(("model", "optim"), get_state_dict(model, opt, options=options), strict=True))
    dcp.load(held, checkpoint_id=Path(folder) / layout)
    set_state_dict(
        model,
        opt,
        model_state_dict=held["model"],
        optim_state_dict=held["optim"],
        options=options,
    )
    loaded = shards.result(model, opt)
    shards.train(model, opt, first, last)
    return loaded, shards.result(model, opt)


def averaged_of(folder: str) -> dict[str, str | None]:
    """The averaged weights in a plain model."""
    model = shards.plain()
    held = {"model": get_model_state_dict(model)}
    dcp.load(held, checkpoint_id=Path(folder) / "averaged")
    model.load_state_dict(held["model"])
    return {name: bits(p) for name, p in model.named_parameters()}


def plain_checkpoint_into_shards() -> None:
    """opt.state_dict() of a plain model, loaded as it is into a sharded run."""
    alone, theirs = shards.build("ema", shards.plain)
    shards.train(alone, theirs, 1, 8)
    model, ours = shards.build("ema", shards.sharded)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        with torch.no_grad():
            p.copy_(shards.laid_out(q.detach(), p))
    with CommDebugMode() as seen:
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert seen.get_total_counts() == 0  # each process has all of it
    assert not shards.differences(shards.result(model, ours), shards.result(alone, theirs))
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert not shards.differences(shards.result(model, ours), shards.result(alone, theirs))
    shards.train(model, ours, 9, 13)
    shards.train(alone, theirs, 9, 13)
    assert not shards.differences(shards.result(model, ours), shards.result(alone, theirs))
