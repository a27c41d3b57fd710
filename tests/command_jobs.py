"""What a rank of test_command_lines.py does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

import torch
from torch import distributed

from examples.fsdp2 import save
from examples.ranks import on_first


def full() -> TextIO:
    """A disk without room."""
    return open("/dev/full", "w")


def gone() -> TextIO:
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def printed(into_full: bool) -> list[str]:
    """What comes of printing into a full disk, or to a reader that is gone, and then once more."""
    kept, sys.stdout = sys.stdout, full() if into_full else gone()
    outcomes = []
    try:
        for _ in range(2):
            try:
                on_first(print, "epoch 1")
                outcomes.append("went on")
            except (OSError, SystemExit) as error:
                outcomes.append(f"{type(error).__name__} {error}")
                break
    finally:
        sys.stdout = kept
    distributed.barrier()
    return outcomes


def saved(folder: Path) -> object:
    """The exit status of a checkpoint that no rank can write; a text is what it prints."""
    try:
        save({"model": {"weight": torch.ones(2)}}, folder)
    except SystemExit as ended:
        return ended.code
    return None
