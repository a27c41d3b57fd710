"""g++ vectorises every loop over elements on the CPU, for each instruction set, rule and dtype."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
FILES = ("cpu/loop.h", "cpu/narrow_loop.h", "cpu/norm_loop.h", "cpu/pull_loop.h")
ELEMENTS = re.compile(r"for \(int64_t i = 0; i < (n|size); \+\+i\)")
SIZES = {"baseline": 16, "avx2": 32, "avx512": 64}  # bytes of a vector


def flags() -> list[str]:
    """setup.py's."""
    names: dict[str, object] = {}
    text = (ROOT / "setup.py").read_text()
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node) or ""
        if source.startswith(("STABLE_ABI =", "FLAGS =")):
            exec(source, names)
    found = names["FLAGS"]
    assert isinstance(found, list)
    return found


def loops() -> dict[str, set[int]]:
    """The loops over elements as "file:line", each with the vectors that it must have."""
    found = {}
    for file in FILES:
        for number, line in enumerate((ROOT / "csrc" / file).read_text().splitlines(), start=1):
            if ELEMENTS.search(line):
                found[f"{file}:{number}"] = set(SIZES.values())
    return found


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)
def test_no_rule_average_dtype_or_instruction_set_is_left_with_a_scalar_loop(
    tmp_path: Path,
) -> None:
    """A scalar loop takes several times as long. g++ says of each copy of a loop whether it was
    vectorised; each flag below is one that some copy needs: explicit RSGDM's with an average has
    too many choices for the default budget, and took 2.7 ns an element for 0.6."""
    told = tmp_path / "vectorised.txt"
    subprocess.run(
        [
            *("g++", *flags(), *(f"-I{path}" for path in ("csrc", *include_paths()))),
            *(f"-fopt-info-vec-all={told}", "-fPIC", "-c", "csrc/cpu/step_cpu.cpp"),
            *("-o", tmp_path / "step.o"),
        ],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    says = re.compile(
        r"csrc/(cpu/\w+\.h:\d+):\d+: (missed: couldn't|optimized: loop) vectori\w+(.*)"
    )
    missed: set[str] = set()
    sizes: dict[str, set[int]] = {}
    for line in told.read_text().splitlines():
        if (match := says.match(line)) is None:
            continue
        loop, verdict, rest = match.groups()
        if verdict.startswith("missed"):
            missed.add(loop)
        elif using := re.search(r"using (\d+) byte vectors", rest):
            sizes.setdefault(loop, set()).add(int(using[1]))
    wanted = loops()
    assert len(wanted) == 9
    assert missed & wanted.keys() == set()
    assert {loop for loop, own in wanted.items() if own - sizes.get(loop, set())} == set()
