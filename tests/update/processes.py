"""Training among processes: what test_threads.py runs in an interpreter of its own.

Forked children inherit the locks and threads of their parent as they are, so a mistake here hangs
instead of failing; an alarm ends whatever takes too long.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rbwa_fused as rf

PATIENCE = 100  # seconds
LARGE = 100_000  # elements: a step of so many takes torch's thread pool


def optimizer(params: Any) -> rf.FusedSGD:
    return rf.FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, average=rf.ema(0.5))


def parameter(elements: int = LARGE) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, elements))


def train(opt: Any, first: int, last: int) -> None:
    """Steps of gradients that depend on the weights."""
    for step in range(first, last + 1):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = (p.detach() + step) * 0.1
        opt.step()


def everything(opt: Any) -> list[bytes]:
    """The bits of weights, state and averaged weights."""

    def bits() -> list[bytes]:
        params = [p for group in opt.param_groups for p in group["params"]]
        state = [value for p in params for value in opt.state.get(p, {}).values()]
        return [t.detach().numpy().tobytes() for t in (*params, *state)]

    trained = bits()
    with opt.averaged():
        return trained + bits()


def in_child(work: Callable[[], Any]) -> Any:
    """What a forked child answers; None if it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(work()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(answer) if answer else None


# ---- what is tried -----------------------------------------------------------------------------


def a_fork_on_one_thread() -> dict[str, Any]:
    p = parameter()
    opt = optimizer([p])
    train(opt, 1, 2)  # on two threads
    before = everything(opt)

    def go_on() -> list[bytes]:
        torch.set_num_threads(1)
        train(opt, 3, 5)
        return everything(opt)

    child = in_child(go_on)
    after = everything(opt)
    train(opt, 3, 5)
    return {"child": child, "before": before, "after": after, "parent": everything(opt)}


def a_fork_of_a_small_model() -> dict[str, Any]:
    p, large = parameter(1000), parameter()
    opt = optimizer([p])
    train(optimizer([large]), 1, 2)  # the parent's threads are there

    def go_on() -> list[bytes]:
        train(opt, 1, 5)
        return everything(opt)

    child = in_child(go_on)
    train(opt, 1, 5)
    return {"child": child, "parent": everything(opt)}


def workers_of_a_loader() -> dict[str, Any]:
    ends = {}
    for workers in (0, 2):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(24, 300), torch.randn(24, 300))
        model = nn.Linear(300, 300)
        opt = optimizer(model.parameters())
        context = "fork" if workers else None
        for _ in range(2):
            loader = DataLoader(
                data, 4, num_workers=workers, multiprocessing_context=context, timeout=workers * 30
            )
            for x, y in loader:
                opt.zero_grad()
                (model(x) - y).square().mean().backward()
                opt.step()
        ends[str(workers)] = everything(opt)
    return ends


def hogwild() -> dict[str, Any]:
    """Two children step one model in shared memory: each a parameter of its own, both a third."""
    model = nn.ParameterList([parameter(5000) for _ in range(3)]).share_memory()
    built_before = optimizer(model)
    addresses = [p.data_ptr() for p in model]

    def work(own: int, opt: Any) -> None:
        torch.set_num_threads(1)
        for step in range(1, 51):
            for i in (own, 2):
                model[i].grad = torch.full_like(model[i], 0.001 * step)
            opt.step()

    context = get_context("fork")
    children = [
        context.Process(target=work, args=(0, built_before)),
        context.Process(target=work, args=(1, optimizer(model))),
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    alone = parameter(5000)
    opt = optimizer([alone])
    for step in range(1, 51):
        alone.grad = torch.full_like(alone, 0.001 * step)
        opt.step()
    return {
        "exits": [child.exitcode for child in children],
        "own": [bool((model[i] == alone).all()) for i in (0, 1)],
        "both": bool((model[2] < parameter(5000)).all()),
        "in place": addresses == [p.data_ptr() for p in model],
    }


def go_on_elsewhere(opt: Any, pipe: Any) -> None:
    train(opt, 3, 5)
    pipe.send(everything(opt))


def a_spawned_process() -> dict[str, Any]:
    p = parameter()
    opt = optimizer([p])
    train(opt, 1, 2)
    reading, writing = get_context("spawn").Pipe(duplex=False)
    child = get_context("spawn").Process(target=go_on_elsewhere, args=(opt, writing))
    child.start()
    writing.close()
    answer = reading.recv()
    child.join()
    copy = parameter()
    again = optimizer([copy])
    train(again, 1, 5)
    return {"child": answer, "alone": everything(again), "weights": p.detach().numpy().tobytes()}


def main(file: str) -> None:
    signal.alarm(PATIENCE)
    torch.set_num_threads(2)
    answers = {}
    for scenario in (
        a_fork_on_one_thread,
        a_fork_of_a_small_model,
        workers_of_a_loader,
        hogwild,
        a_spawned_process,
    ):
        answers[scenario.__name__] = scenario()
        with open(file, "wb") as out:
            pickle.dump(answers, out)


if __name__ == "__main__":
    main(sys.argv[1])
