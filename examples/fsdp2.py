"""Trains a small transformer on the digit images, sharded over processes by FSDP2, with an EMA.

    torchrun --nproc-per-node 2 examples/fsdp2.py --checkpoint digits
    torchrun --nproc-per-node 4 examples/fsdp2.py --checkpoint digits --epochs 6   # goes on, on 4

Needs scikit-learn. Takes a GPU a process where there are enough, else the CPU. Every epoch leaves a
folder in that of --checkpoint, and a start goes on from the last, on however many processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

try:
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
except ImportError as error:
    sys.exit(f"{error}: pip install scikit-learn, and rbwa_fused as its README says")


def network(width: int = 32) -> nn.Sequential:
    """An image's eight rows are the words of a sentence."""
    layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in "ab"]
    return nn.Sequential(nn.Linear(8, width), *layers, nn.Flatten(), nn.Linear(8 * width, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent; all processes call this."""
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoint", metavar="FOLDER", type=Path)
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit(f"start it with torchrun --nproc-per-node 2 {sys.argv[0]}")
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")

    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32) / 16).to(device)
    labels = torch.tensor(digits.target).to(device)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    sampler: DistributedSampler[Any] = DistributedSampler(train)
    loader = DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler)
    torch.manual_seed(0)  # the same weights everywhere, of which each process keeps its shards
    model = network().to(device)
    for layer in (*model[1:3], model):
        fully_shard(layer)
    # After fully_shard, which makes other parameters.
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.98))

    done, folder = 0, options.checkpoint
    if folder and (complete := sorted(folder.glob("epoch-*/.metadata"))):  # which is written last
        done = int(complete[-1].parent.name.removeprefix("epoch-"))
        weights, state = get_state_dict(model, opt)
        dcp.load({"model": weights, "opt": state}, checkpoint_id=complete[-1].parent)
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
        if dist.get_rank() == 0:
            print(f"going on after epoch {done}", flush=True)
    for epoch in range(done + 1, options.epochs + 1):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            opt.step()  # moves and averages the shards where they lie
            opt.zero_grad()
        live = accuracy(model, *test)
        with opt.averaged(model):  # sends nothing; the next forward gathers averages
            averaged = accuracy(model, *test)
        if dist.get_rank() == 0:
            print(f"epoch {epoch:2}: {live:.1f} %, averaged {averaged:.1f} %", flush=True)
        if folder:
            weights, state = get_state_dict(model, opt)
            held = {"model": weights, "opt": state, "averaged": opt.averaged_state_dict(model)}
            dcp.save(held, checkpoint_id=folder / f"epoch-{epoch:03}")
    dist.barrier()  # torch 2.14 may abort a process that destroys its group before another is done
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
