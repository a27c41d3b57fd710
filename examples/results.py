"""results.json: what was compared, with what, on what, and every run that is finished."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sklearn
import torch

import rbwa_fused
from examples import models
from examples.options import Settings


def description(settings: Settings) -> dict[str, Any]:
    """results.json before the first run: what is compared, with what, on what."""
    network = models.build(settings.model, 0)
    return {
        "complete": False,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "rbwa_fused": rbwa_fused.__version__,
            "scikit_learn": sklearn.__version__,
        },
        "cpu": cpu_name(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": {},
        "times": {},
        "runs": [],
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Replaces the file in one piece: whoever reads it, or stops us, finds a whole one."""
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with null for what JSON cannot say: a diverged run's nan and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
