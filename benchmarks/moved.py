"""Programs that are elsewhere now, and for this version are found under their old names too."""

from __future__ import annotations

import runpy
import sys

NOW = {"benchmarks.scaling": "studies.scaling"}


def run(old: str) -> None:
    """Runs what `python -m old` was, after a line on stderr that says where it is now."""
    new = NOW[old]
    print(f"{old} is {new} now: python -m {new}", file=sys.stderr, flush=True)
    runpy.run_module(new, run_name="__main__", alter_sys=True)
