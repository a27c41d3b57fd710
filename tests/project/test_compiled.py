"""A compiled module that is missing says which it is: not built, hidden, or not loadable."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

import rbwa_fused as rf
from rbwa_fused import compiled
from rbwa_fused.engine import backends

pytest.importorskip("rbwa_fused._C")

SOURCES = Path(rf.__file__).parent
INSTALLED = "install with `pip install --no-build-isolation --no-deps -e .`"
# Without installs, which would lend a copy their own modules.
START = """
import os, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if not os.path.exists(os.path.join(entry, "rbwa_fused"))]
sys.path[:0] = {folders}
"""
CHECK = START + "sys.argv = ['rbwa_fused']; runpy.run_module('rbwa_fused', run_name='__main__')"
TRAIN = (
    START
    + """
import torch, rbwa_fused as rf
p = torch.nn.Parameter(torch.ones(3))
opt = rf.FusedSGD([p], lr=0.5)
p.grad = torch.ones(3)
opt.step()
print(opt.backend, p.tolist(), torch.ops.rbwa_fused)
"""
)


def copied(folder: Path, compiled: bool) -> Path:
    """A folder with the package: as sources, or as it is installed."""
    ignored = shutil.ignore_patterns("__pycache__", *([] if compiled else ["*.so", "*.pyd"]))
    package = shutil.copytree(SOURCES, folder / "rbwa_fused", ignore=ignored)
    if compiled:
        triton = importlib.import_module("rbwa_fused.triton_kernels").__path__[0]
        shutil.copytree(triton, package / "triton_kernels", ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.rmtree(package / "triton_kernels", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("source"), compiled=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("site"), compiled=True)


def start(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Code in a Python that has these folders first on its path."""
    code = code.format(folders=[str(folder) for folder in folders])
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=folders[0], capture_output=True, text=True, timeout=120)


def lines(text: str) -> dict[str, str]:
    return {line[:20].strip(): line[21:] for line in text.splitlines()}


def test_a_source_folder_that_hides_an_installed_build_says_so(source: Path, site: Path) -> None:
    done = start(CHECK, source, site)
    assert (done.returncode, done.stderr) == (1, "")  # nothing was checked
    hidden = (
        f"{INSTALLED}, or run from another folder: rbwa_fused is imported from its source folder "
        f"{source}, where "
    )
    told = lines(done.stdout)
    assert told["cpu kernels"] == f"{hidden}the CPU kernels are not built"
    assert told["check cpu"] == f"not run: {hidden}the CPU kernels are not built"
    assert told["check triton"] == f"not run: {hidden}there is no rbwa_fused.triton_kernels"
    trained = start(TRAIN, source, site)
    assert trained.returncode == 0 and trained.stdout.startswith("reference [0.5, 0.5, 0.5]")
    assert trained.stderr.count("slow PyTorch reference: install with") == 1
    done = start(CHECK, site, source)
    assert done.returncode == 0 and lines(done.stdout)["check cpu"].startswith("ok")


def test_a_source_folder_alone_says_how_it_is_built(source: Path) -> None:
    told = lines(start(CHECK, source).stdout)
    assert told["cpu kernels"] == (
        "the CPU kernels are not built; with a C++ compiler at hand run `pip install "
        "--no-build-isolation --no-deps -e .` in rbwa_fused's source folder"
    )


def test_a_module_that_cannot_be_loaded_is_not_called_unbuilt(source: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    name = Path(backends._C.__file__).name
    (broken / "rbwa_fused" / name).write_text("no library")
    told = lines(start(CHECK, broken).stdout)
    assert told["cpu kernels"].startswith(
        "the CPU kernels are built, but cannot be used here: "
    ) and told["cpu kernels"].endswith((f"{name}: file too short", f"{name}: invalid ELF header"))


@pytest.mark.parametrize(
    ("module", "version", "cuda", "error", "why"),
    [
        (
            "_C",
            "2.9.1+cu128",
            "12.8",
            "_C.so: undefined symbol: torch_list_size",
            "the CPU kernels are built, but cannot be used here: they need torch >= 2.10, found "
            "2.9.1+cu128",
        ),
        (
            "_C_cuda",
            "2.13.0+cpu",
            None,
            "libtorch_cuda.so: cannot open shared object file",
            "the CUDA kernels are built, but cannot be used here: they need a CUDA build of torch, "
            "found 2.13.0+cpu",
        ),
        (
            "_C_cuda",
            "2.13.0+cu128",
            "12.8",
            "libcudart.so.13: cannot open shared object file",
            "the CUDA kernels are built, but cannot be used here: libcudart.so.13: cannot open "
            "shared object file",
        ),
    ],
)
def test_what_a_module_needs_is_named(
    module: str,
    version: str,
    cuda: str | None,
    error: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> Any:
        raise ImportError(error)

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert compiled.load(module) == (None, why)


def test_kernels_of_another_cuda_major_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their runtime may be newer than the driver: backend="auto" would fail at the first step."""
    modules = {
        "rbwa_fused._C": SimpleNamespace(),
        "rbwa_fused._C_cuda": SimpleNamespace(TOOLKIT=13000),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    for release in ("13.0", "13.2"):
        monkeypatch.setattr(torch.version, "cuda", release)
        assert compiled.load("_C_cuda") == (modules["rbwa_fused._C_cuda"], "")
    for release in ("12.8", "1.3", None):
        monkeypatch.setattr(torch.version, "cuda", release)
        found, why = compiled.load("_C_cuda")
        assert found is None and f"they are of CUDA 13, torch {torch.__version__} of" in why
        assert compiled.load("_C") == (modules["rbwa_fused._C"], "")
