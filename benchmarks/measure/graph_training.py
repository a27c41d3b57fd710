"""A whole training step under CUDA graphs: captured, proved and replayed between marks.

Three graphs of a row share one pool of memory: the whole training step, which is what a user
replays; and the same in two, forward and backward, and the step, so that the step is timed by
itself and still finds the caches as a backward pass leaves them. They read the batch, the weights
and the state where they lay at capture. Gradients are allocated in the pool, and stay alive as long
as the graphs that write them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure.check import difference, entering, sample
from benchmarks.measure.clock import Cuda, Step
from benchmarks.measure.proof import WrongError
from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Provider, Row

WARMING = 3  # steps on a side stream, as torch asks: workspaces, the optimizers' state
REPLAYS = 2  # of each way, while they are proved
CLOSE = 0.01  # gradients of a replay to those of an eager pass, whose sums may have another order
LEAD = 2e-3  # seconds in which the host queues a visit

Params = Sequence[Tensor]
Run = Callable[[Provider], object]  # takes a provider's forward and backward pass


@dataclass(frozen=True)
class Graphs:
    """A row's replays; `of_whole` and `of_passes` are the gradients that they write. A graph keeps
    no tensor alive that was there before it, so the provider is kept here, and `run`, which knows
    the batch."""

    provider: Provider
    run: Run
    whole: Step
    passes: Step
    step: Step
    of_whole: list[Tensor]
    of_passes: list[Tensor]


def gradients(params: Params) -> list[Tensor]:
    """Of all parameters.

    Raises:
        RuntimeError: for a parameter without one.
    """
    found = [p.grad for p in params if p.grad is not None]
    if len(found) != len(params):
        raise RuntimeError(f"{len(params) - len(found)} parameters have no gradient")
    return found


def forget(params: Params) -> None:
    """Frees the gradients, so that the next ones are allocated where the backward pass runs."""
    for p in params:
        p.grad = None


def captured(provider: Provider, run: Run, device: Cuda, pool: object) -> Graphs:
    """The graphs of a row whose state exists.

    Raises:
        RuntimeError: for a row that cannot be captured.
    """

    def both() -> None:
        run(provider)
        provider.step()

    forget(provider.params)
    whole = device.capture(both, pool)
    of_whole = gradients(provider.params)
    forget(provider.params)
    passes = device.capture(lambda: run(provider), pool)
    step = device.capture(provider.step, pool)
    of_passes = gradients(provider.params)
    forget(provider.params)
    return Graphs(provider, run, whole, passes, step, of_whole, of_passes)


def proven(row: Row, problem: Problem, run: Run, device: Cuda, pool: object) -> Graphs:
    """A row's graphs, after eager steps and replays in turn were right.

    Raises:
        WrongError: if they were not.
        RuntimeError, ImportError, ValueError: if it cannot be built or captured.
    """
    provider = row.build(problem, row.name)
    start = [sample(p) for p in provider.params]
    taken: list[list[Tensor]] = []

    def eager() -> None:
        run(provider)
        provider.step()

    def note(written: Sequence[Tensor]) -> None:
        # What torch clips it has clipped in place.
        ours = provider.kind == "ours"
        taken.append(entering(provider, written) if ours else [sample(g) for g in written])

    with device.aside():
        for _ in range(WARMING):
            eager()
            note(gradients(provider.params))
    with device.no_waiting():  # a failed capture is harder to recover from
        eager()
    note(gradients(provider.params))
    graphs = captured(provider, run, device, pool)
    for _ in range(REPLAYS):
        graphs.whole()
        note(graphs.of_whole)
        graphs.passes()
        graphs.step()
        note(graphs.of_passes)
    wrong = difference(provider, problem, start, taken) or astray(graphs)
    forget(provider.params)
    if wrong is not None:
        raise WrongError(wrong)
    return graphs


def astray(graphs: Graphs) -> str | None:
    """None, or a line that says which graph does not compute the gradients of an eager pass with
    the weights as they are now; it takes a step."""
    graphs.run(graphs.provider)
    right = torch.cat([g.flatten() for g in gradients(graphs.provider.params)])
    for name, replay, written in (
        ("passes", graphs.passes, graphs.of_passes),
        ("whole", graphs.whole, graphs.of_whole),
    ):
        replay()
        error = torch.cat([g.flatten() for g in written]).sub_(right).norm() / right.norm()
        if not error <= CLOSE:
            return f"{graphs.provider.name}: gradients of its {name} graph are off by {error:.2%}"
    return None


def visit(graphs: Graphs, device: Cuda) -> tuple[float, float]:
    """Seconds of one replay of the whole training step, and of the step by itself behind another
    one. The device waits until both are queued, as it would for a loop that replays."""
    device.spin(LEAD)
    marks = [device.mark()]
    for replay in (graphs.whole, graphs.passes, graphs.step):
        replay()
        marks.append(device.mark())
    device.synchronize()
    return device.seconds(*marks[:2]), device.seconds(*marks[2:])
