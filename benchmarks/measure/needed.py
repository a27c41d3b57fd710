"""What a program cannot do without, asked for before anything of it is imported."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def need(program: str, *modules: str) -> None:
    """Ends the program with one line if some of these are not installed, and names them all."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        sys.exit(f"{program}: {', '.join(missing)} not installed: make .venv/dev")
