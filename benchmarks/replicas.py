"""What pulling K models to their mean costs: ``python -m benchmarks.replicas``.

Every provider has K models of its own, proves in float64 that its pull is the formula, and is then
timed, interleaved with the others. The table shows medians over fresh processes; a ratio is of two
medians of one process, to torch's foreach functions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

import rbwa_fused as rf
from benchmarks.measure import machine
from benchmarks.measure.check import mismatch, sample
from benchmarks.measure.process import fresh
from benchmarks.measure.progress import bar
from benchmarks.measure.timing import Samples, in_rounds, timed
from benchmarks.report.markdown import table
from benchmarks.report.tables import facts_line, spread
from benchmarks.rows.shapes import MODELS, Weights
from rbwa_fused.command import Parser, run

ALPHA = 0.3
DTYPES = ("float32", "float64", "bfloat16", "float16")
ULPS = 4  # of the stored dtype: a mean by torch is rounded where it is stored, the pull once more

Models = list[list[Tensor]]


@dataclass(frozen=True)
class Provider:
    """One row: what it does to K models, and the elements that it reads and writes for each weight
    of one model."""

    name: str
    pull: Callable[[Models], None]
    moved: Callable[[int], int]


def by_foreach(models: Models) -> None:
    """The mean as K - 1 sums and a scaling, then K interpolations."""
    mean = torch._foreach_add(models[0], models[1])
    for params in models[2:]:
        torch._foreach_add_(mean, params)
    torch._foreach_mul_(mean, 1.0 / len(models))
    for params in models:
        torch._foreach_lerp_(params, mean, ALPHA)


def by_hand(models: Models) -> None:
    """What one writes first: parameter by parameter."""
    for replicas in zip(*models, strict=True):
        mean = torch.stack(replicas).mean(0)
        for p in replicas:
            p.lerp_(mean, ALPHA)


def fused(models: Models) -> None:
    rf.pull_(models, ALPHA)


BASELINE = "torch foreach: add, mul, lerp"
OURS = "rbwa_fused.pull_"
CEILING = "x.mul_(c), as much memory in one tensor"
PROVIDERS = (
    Provider(BASELINE, by_foreach, lambda k: 6 * k - 1),
    Provider("torch by hand: stack, mean, lerp_", by_hand, lambda k: 6 * k + 1),
    Provider(OURS, fused, lambda k: 2 * k),
)


def drawn(model: str, dtype: torch.dtype, replicas: int) -> Models:
    """K different models in this dtype."""
    models = []
    for k in range(replicas):
        weights = Weights(MODELS[model](), dtype, torch.device("cpu")).parameters()
        models.append([p.detach().mul_(1.0 + 0.1 * k) for p in weights])
    return models


def check(provider: Provider, models: Models) -> None:
    """Raises ArithmeticError where a pull is not its formula."""
    before = [[sample(p).double() for p in params] for params in models]
    provider.pull(models)
    for k, params in enumerate(models):
        for i, p in enumerate(params):
            own = before[k][i]
            mean = sum(start[i] for start in before) / len(models)
            scale = max(start[i].abs().max().item() for start in before)
            allowed = ULPS * torch.finfo(p.dtype).eps * scale
            wrong = mismatch(
                f"{provider.name}: model {k}", sample(p), own + ALPHA * (mean - own), allowed
            )
            if wrong is not None:
                raise ArithmeticError(wrong)


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Milliseconds of each row, in this process."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    steps: dict[str, Callable[[], object]] = {}
    for provider in PROVIDERS:
        models = drawn(args.model, dtype, args.replicas)
        check(provider, models)
        steps[provider.name] = lambda pull=provider.pull, own=models: pull(own)  # type: ignore[misc]
    memory = torch.ones(args.replicas * MODELS[args.model]().numel, dtype=dtype)
    steps[CEILING] = lambda: memory.mul_(1.0)
    times = {name: Samples() for name in steps}
    in_rounds(list(steps), lambda name: times[name].add(*timed(steps[name])), args.repeats, seed)
    return {name: own.ms() for name, own in times.items()}


def report(args: argparse.Namespace, results: Sequence[dict[str, float]]) -> str:
    """The table."""
    numel = MODELS[args.model]().numel
    size = getattr(torch, args.dtype).itemsize
    moved = {p.name: p.moved(args.replicas) * size for p in PROVIDERS}
    moved[CEILING] = moved[OURS]
    rows = []
    for name, per_weight in moved.items():
        ms = median(result[name] for result in results)
        ratios = [result[name] / result[BASELINE] for result in results]
        rows.append(
            [
                name,
                f"{per_weight}",
                f"{ms:.2f}",
                f"{per_weight * numel / ms / 1e6:.0f}",
                f"{median(ratios):.2f}",
                spread(ratios),
            ]
        )
    share = median(result[CEILING] / result[OURS] for result in results)
    return "\n\n".join(
        [
            facts_line(machine.description(args.threads)),
            f"{args.replicas} x {args.model}, {numel / 1e6:.1f}M parameters each, {args.dtype}; "
            f"{len(results)} fresh processes",
            table(["provider", "bytes a weight", "ms", "GB/s", "ratio", "range"], rows),
            f"{OURS} moves memory at {share:.0%} of the speed of {CEILING}.",
        ]
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.replicas", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--replicas", type=int, default=3, help="models, at least 2")
    parser.add_argument("--model", default="resnet18", choices=MODELS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=8, help="fresh processes")
    parser.add_argument("--repeats", type=int, default=20, help="rounds in each process")
    args = parser.parse_args(argv)
    if args.replicas < 2:
        parser.error(f"--replicas must be at least 2, not {args.replicas}")
    for name in ("threads", "processes", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    args = arguments(argv)
    results = []
    with bar(args.processes, "process") as progress:
        for seed in range(args.processes):
            results.append(fresh(measure, args, seed))
            progress.update()
    print(report(args, results))


if __name__ == "__main__":
    sys.exit(run("python -m benchmarks.replicas", main))
