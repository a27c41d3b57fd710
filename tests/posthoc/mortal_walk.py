"""Runs with snapshots that may be killed: one for each line of input, as tests/forked.py has it.

    folder: that gets the checkpoint and the snapshots
    count: in which write of a snapshot the run dies, or null
    written: after so many pieces of it, or null for behind it

A run goes on from its checkpoint, which it writes behind each third step.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import walks
from forked import fork_lives

from rbwa_fused.posthoc import Snapshots
from rbwa_fused.posthoc.tensors import Writer

LENGTH, EVERY, SAVED = 40, 4, 3
dies: list[int | None] = [None, None]  # writes to come until the last, and its pieces

real_append, real_exit = Writer.append, Writer.__exit__


def append(self: Writer, tensor: Any) -> None:
    real_append(self, tensor)
    if dies[0] == 1 and dies[1] is not None:
        self._opened.flush()
        dies[1] -= 1
        if dies[1] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def exited(self: Writer, *error: Any) -> None:
    real_exit(self, *error)
    if dies[0] is not None:
        dies[0] -= 1
        if dies[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def live(folder: str, count: int | None, written: int | None) -> None:
    """Walks from the checkpoint to the end."""
    torch.set_num_threads(1)
    Writer.append, Writer.__exit__ = append, exited  # type: ignore[method-assign]
    dies[:] = [count, written]
    where = Path(folder)
    model = walks.Small()
    owners, taken = walks.averagers(model), 0
    checkpoint = where / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for owner, state in zip(owners, saved["averages"], strict=True):
            owner.load_state_dict(state)
        taken = saved["taken"]
    snapshots = Snapshots(where / "snapshots", every=EVERY)

    def behind(step: int) -> None:
        if step % SAVED == 0:
            averages = [owner.state_dict() for owner in owners]
            held = {"model": model.state_dict(), "averages": averages, "taken": step}
            torch.save(held, f"{checkpoint}.tmp")
            os.replace(f"{checkpoint}.tmp", checkpoint)

    walks.walked(model, owners, snapshots, taken + 1, LENGTH, behind)


if __name__ == "__main__":
    fork_lives(live)
