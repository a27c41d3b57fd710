"""All that needs a GPU, in stages: `make gpu OUT=folder`, or without make

    python tests/gpu_run.py --out folder
    python tests/gpu_run.py --out folder --stages bench,smoke --minutes 4
    python tests/gpu_run.py --out folder --wheels folder-of-wheels

Needs Python with torch, Triton, setuptools and pytest, and nvcc; no network. Each stage
(gpu_stages.py) is a process group with a time limit of its own, and a stage that fails, dies or
hangs stops none behind it, except those that make no sense without it. What does not fit into the
minutes is left out, the least informative first. At any moment, also if this is killed, the folder
holds what there is: log.txt, the table so far, the run in JSON, and every row of the benchmarks.

`--wheels` installs what the machine lacks (pybind11, hypothesis, expecttest) for this run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0
GRACE = 5.0  # seconds that a stage has to say where it stood
LINE = 72  # characters of a table's line for what a stage says
REASONS = 6  # lines of a failed stage that are printed
MOST_REASONS = 20  # of all stages
FAILING = re.compile(  # pytest, our programs, pip and compilers, Python
    r"(FAILED|ERROR)\b|(\*\*)?WRONG\b|not measured|.*: (fatal )?error: |[\w.]*Error: "
)

# What a stage's status and output come to: whether it passed, and its telling line.
Judge = Callable[[int, str], tuple[bool, str]]


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def failures(text: str) -> list[str]:
    """The lines that name a failure."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if FAILING.match(line)]


def judged(status: int, text: str) -> tuple[bool, str]:
    """By the exit status; the first failure stands beside the last line."""
    first = failures(text)[:1] if status != 0 else []
    return status == 0, "; ".join([last_line(text), *(f"first: {line}" for line in first)])


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        limit, least: the seconds that it may take, and fewer than which it is not worth beginning.
        needs: the stage without which it makes no sense.
        fallback: taken if it did not pass.
    """

    name: str
    command: Sequence[str]
    limit: float
    least: float = 10.0
    needs: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Judge = judged
    fallback: Stage | None = None


@dataclass
class Outcome:
    """What became of a stage: "running", "ok", "failed", "killed", "left out" or "interrupted"."""

    stage: Stage
    status: str
    seconds: float = 0.0
    line: str = ""
    failures: list[str] = field(default_factory=list)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each stage."""
    width = max((len(o.stage.name) for o in outcomes), default=0)
    return "\n".join(
        f"{o.stage.name:{width}}  {o.status:11}  {o.seconds:5.0f} s  {o.line[:LINE]}".rstrip()
        for o in outcomes
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process group: asks first, so that pytest and the benchmarks say where they stood."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass  # one that hangs in the driver is left behind


class Run:
    """Takes stages one after another, and keeps what there is to show in a folder."""

    def __init__(
        self, out: Path, facts: Mapping[str, Any], minutes: float, name: str, begun: float
    ) -> None:
        self.out = out
        self.facts = facts
        self.seconds = 60 * minutes
        self.name = name
        self.begun = begun
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("ab", buffering=0)

    def left(self) -> float:
        return self.seconds - (perf_counter() - self.begun)

    def all(self, stages: Sequence[Stage]) -> int:
        """Takes all stages; the number of those that did not pass. What was left out is none."""
        for stage in stages:
            passed = self.attempt(stage)
            if not passed and stage.fallback is not None:
                self.attempt(stage.fallback)
        return sum(o.status in ("failed", "killed") for o in self.outcomes)

    def attempt(self, stage: Stage) -> bool:
        """Takes one stage if it makes sense and fits."""
        outcome = Outcome(stage, "running")
        self.outcomes.append(outcome)
        seconds = min(stage.limit, self.left() - GRACE)
        passed = {o.stage.name: o.status == "ok" for o in self.outcomes[:-1]}
        if not passed.get(stage.needs or "", True):
            outcome.status, outcome.line = "left out", f"no {stage.needs}"
        elif seconds < stage.least:
            outcome.status, outcome.line = "left out", f"{max(seconds, 0):.0f} s are left"
        else:
            self.write()
            self.take(outcome, seconds)
        self.write()
        print(table([outcome]), flush=True)
        return outcome.status == "ok"

    def take(self, outcome: Outcome, seconds: float) -> None:
        """Runs a stage, its output appended to the log, and judges it."""
        stage, begun = outcome.stage, perf_counter()
        self.log.write(f"\n######## {stage.name}: {' '.join(shortened(stage.command))}\n".encode())
        at = self.log.tell()
        status, outcome.status = 1, "interrupted"
        try:
            status = self.wait_for(stage, seconds)
            outcome.status = "failed"
        except subprocess.TimeoutExpired:
            outcome.status = "killed"
        finally:
            outcome.seconds = perf_counter() - begun
            text = self.section(at)
            passed, outcome.line = stage.judge(status, text)
            outcome.failures = failures(text)[:REASONS]
        if status < 0:
            outcome.line = f"died by signal {-status}; {outcome.line}"
        if passed and outcome.status == "failed":
            outcome.status = "ok"

    def wait_for(self, stage: Stage, seconds: float) -> int:
        """The exit status of a stage, which is over then, with all that it has started.

        Raises:
            subprocess.TimeoutExpired: if it took longer.
        """
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
        except OSError as error:
            self.log.write(f"{stage.command[0]}: {error.strerror}\n".encode())
            return 127
        try:
            return process.wait(seconds)
        finally:
            end(process)

    def section(self, at: int) -> str:
        """What the log has from a place on."""
        with (self.out / "log.txt").open("rb") as file:
            file.seek(at)
            return file.read().decode(errors="replace")

    def summary(self) -> str:
        """The table, and above it what failed."""
        why = [
            f"{o.stage.name}: {line[:100]}"
            for o in self.outcomes
            if o.status not in ("ok", "left out")
            for line in o.failures
        ]
        return "\n".join([*why[:MOST_REASONS], *([""] if why else []), table(self.outcomes)])

    def write(self) -> None:
        """The table and the run as they stand."""
        (self.out / "table.txt").write_text(self.summary() + "\n")
        stages = [
            {
                "stage": o.stage.name,
                "command": " ".join(shortened(o.stage.command)),
                "status": o.status,
                "seconds": round(o.seconds, 1),
                "line": o.line,
                "failures": o.failures,
            }
            for o in self.outcomes
        ]
        found = {"machine": dict(self.facts), "minutes": self.seconds / 60, "stages": stages}
        (self.out / f"{self.name}-run.json").write_text(json.dumps(found, indent=1) + "\n")


def shortened(command: Sequence[str]) -> list[str]:
    """A command as it is shown, without the folders of this machine."""
    named = {sys.executable: "python"}
    return [
        named.get(part, part if not os.path.isabs(part) else os.path.basename(part))
        for part in command
    ]


@contextmanager
def terminated() -> Iterator[None]:
    """A polite kill ends the run as Ctrl-C does: the stage ends with it, and the table is there."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def chosen(stages: Sequence[Stage], names: str | None) -> list[Stage]:
    """The stages of those names, in their order; all if there are none.

    Raises:
        ValueError: for a name that no stage has.
    """
    known = [stage.name for stage in stages]
    asked = known if names is None else [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise ValueError(f"unknown stage: {name!r} (expected some of {', '.join(known)})")
    return [stage for stage in stages if stage.name in asked]


def wheels_installed(stages: Sequence[Stage], wheels: Path, site: str) -> list[Stage]:
    """The stages behind one that installs wheels into a folder, which the others see."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    environment = {"PYTHONPATH": os.pathsep.join([site, os.environ.get("PYTHONPATH", "")])}
    seeing = [
        replace(
            stage,
            environment={**stage.environment, **environment},
            fallback=None
            if stage.fallback is None
            else replace(stage.fallback, environment={**stage.fallback.environment, **environment}),
        )
        for stage in stages
    ]
    return [Stage("wheels", [*command, "--target", site, *files], 60.0), *seeing]


def main(argv: Sequence[str] | None = None) -> int:
    """Takes the stages, prints the table last; 1 if one of them failed, 130 if interrupted."""
    import gpu_stages

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for everything that is written"
    )
    parser.add_argument("--stages", help=f"some of {', '.join(gpu_stages.NAMES)}, with commas")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for everything (default: 8)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the machine lacks")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, not {args.minutes:g}")
    if args.wheels is not None and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels: no wheel in {args.wheels}")
    begun = perf_counter()
    try:
        facts = gpu_stages.facts()
        stages = chosen(gpu_stages.stages(args.out.resolve(), facts), args.stages)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"gpu_run: {error}")
    run = Run(args.out, facts, args.minutes, gpu_stages.file_name(facts), begun)
    with tempfile.TemporaryDirectory() as site, terminated():
        if args.wheels is not None:
            stages = wheels_installed(stages, args.wheels, site)
        try:
            return int(run.all(stages) > 0)
        except KeyboardInterrupt:
            return 130
        finally:
            run.write()
            print(f"\n{run.summary()}\nwritten: {args.out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
