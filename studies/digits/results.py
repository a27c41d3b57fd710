"""results.json: what was compared, with what, on what, and every run that is finished."""

from __future__ import annotations

import json
import math
import platform
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import sklearn
import torch

import rbwa_fused
from studies.digits import durable, models
from studies.digits.durable import FOREIGN, UnusableError
from studies.digits.options import Settings
from studies.digits.timing import BASELINE
from studies.digits.training import Run


class Seconds(TypedDict):
    """What was spent on all that is kept, over every start of the comparison."""

    wall: float
    cpu: float


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
        "cpu": cpu_name(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": Seconds(wall=0.0, cpu=0.0),
        "times": {},
        "runs": [],
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Replaces the file in one piece: whoever reads it, or stops us, finds a whole one."""
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    durable.write(path, f"{text}\n".encode())


def load(path: Path, settings: Settings) -> dict[str, Any] | None:
    """What `save` wrote for the same settings, or None if there is no file. A null is a nan.

    Raises:
        UnusableError: for anything else.
    """
    content = durable.read(path)
    if content is None:
        return None
    try:
        results = json.loads(content)
    except (ValueError, RecursionError):
        raise UnusableError(path, FOREIGN) from None
    expected = description(settings)
    if not (
        isinstance(results, dict)
        and results.keys() == expected.keys()
        and isinstance(results["settings"], dict)
        and isinstance(results["versions"], dict)
    ):
        raise UnusableError(path, FOREIGN)
    if other := differences(results["settings"], asdict(settings)):
        raise UnusableError(path, f"was written with other settings ({other})")
    if not (
        is_seconds(results["seconds"])
        and are_times(results["times"], settings)
        and isinstance(results["runs"], list)
        and all(is_run(run, settings.epochs) for run in results["runs"])
        and is_beginning([(run["seed"], run["method"]) for run in results["runs"]], settings)
        and results["complete"] is (len(results["runs"]) == len(settings.runs))
    ):
        raise UnusableError(path, FOREIGN)
    nan = float("nan")
    for run in results["runs"]:
        for curve in CURVES:
            run[curve] = [nan if value is None else value for value in run[curve]]
    return results


CURVES = ("train_loss", "test_loss", "test_accuracy")


def is_run(run: Any, epochs: int) -> bool:
    """Whether it has the figures of so many epochs."""
    return (
        isinstance(run, dict)
        and run.keys() == Run.__annotations__.keys()
        and all(
            isinstance(run[curve], list)
            and len(run[curve]) == epochs
            and all(value is None or isinstance(value, float) for value in run[curve])
            for curve in CURVES
        )
    )


def is_beginning(runs: list[tuple[int, str]], settings: Settings) -> bool:
    return runs == settings.runs[: len(runs)]


def are_times(times: Any, settings: Settings) -> bool:
    """Whether they are measured for every method, or not at all."""
    return isinstance(times, dict) and (
        not times
        or (
            times.keys() == {BASELINE, *settings.methods}
            and all(are_numbers(time, {"ms", "ratio"}) for time in times.values())
        )
    )


def is_seconds(seconds: Any) -> bool:
    return are_numbers(seconds, Seconds.__annotations__.keys())


def are_numbers(value: Any, names: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == names
        and all(isinstance(number, float) for number in value.values())
    )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What another comparison was run with, in words of one line; empty if it was the same."""

    def listed(values: Mapping[str, Any], name: str) -> Any:
        value = values.get(name)
        return list(value) if isinstance(value, tuple) else value  # JSON knows no tuples

    return ", ".join(
        f"{name} {reprlib.repr(listed(theirs, name))}, now {reprlib.repr(listed(ours, name))}"
        for name in dict.fromkeys([*ours, *theirs])
        if listed(theirs, name) != listed(ours, name)
    )


def finite(value: Any) -> Any:
    """The same with null for what JSON cannot say: a diverged run's nan and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
