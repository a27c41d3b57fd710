"""Trains on the digit images on several processes with DistributedDataParallel and an EMA.

    torchrun --nproc-per-node 2 examples/ddp.py
    torchrun --nproc-per-node 2 examples/ddp.py --epochs 20 --checkpoint /tmp/digits.pt

Needs scikit-learn. With --checkpoint rank 0 saves after every epoch, and a start with the same
options goes on from there, bit for bit on as many processes. Uses NCCL and the GPUs if there are
enough of them, else gloo and the CPU.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

if __package__ is None:  # run as a file: the folder above holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import rbwa_fused as rf
from examples.ranks import on_first
from rbwa_fused.command import Parser, run
from rbwa_fused.distributed import synchronize
from studies.digits import data, durable, models
from studies.digits.training import evaluate

BATCH = 64  # images of a step, over all processes
DECAY = 0.98  # of the EMA: a memory of 50 steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="ddp.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="saved after every epoch, gone on with")
    options = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/ddp.py")
    local = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    train(options.epochs, options.checkpoint, device)
    dist.barrier()  # torch 2.14 may abort a process that destroys its group before another is done
    dist.destroy_process_group()


def train(epochs: int, file: Path | None, device: torch.device) -> None:
    digits = data.Digits(*(tensor.to(device) for tensor in data.load()))
    model = models.build("small", seed=0).to(device)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(DECAY))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=epochs)
    done = load(file, model, opt, schedule) if dist.get_rank() == 0 else 0
    ddp = DistributedDataParallel(model)  # gives all ranks the model of rank 0
    synchronize(opt, 0)  # and this its momentum, averages and counters
    synchronize(schedule, 0)
    number = [done]
    dist.broadcast_object_list(number, src=0)
    if number[0]:
        on_first(print, f"going on after epoch {number[0]} of {file}")

    images = TensorDataset(digits.train_images, digits.train_labels)
    sampler: DistributedSampler[Any] = DistributedSampler(images, seed=0)
    loader = DataLoader(images, batch_size=BATCH // dist.get_world_size(), sampler=sampler)
    for epoch in range(number[0], epochs):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            cross_entropy(ddp(x), y).backward()
            opt.step()
            opt.zero_grad()
        schedule.step()
        live = evaluate(model, digits.test_images, digits.test_labels)
        # All images in one batch, so that every rank estimates the same BatchNorm statistics.
        with rf.averaged_model(opt, model, [digits.train_images]):
            ema = evaluate(model, digits.test_images, digits.test_labels)
        on_first(save, file, epoch + 1, model, opt, schedule)
        on_first(report, epoch + 1, live, ema)


def report(epoch: int, live: tuple[float, float], ema: tuple[float, float]) -> None:
    print(
        f"epoch {epoch:3}: weights {live[1]:5.1f} %, loss {live[0]:.4f}; "
        f"averaged {ema[1]:5.1f} %, loss {ema[0]:.4f}"
    )


def save(file: Path | None, epoch: int, model: nn.Module, opt: Any, schedule: Any) -> None:
    if file is not None:
        parts = [part.state_dict() for part in (model, opt, schedule)]
        buffer = io.BytesIO()
        torch.save({"epoch": epoch, "parts": parts}, buffer)
        durable.write(file, buffer.getvalue())


def load(file: Path | None, model: nn.Module, opt: Any, schedule: Any) -> int:
    """Epochs that the checkpoint has trained; 0 where there is none."""
    if file is None or not file.exists():
        return 0
    saved = torch.load(file, map_location="cpu", weights_only=True)
    for part, state in zip((model, opt, schedule), saved["parts"], strict=True):
        part.load_state_dict(state)
    return int(saved["epoch"])


if __name__ == "__main__":
    sys.exit(run("ddp.py", main))
