"""checkpoint.pt: the run under way, from which another process goes on bit for bit."""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch

from studies.digits import durable
from studies.digits.durable import FOREIGN, UnusableError
from studies.digits.options import Settings
from studies.digits.results import Seconds, differences, is_run, is_seconds
from studies.digits.training import State, Training


class Checkpoint(TypedDict):
    """What `torch.load(..., weights_only=True)` reads of the file."""

    settings: dict[str, Any]
    seconds: Seconds
    state: State


def save(path: Path, training: Training, seconds: Seconds) -> None:
    """Replaces the file in one piece."""
    saved = Checkpoint(settings=asdict(training.settings), seconds=seconds, state=training.state())
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    durable.write(path, buffer.getvalue())


def load(path: Path, settings: Settings) -> Checkpoint | None:
    """The checkpoint, or None if there is none.

    Raises:
        UnusableError: for anything else than a whole checkpoint of the same settings.
    """
    content = durable.read(path)
    if content is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign files, which are refused anyway
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # whatever torch and pickle make of foreign bytes
        raise UnusableError(path, FOREIGN) from None
    if not is_checkpoint(saved):
        raise UnusableError(path, FOREIGN)
    if other := differences(saved["settings"], asdict(settings)):
        raise UnusableError(path, f"was written with other settings ({other})")
    if not is_state(saved["state"], settings):
        raise UnusableError(path, FOREIGN)
    known: Checkpoint = saved
    return known


def restore(path: Path, state: State, settings: Settings) -> Training:
    """The run as it was.

    Raises:
        UnusableError: where its tensors do not fit the network or the optimizer.
    """
    training = Training(state["run"]["method"], state["run"]["seed"], settings)
    try:
        training.restore(state)
    except Exception:  # whatever the three loaders make of the wrong tensors
        raise UnusableError(path, "does not fit the network and the optimizer") from None
    return training


def is_checkpoint(saved: Any) -> bool:
    return (
        isinstance(saved, dict)
        and saved.keys() == Checkpoint.__annotations__.keys()
        and isinstance(saved["settings"], dict)
        and is_seconds(saved["seconds"])
        and isinstance(saved["state"], dict)
        and saved["state"].keys() == State.__annotations__.keys()
    )


def is_state(state: dict[str, Any], settings: Settings) -> bool:
    """Whether it is a place in one of the settings' runs, with the figures up to there."""
    epoch, batch = state["epoch"], state["batch"]
    return (
        type(epoch) is int
        and type(batch) is int
        and 0 <= epoch <= settings.epochs
        and 0 <= batch < settings.steps_per_epoch
        and (epoch < settings.epochs or batch == 0)
        and is_run(state["run"], epoch)
        and (state["run"]["seed"], state["run"]["method"]) in settings.runs
    )
