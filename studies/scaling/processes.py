"""Two and four processes of this machine against the formulas: what ``--measure`` runs.

Every process is a rank of a gloo group with one thread. Ranks do the same things in the same
shuffled order; a sample is the time of the slowest rank, behind a barrier. A figure is the median
over repeats of a repeat's median, with the range of those.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import rbwa_fused as rf
from benchmarks.measure.timing import in_rounds
from benchmarks.rows.shapes import MODELS
from rbwa_fused.distributed import Elastic

WORLDS = (2, 4)
SIZES = (2**12, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26)  # bytes that are all-reduced
PERIODS = (1, 4, 16)
STEPS = 16  # of training in a sample: a multiple of the periods
REPEATS = 5
ROUNDS, LONG_ROUNDS = 4, 2  # in a repeat, the latter of training
SHORT = 2**22  # bytes; shorter all-reduces are timed several at a time
AT_ONCE = 10
ALL_REDUCE = "all-reduce "  # the items' names, before the bytes
MODEL = "resnet18"
WIDTHS = (784, 1024, 1024, 10)
PARAMETERS = sum(inputs * outputs + outputs for inputs, outputs in pairwise(WIDTHS))
BATCH = 16
TIMEOUT = timedelta(seconds=60)

Figures = dict[str, list[float]]  # seconds, one for each repeat
Item = tuple[Callable[[], object], int]  # what is timed, and how many of it one call does


def replica(network: nn.Module, every: int) -> Elastic:
    """Weights become their mean at every `every`-th step, by one all-reduce of a flat buffer."""
    return Elastic(network, alpha=1.0, every=every, exact=False)


def check_mean(network: nn.Module) -> None:
    """Raises ArithmeticError where a pull does not leave the mean on every rank."""
    params = list(network.parameters())
    with torch.no_grad():
        for p in params:
            p.add_(distributed.get_rank())
        before = [p.clone() for p in params]
        replica(network, every=1).step()
        off = (distributed.get_world_size() - 1) / 2 - distributed.get_rank()
        for p, start in zip(params, before, strict=True):
            if not torch.allclose(p, start + off, atol=1e-5):
                raise ArithmeticError(f"rank {distributed.get_rank()}: not the mean")


def all_reduces() -> dict[str, Item]:
    """One item for each size."""

    def several(buffer: Tensor, count: int) -> None:
        for _ in range(count):
            distributed.all_reduce(buffer)

    counts = {size: AT_ONCE if size < SHORT else 1 for size in SIZES}
    return {
        f"{ALL_REDUCE}{size}": (partial(several, torch.zeros(size // 4), count), count)
        for size, count in counts.items()
    }


def stepped(part: slice, averaged: rf.Average | None) -> Callable[[], object]:
    """The fused step of a part of every parameter."""
    params = [
        nn.Parameter(torch.randn(shape).mul_(0.1).flatten()[part].clone())
        for shape in MODELS[MODEL]().parameters
    ]
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-3)
    return rf.FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4, average=averaged).step


def steps(rank: int, world: int) -> dict[str, Item]:
    """Everything on every rank, and a share of every parameter."""
    parts = {"whole": slice(None), "shard": slice(rank, None, world)}
    averages = {"": None, ", EMA": rf.ema(0.999)}
    return {
        f"{part}{name}": (stepped(cut, policy), 1)
        for part, cut in parts.items()
        for name, policy in averages.items()
    }


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(model: nn.Module, every: int) -> Callable[[], None]:
    """STEPS training steps; weights are averaged after every `every`-th, never if it is 0."""
    opt = rf.FusedSGD(model.parameters(), lr=1e-3, momentum=0.9)
    elastic = replica(model, every) if every else None
    x, y = torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))

    def run() -> None:
        for _ in range(STEPS):
            cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            if elastic is not None:
                elastic.step()

    return run


def trainings() -> dict[str, Item]:
    """Training without exchange, with DDP, and with averages of weights."""
    check_mean(perceptron())
    runs = {"alone": trained(perceptron(), 0)}
    runs["DDP"] = trained(DistributedDataParallel(perceptron()), 0)
    runs |= {f"every {k}": trained(perceptron(), k) for k in PERIODS}
    return {name: (run, STEPS) for name, run in runs.items()}


def timed(items: dict[str, Item], rounds: int) -> Figures:
    """Seconds of each item on the slowest rank, in each repeat."""
    found: Figures = {name: [] for name in items}
    for repeat in range(REPEATS + 1):  # the first warms up
        samples: Figures = {name: [] for name in items}

        def sample(name: str, samples: Figures = samples) -> None:
            call, count = items[name]
            distributed.barrier()
            start = perf_counter()
            call()
            slowest = torch.tensor(perf_counter() - start, dtype=torch.float64)
            distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
            samples[name].append(slowest.item() / count)

        in_rounds(list(items), sample, rounds, repeat)  # in the same order on every rank
        if repeat:
            for name in items:
                found[name].append(median(samples[name]))
    return found


def rank_of(rank: int, world: int, file: Path) -> None:
    """One process; the first one writes the figures."""
    torch.set_num_threads(1)
    store = f"file://{file.with_name('store')}"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT
    )
    figures: Figures = {}
    figures |= timed(all_reduces(), ROUNDS)
    figures |= timed(steps(rank, world), ROUNDS)
    figures |= timed(trainings(), LONG_ROUNDS)
    if rank == 0:
        file.write_text(json.dumps(figures))
    distributed.barrier()
    distributed.destroy_process_group()


def run(world: int, work: Callable[[int, int, Path], None] = rank_of) -> Figures:
    """What so many processes measure.

    Args:
        work: what each of them does, with its rank, their number and the file to write.

    Raises:
        RuntimeError: if one of them failed.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        try:
            spawn(work, (world, file), world)  # ends all when one has failed
        except ProcessException as error:
            raise RuntimeError(f"one of {world} processes failed: {error}") from error
        figures: Figures = json.loads(file.read_text())
    return figures
