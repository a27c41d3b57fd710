"""All that needs a GPU, in stages: `make gpu OUT=folder`, or without make

    python tests/gpu_run.py --out folder
    python tests/gpu_run.py --out folder --stages bench,smoke --minutes 4
    python tests/gpu_run.py --out folder --wheels folder-of-wheels

Needs Python with torch, Triton, setuptools and pytest, and nvcc; no network. Each stage
(gpu/gpu_stages.py) is a process group with a time limit of its own, and a stage that fails, dies or
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent / "gpu"))

from gpu_process import GRACE, Output, take

MINUTES = 8.0
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


def say(text: str) -> None:
    """Prints; where nobody reads any more the run goes on, since the folder has it all."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Run:
    """Takes stages one after another, and keeps what there is to show in a folder.

    A folder that takes no more ends nothing: `unwritten` says why, and the summary is printed.
    """

    def __init__(
        self, out: Path, facts: Mapping[str, Any], minutes: float, name: str, begun: float
    ) -> None:
        self.out = out
        self.facts = facts
        self.seconds = 60 * minutes
        self.name = name
        self.begun = begun
        self.outcomes: list[Outcome] = []
        self.unwritten = ""
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
        say(table([outcome]))
        return outcome.status == "ok"

    def take(self, outcome: Outcome, seconds: float) -> None:
        """Runs a stage, its output appended to the log, and judges it."""
        stage, begun = outcome.stage, perf_counter()
        self.add(f"\n######## {stage.name}: {' '.join(shortened(stage.command))}\n".encode())
        output = Output(self.add)
        status, outcome.status = 1, "interrupted"
        try:
            status = take(stage.command, seconds, output, stage.environment)
            outcome.status = "failed"
        except subprocess.TimeoutExpired:
            outcome.status = "killed"
        except OSError as error:
            why = f"{stage.command[0]}: {error.strerror}"
            self.add(f"{why}\n".encode())
            outcome.status, outcome.line = "failed", why
        finally:
            outcome.seconds = perf_counter() - begun
            text = output.text() or outcome.line
            passed, outcome.line = stage.judge(status, text)
            outcome.failures = failures(text)[:REASONS]
        if status < 0:
            outcome.line = f"died by signal {-status}; {outcome.line}"
        if passed and outcome.status == "failed":
            outcome.status = "ok"

    def add(self, data: bytes) -> None:
        """Appends to the log what fits on the disk."""
        with suppress(OSError):
            self.log.write(data)

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
        try:
            write_whole(self.out / "table.txt", self.summary())
            write_whole(self.out / f"{self.name}-run.json", json.dumps(found, indent=1))
            self.unwritten = ""
        except OSError as error:
            self.unwritten = str(error.strerror)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that at any moment it has all of some state."""
    part = path.with_suffix(".part")
    try:
        part.write_text(text + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def shortened(command: Sequence[str]) -> list[str]:
    """A command as it is shown, without the folders of this machine."""
    named = {sys.executable: "python"}
    return [
        named.get(part, part if not os.path.isabs(part) else os.path.basename(part))
        for part in command
    ]


@contextmanager
def terminated() -> Iterator[None]:
    """A polite kill and a terminal that is gone end the run as Ctrl-C does: the stage ends with it,
    and the table is there. A second one of them changes nothing."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # nohup, or `&`
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    files = sorted(str(path) for path in wheels.resolve().glob("*.whl"))
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
    if not args.minutes > 0:  # nor NaN
        parser.error(f"--minutes must be positive, not {args.minutes:g}")
    if args.wheels is not None and not any(args.wheels.glob("*.whl")):
        parser.error(f"--wheels: no wheel in {args.wheels}")
    begun = perf_counter()
    with terminated():
        try:
            return taken(args, begun)
        except KeyboardInterrupt:
            return 130


def taken(args: argparse.Namespace, begun: float) -> int:
    """The run that the command line asks for; 1 if a stage failed."""
    import gpu_stages

    try:
        facts = gpu_stages.facts()
        stages = chosen(gpu_stages.stages(args.out.resolve(), facts), args.stages)
        run = Run(args.out, facts, args.minutes, gpu_stages.file_name(facts), begun)
    except OSError as error:
        sys.exit(f"gpu_run: cannot write {args.out} ({error.strerror})")
    except (RuntimeError, ValueError) as error:
        sys.exit(f"gpu_run: {error}")
    with tempfile.TemporaryDirectory() as site:
        if args.wheels is not None:
            stages = wheels_installed(stages, args.wheels, site)
        try:
            return int(run.all(stages) > 0)
        finally:
            run.write()
            kept = f"not all written: {run.unwritten}: " if run.unwritten else "written: "
            say(f"\n{run.summary()}\n{kept}{args.out}")


if __name__ == "__main__":
    sys.exit(main())
