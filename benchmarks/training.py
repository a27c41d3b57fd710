"""What averaging adds to a whole training step: ``python -m benchmarks.training``.

Forward, backward and step of a torchvision network on random images, or of a small transformer on
random bytes, each row in turn, in another order every round, after it has proved on fixed gradients
that it computes what it says. Two figures tell its overhead against the baseline, torch's fused SGD
or, with ``--optimizer adamw``, its fused AdamW: the difference of the two steps, timed by
themselves, over the whole training step, which is the steadier one; and the ratio of whole training
steps of the same round, with the 95 % bootstrap interval of its median. Clipping is a part of the
step. With ``in_backward=True`` the step is a part of the backward pass, so there is the second
figure alone.

On a GPU the marks between passes and step stand in its queue, and nothing waits between them.
``--graph`` replays each row as one CUDA graph, see graph_training.py.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import graph_training
from benchmarks.measure.clock import Clock, Cpu, Cuda
from benchmarks.measure.process import fresh
from benchmarks.measure.progress import bar
from benchmarks.measure.proof import Skipped, each, proven
from benchmarks.measure.timing import in_rounds, switches
from benchmarks.report.training_tables import (
    Measured,
    Sample,
    Samples,
    report,
    timed_rows,
    wrong_rows,
)
from benchmarks.rows.decoder import BYTES, TOKENS, decoder
from benchmarks.rows.decoder import NAME as TRANSFORMER
from benchmarks.rows.problem import Problem, torchvision_model, with_gradients
from benchmarks.rows.provider import Provider, Row
from benchmarks.rows.providers import (
    CAPTURED,
    CAPTURED_ADAMW,
    ON_GPU,
    TRAINED,
    TRAINED_ADAMW,
    named,
    selected,
)
from rbwa_fused.command import Parser, run

CLASSES = 1000  # of torchvision's networks
SMALL = 64  # pixels, at which a ResNet's own stem leaves no image
WARMING = 3  # steps before the clock runs: cuDNN, allocator, caches
LEAST_ROUNDS = 8  # whatever --seconds says
Batch = tuple[Tensor, Tensor]


Visit = Callable[[], Sample]


def clock_of(args: argparse.Namespace) -> Clock:
    """The device that is measured."""
    return Cuda() if args.device == "cuda" else Cpu()


def table_of(args: argparse.Namespace) -> tuple[Row, ...]:
    """All rows that there are, the baseline first."""
    if args.optimizer == "adamw":
        return CAPTURED_ADAMW if args.graph else TRAINED_ADAMW
    return CAPTURED if args.graph else ON_GPU if args.device == "cuda" else TRAINED


def batch_of(args: argparse.Namespace, device: torch.device) -> Batch:
    """Noise, and its labels."""
    generator = torch.Generator().manual_seed(0)
    if args.model == TRANSFORMER:
        text = torch.randint(BYTES, (args.batch_size, TOKENS + 1), generator=generator).to(device)
        return text[:, :-1], text[:, 1:].flatten()
    drawn = torch.randn((args.batch_size, 3, args.side, args.side), generator=generator)
    if args.channels_last:
        drawn = drawn.to(memory_format=torch.channels_last)
    return drawn.to(device), (torch.arange(args.batch_size) % CLASSES).to(device)


def passes(provider: Provider, batch: Batch, args: argparse.Namespace) -> None:
    """Forward and backward. Freeing the last gradients is a part of them; with ``in_backward`` they
    are freed there already."""
    assert provider.model is not None
    for p in provider.model.parameters():
        p.grad = None
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=args.amp):
        loss = cross_entropy(provider.model(batch[0]).flatten(0, -2), batch[1])
    loss.backward()


def train(provider: Provider, batch: Batch, args: argparse.Namespace, clock: Clock) -> Sample:
    """One training step, from an empty queue on."""
    before, start = switches(), clock.mark()
    passes(provider, batch, args)
    between = clock.mark()
    provider.step()
    end = clock.mark()
    clock.synchronize()
    disturbed = switches() != before
    return Sample(clock.seconds(start, end), clock.seconds(between, end), disturbed)


def replayed(graphs: graph_training.Graphs, device: Cuda) -> Sample:
    """One training step of a CUDA graph."""
    before = switches()
    whole, step = graph_training.visit(graphs, device)
    return Sample(whole, step, switches() != before)


def network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """torchvision's network; a ResNet gets the usual stem for small images, a 3x3 convolution of
    stride 1 without max-pool, or BatchNorm would see one number a channel of a single image. Or the
    transformer."""
    if args.model == TRANSFORMER:
        return decoder(torch.float32).to(device)
    from torchvision.models import ResNet

    model = torchvision_model(args.model, torch.float32)
    if isinstance(model, ResNet) and args.side <= SMALL:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def eager(
    rows: Sequence[Row], args: argparse.Namespace, clock: Clock, skipped: Skipped, proving: bool
) -> dict[str, Visit]:
    """A training step of each row, warmed up and, with `proving`, after it was right."""
    model, batch = network(args, clock.device), batch_of(args, clock.device)
    problem = with_gradients(model) if proving else Problem(model, ([], []))

    def visit(row: Row) -> tuple[str, Visit]:
        provider = proven(row, problem) if proving else row.build(problem, row.name)
        for _ in range(WARMING):
            train(provider, batch, args, clock)
        return row.name, lambda: train(provider, batch, args, clock)

    return dict(each(rows, visit, skipped, table_of(args)[0].name))


def graphed(
    rows: Sequence[Row], args: argparse.Namespace, device: Cuda, skipped: Skipped
) -> dict[str, Visit]:
    """A training step of each row under CUDA graphs, after it was right."""
    model, batch = network(args, device.device), batch_of(args, device.device)
    problem, pool = Problem(model, ([], []), tensor_lr=True), device.pool()

    def run(provider: Provider) -> None:
        passes(provider, batch, args)

    def visit(row: Row) -> tuple[str, Visit]:
        graphs = graph_training.proven(row, problem, run, device, pool)
        return row.name, lambda: replayed(graphs, device)

    return dict(each(rows, visit, skipped, table_of(args)[0].name))


def visits(
    args: argparse.Namespace, rows: Sequence[str], clock: Clock, skipped: Skipped, proving: bool
) -> dict[str, Visit]:
    """What is timed of these rows."""
    gc.collect()
    gc.disable()  # no collection in a capture or on the clock
    chosen = named(list(rows), table_of(args))
    if args.graph:
        return graphed(chosen, args, cast(Cuda, clock), skipped)
    return eager(chosen, args, clock, skipped, proving)


def measure(args: argparse.Namespace, rows: tuple[str, ...], seed: int) -> Measured:
    """The samples of each row in this process."""
    torch.set_num_threads(args.threads)
    clock, skipped = clock_of(args), Skipped()
    description = clock.description()
    numel = sum(p.numel() for p in network(args, torch.device("cpu")).parameters())
    found = visits(args, rows, clock, skipped, proving=True)
    samples: Samples = {name: [] for name in found}
    gc.collect()
    in_rounds(
        list(found),
        lambda name: samples[name].append(found[name]()),
        args.repeats,
        seed,
        limit=args.seconds,
        least=LEAST_ROUNDS,
    )
    return Measured(description, numel, samples, skipped.reasons, skipped.wrong)


def peak(args: argparse.Namespace, row: str) -> float:
    """Megabytes at most: of the allocator on a GPU; else resident ones of the process, of which its
    libraries take the same in each row."""
    torch.set_num_threads(args.threads)
    clock = clock_of(args)
    for visit in visits(args, [row], clock, Skipped(), proving=False).values():
        visit()
    return clock.peak_bytes() / 1e6


def measured(
    args: argparse.Namespace, after_process: Callable[[], object] = lambda: None
) -> tuple[list[Measured], dict[str, float]]:
    """What each fresh process finds, and the rows' `peak`, if that is asked for."""
    results, peaks = [], {}
    for seed in range(args.processes):
        results.append(fresh(measure, args, args.rows, seed))
        after_process()
    for name in timed_rows(results) if args.memory else ():
        peaks[name] = fresh(peak, args, name)
        after_process()
    return results, peaks


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0]
    )
    models = f"a classifier of torchvision, or {TRANSFORMER} (default: resnet18)"
    parser.add_argument("--model", default="resnet18", help=models)
    baselines = "whose rows to measure, against torch's fused one (default: %(default)s)"
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"), help=baselines)
    samples = f"images, or sequences of {TOKENS} bytes (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=8, help=samples)
    parser.add_argument("--side", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", action="store_true", help="forward under bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true", help="images and weights")
    graph = "cuda: forward, backward and step as one CUDA graph, lr a tensor, capturable=True"
    parser.add_argument("--graph", action="store_true", help=graph)
    only = "rows to measure beside the baseline, such as 'RBWA*'; may be repeated"
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help=only)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4, help="fresh processes")
    parser.add_argument("--repeats", type=int, default=40, help="rounds in each process")
    seconds = f"of rounds in a process, but {LEAST_ROUNDS} rounds at least (default: no limit)"
    parser.add_argument("--seconds", type=float, default=math.inf, help=seconds)
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="leave out the column peak MB"
    )
    args = parser.parse_args(argv)
    from torchvision.models import list_models

    for name in ("batch_size", "side", "threads", "processes", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.model not in (TRANSFORMER, *list_models()):
        parser.error(
            f"unknown model: {args.model} ({TRANSFORMER}, or see torchvision.models.list_models())"
        )
    if args.channels_last and args.model == TRANSFORMER:
        parser.error("--channels-last is for images")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    if args.graph and args.device != "cuda":
        parser.error("--graph is for --device cuda")
    try:
        rows = selected(args.only, table_of(args))
        args.rows = tuple(row.name for row in rows if row.available())
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table; ends with status 1 if a row of ours was wrong."""
    args = arguments(argv)
    if find_spec("scipy") is None:
        sys.exit("benchmarks.training: scipy is needed, for the intervals")
    with bar(args.processes + args.memory * len(args.rows), "process") as progress:
        results, peaks = measured(args, progress.update)
    print(report(args, results, peaks))
    if wrong_rows(results):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run("python -m benchmarks.training", main))
