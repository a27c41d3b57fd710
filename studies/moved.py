"""Commands by their old names, which this version still knows; the next one will not."""

from __future__ import annotations

import runpy
import sys


def run(old: str, new: str) -> None:
    """Does `python -m new`, after a line on stderr that says where `python -m old` is now."""
    print(f"{old} has moved: python -m {new}", file=sys.stderr, flush=True)
    runpy.run_module(new, run_name="__main__", alter_sys=True)
