"""The environment of the Python processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import rbwa_fused as rf


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """This process's, with more variables. The child imports the package that this process has
    imported, and from the folders, and then from wherever this process may: a copy of the tree that
    is broken on purpose, and packages that were given as wheels, are on the inherited path alone.
    """
    first = [Path(rf.__file__).parents[1], *folders]
    path = os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}
