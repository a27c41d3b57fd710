"""A progress bar where tqdm is installed, and nothing where it is not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


class Silent(AbstractContextManager["Silent"]):
    """What a bar does, without showing it."""

    def update(self, count: int = 1) -> None:
        """Counts nothing."""

    def close(self) -> None:
        """Closes nothing."""

    def __exit__(self, *error: object) -> None:
        self.close()


def bar(total: int, unit: str) -> Any:
    """A bar of so many units: a context with `update(count=1)` and `close()`."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Silent()
    return tqdm(total=total, unit=unit)
