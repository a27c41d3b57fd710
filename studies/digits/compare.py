"""The comparison from the command line to the table; __main__.py is its front door."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from studies.digits import checkpoint, data, models, options, plot, resume, table, timing
from studies.digits.durable import UnusableError
from studies.digits.methods import METHODS
from studies.digits.options import Given
from studies.digits.results import save
from studies.digits.resume import Clock, Files, Start
from studies.digits.training import Run, Training


def main(argv: Sequence[str] | None = None) -> int:
    """Everything; see __main__.py."""
    given = options.parse(argv, METHODS, models.MODELS)
    settings, out = given.settings, given.out
    torch.set_num_threads(settings.threads)
    files = Files(out / "results.json", out / "checkpoint.pt", out / "curves.png")
    start = None
    try:
        begin = resume.go_on if given.checkpoint_every > 0 else resume.anew
        start = begin(settings, files)
        compare(given, files, start)
        plot.draw(start.results["runs"], settings, files.picture)
    except KeyboardInterrupt:
        print(f"digits: interrupted: {kept(given, files, start)}", file=sys.stderr)
        return 130
    except UnusableError as error:
        print(f"digits: error: {error}", file=sys.stderr)
        return 1
    results = start.results
    print(table.table(results["runs"], results["times"]))
    print()
    print(table.caption(settings, results["runs"], results["times"], results["parameters"]))
    taken = results["seconds"]
    print(
        f"{taken['wall']:.0f} s, {taken['cpu']:.0f} s of CPU time. "
        f"Written: {files.results}, {files.picture}"
    )
    return 0


def compare(given: Given, files: Files, start: Start) -> None:
    """Times the optimizers, then trains every method for every seed; saves after each run."""
    settings, every = given.settings, given.checkpoint_every
    results, training = start.results, start.training
    clock = Clock(start.seconds)
    runs, finished = settings.runs, len(results["runs"])
    if finished == len(runs):
        return
    digits = data.load(getattr(torch, settings.dtype))
    if not results["times"]:
        rounds = timing.WARM_UP + timing.ROUNDS
        with tqdm(
            total=rounds, desc="timing steps", unit="round", leave=False, disable=None
        ) as bar:
            results["times"] = timing.measure(settings, digits, bar.update)
        if every > 0:
            results["seconds"] = clock.seconds()
            save(results, files.results)  # before any checkpoint, which does not stand alone

    def keep(training: Training) -> None:
        checkpoint.save(files.checkpoint, training, clock.seconds())

    before = finished * settings.epochs + (0 if training is None else training.epoch)
    epochs = len(runs) * settings.epochs
    with tqdm(total=epochs, initial=before, unit="epoch", disable=None) as bar:
        for seed, name in runs[finished:]:
            bar.set_description(f"{name}, seed {seed}")
            training = training or Training(name, seed, settings)
            run = training.finish(digits, bar.update, every, keep)
            training = None
            results["runs"].append(run)
            results["complete"] = len(results["runs"]) == len(runs)
            results["seconds"] = clock.seconds()
            save(results, files.results)
            if bar.disable:  # not a terminal: a line for each run in place of the bar
                print(progress(run, len(results["runs"]), len(runs)), file=sys.stderr)


def kept(given: Given, files: Files, start: Start | None) -> str:
    """What an interrupted comparison leaves behind, after saving it."""
    if start is None:
        return "nothing started"
    finished, wanted = len(start.results["runs"]), len(given.settings.runs)
    where = "nothing written"
    if given.checkpoint_every > 0:
        where = "the same command goes on from there"
    elif finished > 0:
        save(start.results, files.results)
        where = f"kept in {files.results}"
    return f"{finished} of {wanted} runs finished, {where}"


def progress(run: Run, finished: int, wanted: int) -> str:
    """One line about a finished run."""
    return (
        f"{finished}/{wanted} {run['method']}, seed {run['seed']}: "
        f"{run['test_accuracy'][-1]:.2f} %, test loss {run['test_loss'][-1]:.4f}"
    )
