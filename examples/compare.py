"""The comparison from the command line to the table; train.py is its front door."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples import data, models, options, plot, table, timing, training
from examples.methods import METHODS
from examples.options import Settings
from examples.results import description, save
from examples.training import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Everything; see train.py."""
    settings, out = options.parse(argv, METHODS, models.MODELS)
    torch.set_num_threads(settings.threads)
    results = description(settings)
    path, picture = out / "results.json", out / "curves.png"
    try:
        compare(settings, results, path)
        plot.draw(results["runs"], settings, picture)
    except KeyboardInterrupt:
        finished = len(results["runs"])
        if finished > 0:
            save(results, path)
        kept = f"kept in {path}" if finished > 0 else "nothing written"
        wanted = len(settings.seeds) * len(settings.methods)
        print(
            f"train.py: interrupted: {finished} of {wanted} runs finished, {kept}", file=sys.stderr
        )
        return 130
    except OSError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    print(table.table(results["runs"], results["times"]))
    print()
    print(table.caption(settings, results["runs"], results["times"], results["parameters"]))
    taken = results["seconds"]
    print(f"{taken['wall']:.0f} s, {taken['cpu']:.0f} s of CPU time. Written: {path}, {picture}")
    return 0


def compare(settings: Settings, results: dict[str, Any], path: Path) -> None:
    """Times the optimizers, then trains every method for every seed; saves after each run."""
    wall, cpu = time.perf_counter(), time.process_time()
    digits = data.load(getattr(torch, settings.dtype))
    rounds = timing.WARM_UP + timing.ROUNDS
    with tqdm(total=rounds, desc="timing steps", unit="round", leave=False, disable=None) as bar:
        results["times"] = timing.measure(settings, digits, bar.update)
    runs = [(seed, name) for seed in settings.seeds for name in settings.methods]
    with tqdm(total=len(runs) * settings.epochs, unit="epoch", disable=None) as bar:
        for seed, name in runs:
            bar.set_description(f"{name}, seed {seed}")
            run = training.train(name, seed, settings, digits, bar.update)
            results["runs"].append(run)
            results["complete"] = len(results["runs"]) == len(runs)
            results["seconds"] = {
                "wall": round(time.perf_counter() - wall, 1),
                "cpu": round(time.process_time() - cpu, 1),
            }
            save(results, path)
            if bar.disable:  # not a terminal: a line for each run in place of the bar
                print(progress(run, len(results["runs"]), len(runs)), file=sys.stderr)


def progress(run: Run, finished: int, wanted: int) -> str:
    """One line about a finished run."""
    return (
        f"{finished}/{wanted} {run['method']}, seed {run['seed']}: "
        f"{run['test_accuracy'][-1]:.2f} %, test loss {run['test_loss'][-1]:.4f}"
    )
