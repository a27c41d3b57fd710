"""g++ vectorises the CPU step's loop for every instruction set, rule and average."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
LOOP = "step_cpu_loop.h"


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


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)
def test_no_choice_in_the_update_keeps_the_loop_from_being_vectorised(tmp_path: Path) -> None:
    """Without -fno-trapping-math, AVX2 took an average five times as long: its selects were
    branches, which only the masks of AVX-512 could follow."""
    lines = (ROOT / "csrc" / LOOP).read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if "void loop(" in line)
    at = next(k for k in range(start, len(lines)) if "for (int64_t i" in lines[k]) + 1
    told = tmp_path / "vectorised.txt"
    subprocess.run(
        [
            *("g++", *flags(), *(f"-I{path}" for path in include_paths())),
            *(f"-fopt-info-vec-all={told}", "-c", "csrc/step_cpu.cpp", "-o", tmp_path / "step.o"),
        ],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    of_loop = [line for line in told.read_text().splitlines() if f"{LOOP}:{at}:" in line]
    for size in (16, 32, 64):  # bytes: SSE, AVX2, AVX-512
        wanted = rf"optimized: loop vectorized using {size} byte vectors"
        assert any(re.search(wanted, line) for line in of_loop), size
    assert [line for line in of_loop if "control flow in loop" in line] == []
