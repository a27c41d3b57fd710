"""Snapshots of several ranks: what test_snapshots_on_ranks.py runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp1_jobs
import fsdp_jobs
import shards
import tensor_parallel_jobs
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import rbwa_fused as rf
from rbwa_fused.engine.sharded import local
from rbwa_fused.posthoc import Snapshots

LENGTH, EVERY = 12, 3


def averagers(model: nn.Module, opt: Any) -> list[rf.Averager]:
    averages = (rf.power_ema(0.05), rf.power_ema(0.1))
    return [rf.Averager(model, average, optimizer=opt) for average in averages]


def sharded(folder: Path, first: int = 1, last: int = LENGTH) -> list[dict[str, Tensor]]:
    """FSDP2 with snapshots; this rank's shards of the averages."""
    model = fsdp_jobs.sharded_network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    owners, snapshots = averagers(model, opt), Snapshots(folder, every=EVERY)
    for step in range(first, last + 1):
        fsdp_jobs.train(model, opt, step, step)
        snapshots.update(owners)
    return [{n: local(t).clone() for n, t in owner.averages().items()} for owner in owners]


def plain(folder: Path) -> list[dict[str, Tensor]]:
    """The same of a model on one rank that sees all batches; only the first rank's is written."""
    model = fsdp_jobs.network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    owners, snapshots = averagers(model, opt), Snapshots(folder, every=EVERY)
    for step in range(1, LENGTH + 1):
        fsdp_jobs.train_alone(model, opt, step, step, distributed.get_world_size())
        snapshots.update(owners)
    return [{n: t.clone() for n, t in owner.averages().items()} for owner in owners]


def replicated(folder: Path) -> list[str]:
    """DDP, a snapshot behind each step; the files that this rank has written."""
    model = DistributedDataParallel(fsdp_jobs.network())
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.power_ema(0.1))
    snapshots = Snapshots(folder, every=1)
    written = []
    for step in range(1, 5):
        fsdp_jobs.train(model, opt, step, step)
        written += [file.name for file in snapshots.update(opt, model.module)]
    return written


def refused(folder: Path) -> str:
    """What is said of a folder with the snapshots of another number of shards."""
    model = fsdp_jobs.sharded_network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    owners = averagers(model, opt)
    fsdp_jobs.train(model, opt, 1, 5)
    try:
        Snapshots(folder, every=EVERY).update(owners)
    except ValueError as error:
        return str(error)
    return ""


def tensor_parallel(folder: Path, data: int, across: int) -> dict[str, Tensor]:
    """Tensor parallel layers, also under FSDP2; the whole averages at the end."""
    model = tensor_parallel_jobs.parallel(data, across)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    owner = rf.Averager(model, rf.power_ema(0.1), optimizer=opt)
    snapshots = Snapshots(folder, every=2)
    for step in range(1, 5):
        tensor_parallel_jobs.backward(model, step, across)
        opt.step()
        opt.zero_grad()
        snapshots.update(owner)
    return {
        name: shards.whole(owner.state[p]["average"]).clone()
        for name, p in model.named_parameters()
    }


def flat(folder: Path) -> dict[str, Tensor]:
    """FSDP1's flat parameters; this rank's shards of the averages."""
    model = fsdp1_jobs.sharded_network(use_orig_params=False)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.power_ema(0.1))
    snapshots = Snapshots(folder, every=2)
    for step in range(1, 5):
        fsdp_jobs.train(model, opt, step, step)
        snapshots.update(opt, model)
    return {name: a.clone() for name, a in opt.averages(model).items()}
