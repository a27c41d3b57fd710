"""Where a comparison begins: anew, or where its files say that an earlier start came to.

A run's last checkpoint is written before the run enters results.json, and the next run's first one
after that. So results.json lacks at most the run in checkpoint.pt, whenever the process is killed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from studies.digits import checkpoint, durable, results
from studies.digits.checkpoint import Checkpoint
from studies.digits.durable import UnusableError
from studies.digits.options import Settings
from studies.digits.results import Seconds, differences, finite
from studies.digits.training import Training


class Files(NamedTuple):
    """What stands in the output folder."""

    results: Path
    checkpoint: Path
    picture: Path


class Start(NamedTuple):
    """The results so far, the seconds spent on them, and the run under way if there is one."""

    results: dict[str, Any]
    seconds: Seconds
    training: Training | None


class Clock:
    """The seconds of this start and of those before it."""

    def __init__(self, before: Seconds) -> None:
        self.before = before
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> Seconds:
        return Seconds(
            wall=round(self.before["wall"] + time.perf_counter() - self.wall, 1),
            cpu=round(self.before["cpu"] + time.process_time() - self.cpu, 1),
        )


def anew(settings: Settings, files: Files) -> Start:
    """The start of a comparison that writes no checkpoints, and overwrites none.

    Raises:
        UnusableError: where there is a checkpoint.
    """
    if files.checkpoint.exists():
        raise UnusableError(files.checkpoint, "is there for --checkpoint-every to go on with")
    durable.sweep(files.results)
    fresh = results.description(settings)
    return Start(fresh, fresh["seconds"], None)


def go_on(settings: Settings, files: Files) -> Start:
    """The start of a comparison that writes checkpoints: where the last one ended. Says so.

    Raises:
        UnusableError: where a file is not of this comparison. Nothing has been changed then.
    """
    saved = checkpoint.load(files.checkpoint, settings)
    known = results.load(files.results, settings)
    if known is None and saved is not None:
        raise UnusableError(files.checkpoint, f"lacks the {files.results.name} that belongs to it")
    fresh = results.description(settings)
    start = Start(fresh, fresh["seconds"], None)
    if known is not None:
        refuse_other_versions(files, known, fresh)
        start = join(settings, files, known, saved)
    durable.sweep(files.results)
    durable.sweep(files.checkpoint)
    if known is not None:
        print(f"digits: {place(settings, start)}", file=sys.stderr)
    return start


def refuse_other_versions(files: Files, known: dict[str, Any], fresh: dict[str, Any]) -> None:
    """The rest of a comparison would not be what its file says."""
    theirs, ours = ({"cpu": r["cpu"], **r["versions"]} for r in (known, fresh))
    if not known["complete"] and (other := differences(theirs, ours)):
        raise UnusableError(files.results, f"was begun with {other}")


def join(
    settings: Settings, files: Files, known: dict[str, Any], saved: Checkpoint | None
) -> Start:
    """The results, and the run in the checkpoint unless it is the last of them."""
    if saved is None:
        return Start(known, known["seconds"], None)
    state = saved["state"]
    index = settings.runs.index((state["run"]["seed"], state["run"]["method"]))
    finished = len(known["runs"])
    if index == finished:
        training = checkpoint.restore(files.checkpoint, state, settings)
        return Start(known, saved["seconds"], training)
    if index != finished - 1 or finite(state["run"]) != finite(known["runs"][-1]):
        raise UnusableError(files.results, f"does not belong to {files.checkpoint.name} beside it")
    return Start(known, known["seconds"], None)


def place(settings: Settings, start: Start) -> str:
    """Where it goes on, in a line."""
    finished, wanted = len(start.results["runs"]), len(settings.runs)
    if finished == wanted:
        return "complete before; the table and the picture are drawn anew"
    seed, name = settings.runs[finished]
    text = f"going on after {finished} of {wanted} runs with {name}, seed {seed}"
    if start.training is None:
        return f"{text}, from its start"
    epoch, batch = start.training.epoch, start.training.batch
    return (
        f"{text}, after {epoch} of {settings.epochs} epochs"
        + f" and {batch} of {settings.steps_per_epoch} batches" * (batch > 0)
    )
