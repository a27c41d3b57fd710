"""Trains on the digit images in several processes with DistributedDataParallel and an EMA.

    torchrun --nproc-per-node 2 examples/ddp.py --checkpoint digits.pt

Needs scikit-learn. Takes a GPU a process where there are enough, else the CPU. Rank 0 saves after
every epoch; the same command goes on from there, on as many processes to the same bits.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

try:
    from sklearn.datasets import load_digits

    import rbwa_fused as rf
    from rbwa_fused.distributed import synchronize
except ImportError as error:
    sys.exit(f"{error}: pip install scikit-learn, and rbwa_fused as its README says")


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    model.eval()
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoint", metavar="FILE")
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        sys.exit(f"start it with torchrun --nproc-per-node 2 {sys.argv[0]}")
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    first = dist.get_rank() == 0

    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16).to(device)
    labels = torch.tensor(digits.target).to(device)
    train, test = TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])
    sampler: DistributedSampler[Any] = DistributedSampler(train)
    loader = DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    ).to(device)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=options.epochs)
    parts: dict[str, Any] = {"model": model, "opt": opt, "schedule": schedule}

    if first and options.checkpoint and os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        print(f"going on after epoch {schedule.last_epoch}", flush=True)
    ddp = DistributedDataParallel(model)  # gives all ranks the model of rank 0
    synchronize(opt, 0)  # and this its momentum, averages and counters
    synchronize(schedule, 0)
    for epoch in range(schedule.last_epoch, options.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            cross_entropy(ddp(x), y).backward()
            opt.step()  # sends nothing: the averages of all ranks stay equal to the last bit
            opt.zero_grad()
        schedule.step()
        if first:
            live = accuracy(model, *test)
            with rf.averaged_model(opt, model, [images[:1437]]):  # BatchNorm's own, in one batch
                averaged = accuracy(model, *test)
            if options.checkpoint:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state, f"{options.checkpoint}.tmp")
                os.replace(f"{options.checkpoint}.tmp", options.checkpoint)  # whole at any moment
            print(f"epoch {epoch + 1:2}: {live:.1f} %, averaged {averaged:.1f} %", flush=True)
    dist.barrier()  # torch 2.14 may abort a process that destroys its group before another is done
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
