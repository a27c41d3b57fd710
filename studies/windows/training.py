"""A small language model, and the two ways to its end: averaged windows, and real decays."""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import rbwa_fused as rf
from rbwa_fused.papers import decays

SHAPES = ("linear", "sqrt", "cosine")
CONTEXT, BATCH, WIDTH = 16, 256, 256  # bytes, sequences, hidden units
WARMUP = 100  # steps
LR = 3e-3
TEST_BATCHES = 40
EVERY_TENTH = 10  # file is for testing


class Text(NamedTuple):
    """Bytes as vectors of int64."""

    train: Tensor
    test: Tensor


def load() -> Text:
    """The source of Python's own library, its top-level files by name, split by file."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = [], []
    for i, file in enumerate(files):
        parts[i % EVERY_TENTH == 0].append(file.read_bytes())
    train, test = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return Text(train.long(), test.long())


def model(seed: int) -> nn.Module:
    """The next byte from those before it (Bengio et al. 2003): 0.2 million parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(256, 24),
        nn.Flatten(),
        nn.Linear(24 * CONTEXT, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, 256),
    )


def loss_of(net: nn.Module, text: Tensor, chosen: Tensor) -> Tensor:
    """Cross entropy, of the bytes behind ``chosen`` contexts."""
    windows = text[chosen[:, None] + torch.arange(CONTEXT + 1)]
    return functional.cross_entropy(net(windows[:, :-1]), windows[:, -1])


def places(text: Tensor, generator: torch.Generator) -> Tensor:
    """Where the contexts of a batch begin."""
    return torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)


@torch.no_grad()
def tested(net: nn.Module, text: Text) -> float:
    """Bits a byte, of the same test bytes for everybody."""
    generator = torch.Generator().manual_seed(0)
    losses = [loss_of(net, text.test, places(text.test, generator)) for _ in range(TEST_BATCHES)]
    return float(torch.stack(losses).mean()) / 0.6931471805599453


class Branch(NamedTuple):
    """Where a run stands: what a decay goes on from."""

    net: nn.Module
    optimizer: dict[str, Any]
    order: Tensor


def trained(
    net: nn.Module,
    optimizer: Any,
    text: Text,
    order: torch.Generator,
    factors: Iterator[float],
    behind: Callable[[int], None] = lambda step: None,
) -> None:
    """A step for each factor of the learning rate."""
    for step, factor in enumerate(factors, start=1):
        optimizer.param_groups[0]["lr"] = LR * factor
        loss_of(net, text.train, places(text.train, order)).backward()
        optimizer.step()
        optimizer.zero_grad()
        behind(step)


def results(seed: int, steps: int, lengths: list[int], text: Text) -> dict[str, float]:
    """Bits a byte at the end of a run of ``steps`` at a constant rate: of its weights, of windows
    of its last steps, and of runs that decayed over the same steps instead."""
    windows = {
        f"{shape} window of {length}": rf.merge(steps - length, steps, shape)  # type: ignore[arg-type]
        for length in lengths
        for shape in SHAPES
    }
    net, order = model(seed), torch.Generator().manual_seed(seed)
    optimizer = rf.FusedAdamW(net.parameters(), lr=LR, weight_decay=0.1, average=windows)
    branches: dict[int, Branch] = {}

    def branch(step: int) -> None:
        if steps - step in lengths:
            saved = copy.deepcopy(optimizer.state_dict())
            branches[steps - step] = Branch(copy.deepcopy(net), saved, order.get_state())

    trained(net, optimizer, text, order, (min(1, (i + 1) / WARMUP) for i in range(steps)), branch)
    found = {"constant": tested(net, text)}
    for name in windows:
        with optimizer.averaged(which=name):
            found[name] = tested(net, text)
    for length, start in branches.items():
        for shape in SHAPES:
            net = copy.deepcopy(start.net)
            own = rf.FusedAdamW(net.parameters(), lr=LR, weight_decay=0.1)
            own.load_state_dict(start.optimizer, averages="drop")
            order.set_state(start.order)
            trained(net, own, text, order, iter(decays(length, shape)[:-1]))
            found[f"{shape} decay over {length}"] = tested(net, text)
    return found
