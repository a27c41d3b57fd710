"""A provider under a CUDA graph: its step is captured once for each set of gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Build, Provider

EAGER_STEPS = 2  # one that makes the state, one that must not wait for the device


class Capturing(Protocol):
    """What a captured row needs of a device, see measure/clock.py."""

    def no_waiting(self) -> AbstractContextManager[None]: ...

    def capture(self, step: Callable[[], object]) -> Callable[[], object]: ...


def captured(build: Build, device: Capturing) -> Build:
    """A builder for the same provider, which replays its steps from the third on.

    Building it captures nothing; its first steps do, and raise RuntimeError where they cannot.
    """

    def build_row(problem: Problem, name: str) -> Provider:
        provider = build(problem, name)
        eager, use_eagerly = provider.step, provider.use_gradients
        replays: dict[int, Callable[[], object]] = {}
        taken = current = 0

        def use_gradients(which: int) -> None:
            nonlocal current
            current = which
            use_eagerly(which)  # a graph reads those that were in place when it was captured

        def step() -> None:
            nonlocal taken
            taken += 1
            if taken < EAGER_STEPS:
                eager()
            elif taken == EAGER_STEPS:
                with device.no_waiting():  # a failed capture is harder to recover from
                    eager()
            else:
                if current not in replays:
                    replays[current] = device.capture(eager)
                replays[current]()

        return replace(provider, step=step, use_gradients=use_gradients, eager_steps=EAGER_STEPS)

    return build_row
