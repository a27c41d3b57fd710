"""Interrupts at a line, and allocations that fail: what a test puts in the way of a step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rbwa_fused as rf

OURS = (str(Path(rf.__file__).parent), str(Path(torch.optim.__file__).parent / "optimizer.py"))
FULL = os.environ.get("RBWA_PROFILE") == "long"


class Line:
    """Interrupts the n-th line that is run of some files: the package, or torch.optim.Optimizer.

    Attributes:
        seen: which lines were run, in their order.
    """

    def __init__(self, n: int, files: tuple[str, ...] = OURS) -> None:
        self.left, self.fired = n, False
        self.seen: list[tuple[str, int]] = []
        self._files = files

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._files):
            return None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *raised: Any) -> None:
        sys.settrace(self._before)


class Allocation(TorchDispatchMode):
    """Lets the n-th operation that makes a tensor fail: of all, or of those in some files."""

    MAKING = ("empty", "clone", "zeros", "ones", "full", "_to_copy", "cat", "stack")

    def __init__(self, n: int, files: tuple[str, ...] = ("",)) -> None:
        super().__init__()
        self.left, self.fired = n, False
        self.seen: list[str] = []
        self._files = files

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        making = func._schema.name.split("::")[1].startswith(self.MAKING)
        if making and any(file.startswith(self._files) for file in _calling()):
            self.seen.append(func._schema.name)
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


def _calling() -> Iterator[str]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def tried(disturbance: Any, seen: list[Any]) -> list[int]:
    """The numbers of the events that are tried: of each line the first time and the last that it is
    run, and every allocation; all with RBWA_PROFILE=long."""
    if disturbance is Allocation or FULL:
        return list(range(1, len(seen) + 1))
    first = {line: n for n, line in reversed(list(enumerate(seen, 1)))}
    last = {line: n for n, line in enumerate(seen, 1)}
    return sorted({*first.values(), *last.values()})
