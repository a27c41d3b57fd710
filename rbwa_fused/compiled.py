"""The compiled modules, or in a sentence why one is not there: not built, hidden, not loadable."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

INSTALL = "`pip install --no-build-isolation --no-deps -e .`"
NEEDS = {"_C": ("CPU", "a C++ compiler"), "_C_cuda": ("CUDA", "nvcc and a CUDA build of torch")}


def load(module: str) -> tuple[Any, str]:
    """A compiled module and "", or None and why not: ``"_C"``, or after it ``"_C_cuda"``."""
    name = f"rbwa_fused.{module}"
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return None, _not_built(module)
        why = _unloadable(module, str(error))
    else:
        why = _another_runtime(getattr(found, "TOOLKIT", None))
        if why == "":
            return found, ""
    return None, f"the {NEEDS[module][0]} kernels are built, but cannot be used here: {why}"


def in_source_folder() -> str:
    """The beginning of a sentence on what the source folder lacks and an install has."""
    return (
        f"install with {INSTALL}, or run from another folder: rbwa_fused is imported from its "
        f"source folder {Path(__file__).resolve().parents[1]}"
    )


def _not_built(module: str) -> str:
    kernels, needs = NEEDS[module]
    folders = [str(Path(entry) / "rbwa_fused") for entry in sys.path]
    if PathFinder.find_spec(f"rbwa_fused.{module}", folders) is not None:  # of another rbwa_fused
        return f"{in_source_folder()}, where the {kernels} kernels are not built"
    where = "in rbwa_fused's source folder"
    return f"the {kernels} kernels are not built; with {needs} at hand run {INSTALL} {where}"


def _unloadable(module: str, error: str) -> str:
    """What the linker's words come from, where that is known."""
    if torch.__version__ < "2.10":
        return f"they need torch >= 2.10, found {torch.__version__}"
    if module == "_C_cuda" and torch.version.cuda is None:
        return f"they need a CUDA build of torch, found {torch.__version__}"
    return error


def _another_runtime(toolkit: int | None) -> str:
    """A module of another CUDA major than torch's loads where its runtime is found, beside torch's,
    and fails at its first launch where the driver is too old for it."""
    if toolkit is None or str(toolkit // 1000) == (torch.version.cuda or "").split(".")[0]:
        return ""
    return f"they are of CUDA {toolkit // 1000}, torch {torch.__version__} of {torch.version.cuda}"
