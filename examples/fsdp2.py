"""Trains a small transformer on real digit images, sharded over processes by FSDP2, with an EMA.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --epochs 10 --checkpoint digits
    torchrun --nproc-per-node 4 examples/fsdp2.py --epochs 20 --checkpoint digits   # goes on, on 4

Needs scikit-learn beside PyTorch. Processes take a GPU each, or a core where there are none. With
--checkpoint every epoch leaves a folder in that one, and a start goes on from the last, on however
many processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

if __package__ is None:  # run as a file: the folder above holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import rbwa_fused as rf
from examples.ranks import on_first
from rbwa_fused.command import Parser, run
from studies.digits import data

WIDTH, LAYERS = 32, 2
BATCH_SIZE = 32  # of each process


class Network(nn.Module):
    """An image's eight rows are the words of a sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.zeros(8, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images.squeeze(1)) + self.position
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x.mean(1))
        return result


def train(model: nn.Module, opt: rf.FusedSGD, loader: DataLoader, device: torch.device) -> None:
    """An epoch. Nothing in it knows of shards."""
    model.train()
    for images, labels in loader:
        cross_entropy(model(images.to(device)), labels.to(device)).backward()
        opt.step()
        opt.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Of all test images in percent; each process looks at some."""
    model.eval()
    part = slice(distributed.get_rank(), None, distributed.get_world_size())
    right = (model(images[part].to(device)).argmax(1).cpu() == labels[part]).sum().to(device)
    distributed.all_reduce(right)
    return 100 * right.item() / len(labels)


def load(model: nn.Module, opt: rf.FusedSGD, folder: Path) -> int:
    """Goes on from the last complete checkpoint, if there is one. Returns the finished epochs."""
    complete = sorted(folder.glob("epoch-*/.metadata"))  # which is written last
    if not complete:
        return 0
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=complete[-1].parent)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
    return int(complete[-1].parent.name.removeprefix("epoch-"))


def save(held: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint. Where a rank cannot, the first one says why, and all end."""
    try:
        dcp.save(held, checkpoint_id=folder)
    except dcp.CheckpointException as error:  # on all ranks, with the traceback of each that failed
        why, _ = next(iter(error.failures.values()))
        if not isinstance(why, OSError):
            raise
        sys.exit(f"fsdp2.py: error: {folder}: {why}" if distributed.get_rank() == 0 else 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="fsdp2.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2 examples/fsdp2.py")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    world = distributed.get_world_size()

    digits = data.load()
    images = TensorDataset(digits.train_images, digits.train_labels)
    sampler: DistributedSampler = DistributedSampler(images, drop_last=True)
    loader = DataLoader(images, BATCH_SIZE, sampler=sampler, drop_last=True)

    torch.manual_seed(0)  # the same weights everywhere, of which each process keeps its shards
    model = Network().to(device)
    mesh = init_device_mesh(kind, (world,))
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh)
    # After fully_shard, which makes other parameters.
    opt = rf.FusedSGD(model.parameters(), lr=0.05, momentum=0.9, average=rf.ema(0.95))

    finished = load(model, opt, args.checkpoint) if args.checkpoint is not None else 0
    if finished:
        on_first(print, f"{args.checkpoint}: {finished} epochs, gone on with on {world} processes")
    for epoch in range(finished + 1, args.epochs + 1):
        sampler.set_epoch(epoch)
        train(model, opt, loader, device)
        trained = accuracy(model, digits.test_images, digits.test_labels, device)
        with opt.averaged(model):  # communicates nothing; the next forward gathers averages
            averaged = accuracy(model, digits.test_images, digits.test_labels, device)
        on_first(
            print, f"epoch {epoch:2}: {trained:.1f} % right, averaged weights {averaged:.1f} %"
        )
        if args.checkpoint is not None:
            weights, state = get_state_dict(model, opt)
            held = {
                "model": weights,
                "optim": state,
                "averaged": opt.averaged_state_dict(model),  # a plain model loads these
            }
            save(held, args.checkpoint / f"epoch-{epoch:03}")
    distributed.barrier()  # torch 2.14 may abort a process that destroys its group before the rest
    distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run("fsdp2.py", main))
