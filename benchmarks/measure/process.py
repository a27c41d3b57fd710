"""A function in a Python of its own, which may tell of its progress."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

Found = TypeVar("Found")
_told: SimpleQueue[bool] | None = None  # in a fresh process: what `fresh` listens to


def tick() -> None:
    """Tells who has started this process that some of its work is done."""
    if _told is not None:
        _told.put(True)


def _begin(told: SimpleQueue[bool]) -> None:
    global _told
    _told = told


def fresh(
    function: Callable[..., Found],
    *arguments: object,
    after_tick: Callable[[], object] = lambda: None,
) -> Found:
    """A function's result, from a Python of its own. Until then it waits, and takes no core from
    what is measured.

    Args:
        after_tick: called whenever the function has called `tick`.

    Raises:
        RuntimeError: also for a process that was killed. What else the function raises.
    """
    context = get_context("spawn")
    told = context.SimpleQueue()
    with ProcessPoolExecutor(1, context, _begin, (told,)) as pool:
        result = pool.submit(function, *arguments)
        result.add_done_callback(lambda _: told.put(False))
        while told.get():
            after_tick()
        return result.result()
