"""The Trainer on several ranks, under DistributedDataParallel: jobs of tests/ranks.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerated import forget
from beside import as_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from trainers import AveragedWeights, Held, Net, Noting, averager_of, replayed, trainer

import rbwa_fused as rf

POLICY = rf.ema(0.75, start=2)


def _on_one_node() -> None:
    """What accelerate asks of whoever has started the processes."""
    os.environ.update(LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], MASTER_ADDR="localhost")


def parameters(found: Held) -> Held:
    """Without BatchNorm's statistics, which are each rank's own."""
    return {name: value for name, value in found.items() if "net.1." not in name}


def replicated(folder: Path) -> Any:
    """Averages on this rank, evaluated, saved and gone on with; equal on all if they are right."""
    _on_one_node()
    try:
        averaging, noting = AveragedWeights(POLICY), Noting()
        options: dict[str, Any] = {
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "epoch",
            "per_device_train_batch_size": 2,
        }
        run = trainer(folder, averaging, noting, **options)
        run.train()
        assert isinstance(run.model_wrapped, DistributedDataParallel)
        averaged = [*map(parameters, replayed(noting.weights, POLICY))]
        epoch = len(averaged) // 3
        assert [parameters(now) for now, _ in run.model.seen] == averaged[epoch - 1 :: epoch]
        averages = as_bits(averager_of(averaging).averages())

        again, going_on = AveragedWeights(POLICY), Noting()
        resumed = trainer(folder, again, going_on, **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
        assert as_bits(going_on.weights[-1]["net.4.weight"]) == as_bits(
            noting.weights[-1]["net.4.weight"]
        )
        assert len(going_on.weights) == len(noting.weights) - 5
        assert as_bits(averager_of(again).averages()) == averages
        return averages
    finally:
        forget()


def sharded() -> str:
    """What a model of DTensors is told."""
    _on_one_node()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    try:
        model = Net()
        run = trainer(Path(), AveragedWeights(POLICY), model=model)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                shard = distribute_tensor(p.detach(), mesh, [Replicate()])
                module.register_parameter(name, torch.nn.Parameter(shard))
        others = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
        try:
            AveragedWeights(POLICY).on_train_begin(run.args, run.state, run.control, **others)
        except ValueError as error:
            return str(error)
        return ""
    finally:
        forget()
