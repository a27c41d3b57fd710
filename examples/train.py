"""Trains a small network on real digit images with every method and compares them.

    python -m examples.train                      # all methods, 3 seeds
    python -m examples.train --method rbwa,rbwa-control --dtype float64
    python -m examples.train --help

Needs scikit-learn, matplotlib and tqdm beside PyTorch. Writes results.json after every finished
run, then a table and curves.png. Ctrl-C keeps what is finished.
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ is None:  # run as a file: the folder above holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sklearn
import torch
from tqdm import tqdm

import rbwa_fused
from examples import data, models, options, plot, report, timing, training
from examples.methods import METHODS
from examples.options import Settings


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; the exit code is 0, or 130 after Ctrl-C."""
    settings, out = options.parse(argv, METHODS, models.MODELS)
    torch.set_num_threads(settings.threads)
    results = description(settings)
    path = out / "results.json"
    try:
        compare(settings, results, path)
        plot.draw(results["runs"], settings, out / "curves.png")
    except KeyboardInterrupt:
        runs = results["runs"]
        kept = "nothing written"
        if runs:
            report.save(results, path)
            kept = f"kept in {path}"
        wanted = len(settings.methods) * len(settings.seeds)
        print(
            f"train.py: interrupted: {len(runs)} of {wanted} runs finished, {kept}", file=sys.stderr
        )
        return 130
    print(report.table(results["runs"], results["times"]))
    print()
    print(report.caption(settings, results["runs"], results["times"], results["parameters"]))
    taken = results["seconds"]
    print(f"{taken['wall']:.0f} s, {taken['cpu']:.0f} s of CPU time; {path}, {out / 'curves.png'}")
    return 0


def description(settings: Settings) -> dict[str, Any]:
    """results.json before the first run: what is compared, with what, on what."""
    network = models.build(settings.model, 0)
    return {
        "complete": False,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "rbwa_fused": rbwa_fused.__version__,
            "scikit_learn": sklearn.__version__,
        },
        "cpu": report.cpu_name(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": {},
        "times": {},
        "runs": [],
    }


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
            report.save(results, path)
            if bar.disable:  # not a terminal: a line for each run, no bar
                print(report.progress(run, len(results["runs"]), len(runs)), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
