"""What the ranks of test_gone.py do: the second disappears in the midst of a collective."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from ddp_jobs import Driven, batch_of
from elastic_jobs import bytes_of, everything, learn, net, optimizer
from runs import METHODS, STEPS, groups, result
from torch.nn.parallel import DistributedDataParallel

from rbwa_fused.distributed import Elastic, synchronize

TIMEOUT = 4  # seconds, of the group in which a rank disappears
SAVED, GONE = 6, 9  # steps: of the last checkpoint, and in which the second rank disappears
EVERY = 3
METHOD = "ema"


def checkpoint(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"


class Peer:
    """The other rank's process, which the survivor ends where it was only stopped."""

    def __init__(self) -> None:
        # What a first step imports takes longer than TIMEOUT on a busy machine.
        model = Driven()
        opt = METHODS[METHOD](groups(model))
        DistributedDataParallel(model)(0).backward()
        opt.step()
        pids: list[Any] = [None] * 2
        dist.all_gather_object(pids, os.getpid())
        self.group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
        self._pid = pids[1 - dist.get_rank()]
        dist.barrier()

    def error_of(self, call: Any) -> dict[str, Any]:
        """What a call raises, what caused that, and how long it took."""
        start = monotonic()
        try:
            call()
        except RuntimeError as error:
            seconds = monotonic() - start
            return {"message": str(error), "cause": repr(error.__cause__), "seconds": seconds}
        raise AssertionError("nothing was raised")

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


# ---- DistributedDataParallel ---------------------------------------------------------------------


def data_parallel(folder: str, how: int | None) -> dict[str, Any]:
    """From the checkpoint if there is one; rank 1 disappears by a signal, or not at all."""
    peer = Peer()
    model = Driven()
    ddp = DistributedDataParallel(model, process_group=peer.group)
    opt = METHODS[METHOD](groups(model))
    first = 1
    if checkpoint(folder, 0).exists():
        saved = torch.load(checkpoint(folder, 0), weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = SAVED + 1
    for step in range(first, STEPS + 1):
        loss = ddp(batch_of(dist.get_rank(), step))
        if step == GONE and how is not None:
            if dist.get_rank() == 1:
                os.kill(os.getpid(), how)
            before = result(opt)
            answer = peer.error_of(loss.backward)
            peer.end()
            return {**answer, "kept": before == result(opt)}
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step == SAVED and dist.get_rank() == 0:
            saved = {"model": model.state_dict(), "optimizer": opt.state_dict()}
            torch.save(saved, checkpoint(folder, 0))
    return result(opt)


# ---- Elastic -------------------------------------------------------------------------------------


def elastic(folder: str, how: int | None) -> Any:
    rank = dist.get_rank()
    peer = Peer()
    model = net(rank)
    opt = optimizer(model)
    replicas = Elastic(model, alpha=0.6, every=EVERY, group=peer.group)
    stale = Elastic(model, alpha=0.6, overlap=True, group=peer.group)
    first = 1
    if checkpoint(folder, rank).exists():
        saved = torch.load(checkpoint(folder, rank), weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        replicas.load_state_dict(saved["elastic"])
        first = SAVED + 1
    for step in range(first, STEPS + 1):
        learn(model, opt, rank, step)
        if step == GONE and how is not None:
            if rank == 1:
                os.kill(os.getpid(), how)
            before, answers = bytes_of(model.parameters()), []
            if how == signal.SIGKILL:
                stale.pull()
                answers.append(peer.error_of(stale.wait))
                answers.append(peer.error_of(lambda: synchronize(opt, 1, peer.group)))
            answers.append(peer.error_of(replicas.step))
            peer.end()
            return {
                "errors": answers,
                "kept": before == bytes_of(model.parameters()),
                "can be saved": [replicas.state_dict(), stale.state_dict()],
            }
        replicas.step()
        if step == SAVED:
            saved = {
                "model": model.state_dict(),
                "optimizer": opt.state_dict(),
                "elastic": replicas.state_dict(),
            }
            torch.save(saved, checkpoint(folder, rank))
    return everything(model, opt)
