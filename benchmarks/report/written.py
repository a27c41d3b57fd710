"""Results on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(out: Path, results: dict[str, Any]) -> None:
    """Writes results so that whoever reads them, or ends this process, finds all of some state."""
    whole = out.with_suffix(".part")
    whole.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(whole, out)
