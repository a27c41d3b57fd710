"""What averaging adds to a whole training step: ``python -m benchmarks.training``.

Forward, backward and step of a torchvision network on random images, each row in turn, in another
order every round, after it has proved on fixed gradients that it computes what it says. Two figures
tell its overhead against ``torch.optim.SGD(fused=True)``: the difference of the two steps, timed by
themselves, over the whole training step, which is the steadier one; and the ratio of whole training
steps of the same round, with the 95 % bootstrap interval of its median. With ``in_backward=True``
the step is a part of the backward pass, so there is the second figure alone.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import ResNet, list_models

from benchmarks import machine
from benchmarks.problem import Problem, torchvision_model, with_gradients
from benchmarks.process import prepared
from benchmarks.progress import bar
from benchmarks.provider import Provider
from benchmarks.providers import BASELINE, IN_BACKWARD, TRAINED, named, selected
from benchmarks.report import table
from benchmarks.timing import switches

CLASSES = 1000  # of torchvision's networks
SMALL = 64  # pixels, at which a ResNet's own stem leaves no image
WARMING = 3  # steps before the clock runs: cuDNN, allocator, caches
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sample:
    """Seconds of one training step: forward and backward, the optimizer's step; and whether a
    thread of the process lost its core in between."""

    passes: float
    step: float
    disturbed: bool

    @property
    def whole(self) -> float:
        return self.passes + self.step


def images(args: argparse.Namespace) -> Batch:
    """A batch of noise and its labels."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((args.batch_size, 3, args.side, args.side), generator=generator)
    if args.channels_last:
        drawn = drawn.to(memory_format=torch.channels_last)
    return drawn.to(args.device), (torch.arange(args.batch_size) % CLASSES).to(args.device)


def now(device: str) -> float:
    """The time at which the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def train(provider: Provider, batch: Batch, args: argparse.Namespace) -> Sample:
    """One training step. Freeing the last gradients is a part of forward and backward; with
    ``in_backward`` they are freed there already."""
    assert provider.model is not None
    before, start = switches(), now(args.device)
    for p in provider.model.parameters():
        p.grad = None
    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        loss = cross_entropy(provider.model(batch[0]), batch[1])
    loss.backward()
    between = now(args.device)
    provider.step()
    end = now(args.device)
    return Sample(between - start, end - between, switches() != before)


def network(args: argparse.Namespace) -> nn.Module:
    """torchvision's network; a ResNet gets the usual stem for small images, a 3x3 convolution of
    stride 1 without max-pool, or BatchNorm would see one number a channel of a single image."""
    model = torchvision_model(args.model, torch.float32)
    if isinstance(model, ResNet) and args.side <= SMALL:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(args.device)


def measure(args: argparse.Namespace, rows: tuple[str, ...], seed: int) -> dict[str, list[Sample]]:
    """The samples of each row, one a round, in this process."""
    torch.set_num_threads(args.threads)
    providers = prepared(named(rows, TRAINED), with_gradients(network(args)))
    batch = images(args)
    for provider in providers:
        for _ in range(WARMING):
            train(provider, batch, args)
    samples: dict[str, list[Sample]] = {provider.name: [] for provider in providers}
    shuffle = random.Random(seed).shuffle
    order = list(providers)
    gc.collect()
    gc.disable()
    for _ in range(args.repeats):
        shuffle(order)
        for provider in order:
            samples[provider.name].append(train(provider, batch, args))
    return samples


def peak(args: argparse.Namespace, row: str) -> float:
    """Megabytes at most: of the allocator on a GPU; else resident ones of the process, of which its
    libraries take the same in each row."""
    torch.set_num_threads(args.threads)
    problem = Problem(network(args), ([], []))
    (provider,) = [r.build(problem, r.name) for r in named([row], TRAINED)]
    batch = images(args)
    for _ in range(WARMING):
        train(provider, batch, args)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def whole_ratios(own: Sequence[Sample], base: Sequence[Sample]) -> list[float]:
    """Of the whole steps of the same rounds, but those in which a core was lost."""
    pairs = list(zip(own, base, strict=True))
    calm = [(a, b) for a, b in pairs if not (a.disturbed or b.disturbed)]
    kept = calm if len(calm) > len(pairs) // 4 else pairs
    return [a.whole / b.whole for a, b in kept]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median; nan of a single value."""
    if len(values) < 2:
        return math.nan, math.nan
    found = stats.bootstrap(
        (np.array(values),), np.median, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def milliseconds(samples: Sequence[Sample], part: str) -> float:
    """Median of the samples in which no core was lost, if there are enough."""
    calm = [s for s in samples if not s.disturbed]
    kept = calm if len(calm) > len(samples) // 4 else samples
    return 1e3 * median(getattr(s, part) for s in kept)


def figures(results: Sequence[dict[str, list[Sample]]], name: str) -> dict[str, Any]:
    """What the table says of a row: medians over processes of medians of each."""
    steps, wholes, overheads, ratios = [], [], [], []
    for result in results:
        own, base = result[name], result[BASELINE]
        steps.append(milliseconds(own, "step"))
        wholes.append(milliseconds(own, "whole"))
        difference = steps[-1] - milliseconds(base, "step")
        overheads.append(100 * difference / milliseconds(base, "whole"))
        ratios += whole_ratios(own, base)
    low, high = interval(ratios)
    within = name.endswith(IN_BACKWARD)
    return {
        "step ms": None if within else median(steps),
        "whole ms": median(wholes),
        "overhead": None if within else median(overheads),
        "overheads": None if within else (min(overheads), max(overheads)),
        "ratio": median(ratios),
        "interval": (low, high),
        "pairs": len(ratios),
    }


def report(
    args: argparse.Namespace,
    results: Sequence[dict[str, list[Sample]]],
    peaks: dict[str, float],
) -> str:
    """The table."""
    numel = sum(p.numel() for p in network(args).parameters())
    rows = []
    for name in results[0]:
        found = figures(results, name)
        timed = found["overheads"] is not None
        rows.append(
            [
                name,
                f"{found['step ms']:.2f}" if timed else "-",
                f"{found['whole ms']:.1f}",
                f"{found['overhead']:+.2f} %" if timed else "-",
                "{:+.2f} to {:+.2f}".format(*found["overheads"]) if timed else "-",
                f"{found['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*found["interval"]),
                str(found["pairs"]),
                f"{peaks[name]:.0f}" if name in peaks else "-",
            ]
        )
    head = ", ".join(f"{k}: {v}" for k, v in machine.description(args.threads).items())
    title = (
        f"{args.model} on {args.device}, {numel / 1e6:.1f}M parameters, float32"
        f"{', bfloat16 autocast' * args.amp}{', channels_last' * args.channels_last}, batches of "
        f"{args.batch_size} {args.side}x{args.side} images; {len(results)} fresh processes of "
        f"{args.repeats} rounds"
    )
    header = ["row", "step ms", "whole ms", "overhead", "range", "ratio", "95 %", "pairs"]
    return "\n\n".join([head, title, table([*header, "peak MB"], rows)])


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", action="store_true", help="forward under bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="images and weights")
    only = "rows to measure beside the baseline, such as 'RBWA*'; may be repeated"
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help=only)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4, help="fresh processes")
    parser.add_argument("--repeats", type=int, default=40, help="rounds in each process")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="leave out the column peak MB"
    )
    args = parser.parse_args(argv)
    for name in ("batch_size", "side", "threads", "processes", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.model not in list_models():
        parser.error(f"unknown model: {args.model} (see torchvision.models.list_models())")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    try:
        args.rows = tuple(row.name for row in selected(args.only, TRAINED) if row.available())
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    args = arguments(argv)
    results, peaks = [], {}
    remembered = args.rows if args.memory else ()
    with bar(args.processes + len(remembered), "process") as progress:
        for seed in range(args.processes):
            with get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (args, args.rows, seed)))
            progress.update()
        for name in remembered:
            with get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak, (args, name))
            progress.update()
    print(report(args, results, peaks))


if __name__ == "__main__":
    main()
