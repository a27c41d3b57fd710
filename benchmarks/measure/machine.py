"""The machine and the versions behind a figure."""

from __future__ import annotations

import os
import re
import sys
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import rbwa_fused

PEERS = ("torchvision", "timm", "ema_pytorch", "schedulefree")


def cpu_name() -> str:
    """The processor as Linux calls it, with family and model: virtual machines shorten names."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown cpu"
    found: dict[str, str] = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE)
    )
    name = found.get("model name", "unknown cpu")
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    text = Path("/proc/meminfo").read_text()
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else sys.maxsize


def slug() -> str:
    """Processor and cores in a form that file names take."""
    return f"{words(cpu_name())}-{cores()}-cores"


def words(name: str) -> str:
    """Small letters and digits, with hyphens for all else."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def description(threads: int) -> dict[str, str | int | float]:
    """What stands above a table and in its JSON file."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads,
        "load average before": round(os.getloadavg()[0], 2),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "rbwa_fused": rbwa_fused.__version__,
        "instruction set": import_module("rbwa_fused._C").cpu_capability(),
        **{peer: found for peer in PEERS if (found := version_of(peer)) is not None},
    }


def version_of(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
