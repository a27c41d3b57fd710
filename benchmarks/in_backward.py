"""A training step with the optimizer inside the backward pass: ``python -m benchmarks.in_backward``.

Forward, backward and step of a torchvision network on random images, with torch's fused SGD, with
FusedSGD and with FusedSGD(in_backward=True), interleaved; ours must have equal bits before they are
timed. The peak of the resident memory is that of fresh processes which train one of them alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rbwa_fused as rf
from benchmarks import machine
from benchmarks.problem import MOMENTUM, WEIGHT_DECAY, torchvision_model
from benchmarks.progress import bar
from benchmarks.report import spread, table
from benchmarks.timing import Times, switches

LR = 1e-3
OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
BASELINE, OURS, EARLY = "torch SGD fused", "FusedSGD", "FusedSGD(in_backward=True)"
BUILD: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    BASELINE: lambda model: torch.optim.SGD(model.parameters(), fused=True, **OPTIONS),
    OURS: lambda model: rf.FusedSGD(model.parameters(), **OPTIONS),
    EARLY: lambda model: rf.FusedSGD(model.parameters(), in_backward=True, **OPTIONS),
}
CHECKED_STEPS = 3


class Run:
    """A network in training on one batch."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.model = torchvision_model(args.model, torch.float32)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # its masks would differ from row to row
        self.opt = BUILD[name](self.model)
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch_size, 3, args.side, args.side)
        self.images = torch.randn(shape, generator=generator)
        self.labels = torch.arange(args.batch_size) % 10

    def step(self) -> None:
        cross_entropy(self.model(self.images), self.labels).backward()
        self.opt.step()
        self.opt.zero_grad()


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Milliseconds of a training step of each row, in this process."""
    torch.set_num_threads(args.threads)
    runs = {name: Run(name, args) for name in BUILD}
    for run in runs.values():
        for _ in range(CHECKED_STEPS):
            run.step()
    for p, q in zip(runs[OURS].model.parameters(), runs[EARLY].model.parameters(), strict=True):
        if not torch.equal(p, q):
            raise ArithmeticError(f"{EARLY}: other bits than {OURS}")
    times = {name: Times() for name in runs}
    shuffle = random.Random(seed).shuffle
    order = list(runs)
    gc.collect()
    gc.disable()
    for _ in range(args.repeats):
        shuffle(order)
        for name in order:
            before, start = switches(), perf_counter()
            runs[name].step()
            seconds = perf_counter() - start
            times[name].add(seconds, switches() != before)
    return {name: 1e3 * median(own.kept) for name, own in times.items()}


def peak(args: argparse.Namespace, name: str) -> float:
    """Megabytes at most in this process, of which its libraries take the same in each row."""
    torch.set_num_threads(args.threads)
    run = Run(name, args)
    for _ in range(CHECKED_STEPS):
        run.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def report(
    args: argparse.Namespace, results: Sequence[dict[str, float]], peaks: dict[str, float]
) -> str:
    """The table."""
    numel = sum(p.numel() for p in torchvision_model(args.model, torch.float32).parameters())
    rows = []
    for name in BUILD:
        ratios = [result[name] / result[BASELINE] for result in results]
        rows.append(
            [
                name,
                f"{median(result[name] for result in results):.1f}",
                f"{median(ratios):.3f}",
                spread(ratios),
                f"{peaks[name]:.0f}",
                f"{peaks[name] - peaks[OURS]:+.0f}",
            ]
        )
    head = ", ".join(f"{k}: {v}" for k, v in machine.description(args.threads).items())
    return "\n\n".join(
        [
            head,
            f"{args.model}, {numel / 1e6:.1f}M parameters ({4e-6 * numel:.0f} MB of gradients), "
            f"float32, batches of {args.batch_size} {args.side}x{args.side} images; whole training "
            f"steps, {len(results)} fresh processes of {args.repeats} rounds",
            table(["provider", "ms", "ratio", "range", "peak MB", f"to {OURS}"], rows),
        ]
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.in_backward", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4, help="fresh processes")
    parser.add_argument("--repeats", type=int, default=20, help="rounds in each process")
    args = parser.parse_args(argv)
    for name in ("batch_size", "side", "threads", "processes", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    args = arguments(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve a busy machine
    results, peaks = [], {}
    with bar(args.processes + len(BUILD), "process") as progress:
        for seed in range(args.processes):
            with get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (args, seed)))
            progress.update()
        for name in BUILD:
            with get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak, (args, name))
            progress.update()
    print(report(args, results, peaks))


if __name__ == "__main__":
    main()
