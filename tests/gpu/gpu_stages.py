"""The stages of gpu_run.py: the most informative first, as the last ones may not fit.

Seconds are limits, guessed and not yet measured; together they are more than the minutes, since
most stages take less. A benchmark that is killed has written every row up to then.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_process import ROOT, Output, take
from gpu_run import Stage, judged, last_line

PYTHON = sys.executable
FACTS = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
from benchmarks.measure.clock import Cuda
device = Cuda()
print(json.dumps({**device.description(), "slug": device.slug()}))
"""
FACTS_SECONDS = 120.0  # the first import of torch from a cold disk
NVCC_SECONDS = 20.0
CLOCK_STEP = 1.0  # seconds by which a file's time may lag behind the clock's
PROCESSES = min(8, os.cpu_count() or 1)
FIRST_MODELS, OTHER_MODELS = ("resnet18", "gpt2"), ("resnet50", "transformer-1b")
OURS = "(step|advance|pull)_kernel"
SANITIZER = ["compute-sanitizer", "--report-api-errors", "no", "--print-limit", "1000"]
SANITIZER += ["--show-backtrace", "device"]  # the host's is long, and of Python's interpreter
SMOKE = ("smoke", "smoke triton")
NAMES = (
    *("build", "check", *SMOKE, "bench", "bench triton", "tests", "tests triton", "rest"),
    *("memcheck", "initcheck"),
)


def facts() -> dict[str, Any]:
    """The machine and its versions, in a process of its own: a GPU that hangs does so there.

    Raises:
        RuntimeError: if there is no GPU to run on.
    """
    output = Output()
    try:
        status = take([PYTHON, "-c", FACTS], FACTS_SECONDS, output, {})
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no answer from torch in {FACTS_SECONDS:.0f} s") from error
    lines = output.text().splitlines()
    told = [line for line in lines if line.startswith('{"gpu"')]
    if status != 0 or not told:
        raise RuntimeError(last_line(output.text()) or f"torch died, status {status}")
    found: dict[str, Any] = json.loads(told[-1])
    version = Output()
    with suppress(OSError, subprocess.TimeoutExpired):
        take(["nvcc", "--version"], NVCC_SECONDS, version, {})
    return {**found, "nvcc": (re.findall(r"release (\S+),", version.text()) or ["none"])[0]}


def file_name(machine: Mapping[str, Any]) -> str:
    """What the files of results are named after."""
    return f"{machine['slug']}-{machine['date']}"


def tests_of_the_gpu() -> list[str]:
    """The files with tests that `-m gpu` selects: our own, and torch's catalogue, which spreads its
    tests over the devices that there are."""
    files = [
        ROOT / "tests/gpu/test_gpu.py",
        *sorted(ROOT.glob("tests/optimizer/test_catalogue*.py")),
    ]
    return [str(f.relative_to(ROOT)) for f in files]


def best(out: Path) -> Callable[[int, str], tuple[bool, str]]:
    """Judges a benchmark by its status, and tells the ratios that it has written from now on."""
    asked = time.time()

    def judge(status: int, text: str) -> tuple[bool, str]:
        passed, line = judged(status, text)
        try:
            old = out.stat().st_mtime < asked - CLOCK_STEP
            problems = [] if old else json.loads(out.read_text())["problems"]
        except (OSError, ValueError, KeyError):
            return passed, line
        told = []
        for problem in problems:
            rows = problem["rows"]
            ours = {name: rows[name]["ratio"] for name in rows if re.match(r"(RBWA|EMA), ", name)}
            wrong = f", WRONG: {len(problem['wrong'])}" if problem["wrong"] else ""
            wrong += f", skipped: {len(skipped)}" if (skipped := problem.get("skipped")) else ""
            first = ", ".join(f"{name} {ratio:.2f}" for name, ratio in list(ours.items())[:2])
            told.append(f"{problem['model']}: {len(rows)} rows, {first}{wrong}")
        return passed, "; ".join(told) or line

    return judge


def built(status: int, text: str) -> tuple[bool, str]:
    """Judges the build: one that has left kernels out, which setup.py says in a line, is none."""
    passed, line = judged(status, text)
    left_out = re.search(r"^\s*(rbwa_fused: .*without .*)", text, re.MULTILINE)
    return passed and left_out is None, left_out[1] if left_out else line


def checked(status: int, text: str) -> tuple[bool, str]:
    """Judges the self check by its status, and tells what it says of each backend."""
    found = re.findall(r"^check (\w+) +(ok|WRONG|not run)", text, re.MULTILINE)
    passed, line = judged(status, text)
    return passed, ", ".join(map(" ".join, found)) or line


def uninitialized(status: int, text: str) -> tuple[bool, str]:
    """Judges initcheck by our own kernels. It sees all of them, since a read is of memory that any
    kernel may have written; what torch's read is not ours to count."""
    reports = re.findall(r"Uninitialized .*\n.*\n?.*", text)
    ours = [report for report in reports if re.search(OURS, report)]
    finished = "ERROR SUMMARY" in text
    line = f"{len(ours)} uninitialized reads by our kernels, {len(reports) - len(ours)} by others"
    if ours:
        line += f"; first: {' '.join(ours[0].split())}"
    return status == 0 and finished and not ours, line if finished else judged(1, text)[1]


def sanitizer(tool: str, *options: str) -> list[str]:
    """The smoke test under a sanitizer, which knows nothing of what torch has cached."""
    return [*SANITIZER, "--tool", tool, *options, PYTHON, "tests/gpu/gpu_smoke.py"]


def pytest(*options: str) -> list[str]:
    """The tests that need a GPU, in several processes; each stops after some failures."""
    own = ["-q", "--tb=short", "-rfE", "--maxfail=5", "-p", "no:cacheprovider", "-m", "gpu"]
    return [PYTHON, "tests/gpu/parallel.py", str(PROCESSES), *own, *options, *tests_of_the_gpu()]


def stages(out: Path, machine: Mapping[str, Any]) -> list[Stage]:
    """All stages, for a machine as `facts` found it; `out` must be absolute."""
    name = file_name(machine)
    # -v shows what setup.py and the compilers say; --no-index does not ask for a newer pip.
    install = [PYTHON, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation"]
    install += ["--no-deps", "-e", "."]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def step(part: str, *options: str) -> tuple[list[str], Any]:
        file = out / f"{name}-{part}.json"
        command = [PYTHON, "-m", "benchmarks.step", "--device", "cuda", *options]
        return [*command, "--model", *FIRST_MODELS, "--out", str(file)], best(file)

    bench, judge_bench = step("step", "--backend", "cuda")
    triton, judge_triton = step("triton", "--backend", "triton", "--only", "*, triton*")
    rest = out / f"{name}.json"
    return [
        Stage(
            "build",
            install,
            200,
            judge=built,
            environment={"TORCH_CUDA_ARCH_LIST": str(machine["compute capability"])},
            # Triton's kernels need the package alone.
            fallback=Stage("build, no CUDA", install, 90, environment={"RBWA_CUDA": "0"}),
        ),
        Stage("check", [PYTHON, "-m", "rbwa_fused"], 60, judge=checked),
        Stage("smoke", [PYTHON, "tests/gpu/gpu_smoke.py"], 60, needs="build"),
        Stage("smoke triton", [PYTHON, "tests/gpu/gpu_smoke.py", "--backend", "triton"], 120),
        Stage("bench", bench, 75, needs="build", judge=judge_bench),
        Stage("bench triton", triton, 45, judge=judge_triton),
        Stage("tests", pytest("-k", "not triton"), 90, needs="build"),
        Stage("tests triton", pytest("-k", "triton"), 90),
        Stage(
            "rest",
            [
                *(PYTHON, "-m", "benchmarks", "--model", *OTHER_MODELS),
                *("--seconds", "140", "--no-pictures", "--out", str(rest)),
            ],
            150,
            least=40,
            judge=best(rest),
        ),
        Stage(
            "memcheck",
            sanitizer("memcheck", "--error-exitcode", "1", "--kernel-name", f"regex={OURS}"),
            120,
            least=30,
            needs="build",
            environment=uncached,
        ),
        Stage(
            "initcheck",
            sanitizer("initcheck"),
            120,
            least=30,
            needs="build",
            environment=uncached,
            judge=uninitialized,
        ),
    ]
