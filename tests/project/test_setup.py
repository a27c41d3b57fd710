"""setup.py decides what is built from what it finds, and says in a line what it leaves out."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.torch_version import TorchVersion
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

Decide = Callable[..., list[Any]]
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo 'Cuda compilation tools, release {release}, V{release}.88' && exit
echo '#$ TOP={home}/bin/..' >&2
"""


def program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A toolkit of CUDA 12.4, which is torch's major here, and no other anywhere."""
    folder = tmp_path / "cuda"
    program(folder / "bin" / "nvcc", NVCC.format(release="12.4", home=folder))
    return folder


@pytest.fixture
def extensions() -> dict[str, Any]:
    """What setup.py has decided last, by name."""
    return {}


@pytest.fixture
def decide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extensions: dict[str, Any],
) -> Decide:
    """What setup.py builds, by name, and the lines that it prints."""
    program(tmp_path / "bin" / "c++", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "RBWA_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever setup.py sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.chdir(ROOT)

    def decided(**environment: str) -> list[Any]:
        found: list[Any] = []
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setuptools, "setup", lambda **given: found.append(given["ext_modules"]))
        runpy.run_path("setup.py", run_name="__main__")
        extensions.clear()
        extensions.update((extension.name, extension) for extension in found[0])
        return [{*extensions}, *capsys.readouterr().out.splitlines()]

    return decided


BOTH = {"rbwa_fused._C", "rbwa_fused._C_cuda"}
CPU = {"rbwa_fused._C"}
WITHOUT = "rbwa_fused: without CUDA kernels: "


def test_a_toolkit_of_torchs_major_is_built_with(decide: Decide, home: Path) -> None:
    assert decide(CUDA_HOME=str(home)) == [BOTH]


def test_the_toolkit_of_an_nvcc_on_the_path_is_found(
    decide: Decide, home: Path, tmp_path: Path
) -> None:
    program(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert decide() == [BOTH]
    assert os.environ["CUDA_HOME"] == str(home)


def test_an_nvcc_of_another_cuda_major_leaves_the_cpu_kernels(decide: Decide, home: Path) -> None:
    program(home / "bin" / "nvcc", NVCC.format(release="13.0", home=home))
    why = f"{home}/bin/nvcc is of CUDA 13.0, torch of CUDA 12.8"
    assert decide(CUDA_HOME=str(home)) == [CPU, WITHOUT + why]


def test_a_cuda_home_that_points_nowhere_leaves_the_cpu_kernels(
    decide: Decide, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        found = decide(CUDA_HOME=str(tmp_path / folder))
        assert found == [CPU, f"{WITHOUT}no nvcc in {tmp_path / folder / 'bin'}"]


@pytest.mark.parametrize("broken", ["#!/bin/sh\necho broken\nexit 3\n", "no program at all", ""])
def test_an_nvcc_that_fails_leaves_the_cpu_kernels(
    decide: Decide, home: Path, tmp_path: Path, broken: str
) -> None:
    for place in (home / "bin", tmp_path / "bin"):
        program(place / "nvcc", broken)
    assert decide() == [CPU, f"{WITHOUT}no nvcc that works on PATH, no CUDA_HOME"]
    assert decide(CUDA_HOME=str(home)) == [CPU, f"{WITHOUT}{home}/bin/nvcc --version fails"]


def test_without_a_toolkit_or_torchs_cuda_or_a_wish_the_reason_is_told(
    decide: Decide, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decide() == [CPU, f"{WITHOUT}no nvcc that works on PATH, no CUDA_HOME"]
    assert decide(CUDA_HOME="") == [CPU, f"{WITHOUT}CUDA_HOME is empty"]
    assert decide(CUDA_HOME=str(home), RBWA_CUDA="0") == [CPU, f"{WITHOUT}RBWA_CUDA=0"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert decide(RBWA_CUDA="1") == [CPU, f"{WITHOUT}torch {torch.__version__} is no CUDA build"]


def compiled_for(extensions: dict[str, Any]) -> tuple[list[str], str]:
    """nvcc's flags, those that torch adds among them, and the names that the module says."""
    given = extensions["rbwa_fused._C_cuda"].extra_compile_args
    flags = [*given["nvcc"], *cpp_extension._get_cuda_arch_flags(given["nvcc"])]
    (told,) = [flag for flag in given["cxx"] if "ARCHITECTURES" in flag]
    return [flag for flag in flags if "gencode" in flag], told.split('"')[1]


def test_blanks_in_the_list_of_architectures_are_no_architectures(
    decide: Decide, home: Path, extensions: dict[str, Any]
) -> None:
    assert decide(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=" 8.0;9.0  9.0+PTX ") == [BOTH]
    flags, told = compiled_for(extensions)
    assert {flag.rpartition("code=")[2] for flag in flags} == {"sm_80", "sm_90", "compute_90"}
    assert told == "8.0 9.0 9.0+PTX"
    for blank in ("", "  ", ";"):
        assert decide(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=blank) == [BOTH]
        assert compiled_for(extensions)[1] == "7.5 8.0+PTX 9.0 10.0 12.0"


def test_a_toolkit_compiles_for_the_architectures_that_it_knows(
    decide: Decide, home: Path, extensions: dict[str, Any]
) -> None:
    """CUDA 12.6 knows no Blackwell."""
    known = '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo "sm_75 sm_80 sm_86 sm_90" && exit\n'
    listing = NVCC.format(release="12.6", home=home).replace("#!/bin/sh\n", known)
    program(home / "bin" / "nvcc", listing)
    assert decide(CUDA_HOME=str(home)) == [BOTH]
    flags, told = compiled_for(extensions)
    assert told == "7.5 8.0+PTX 9.0"
    assert [flag.removeprefix("-gencode=arch=") for flag in flags] == [
        "compute_75,code=sm_75",
        "compute_80,code=sm_80",
        "compute_80,code=compute_80",
        "compute_80,code=sm_90",
    ]


def test_a_compiler_that_is_empty_is_the_usual_one(decide: Decide) -> None:
    for blank in ("", " "):
        assert decide(CXX=blank, RBWA_CUDA="0")[0] == CPU
        assert "CXX" not in os.environ
    assert decide(CXX="no-such-compiler -m64") == [
        set(),
        "rbwa_fused: no C++ compiler found; installing without compiled kernels",
    ]


def test_a_torch_that_is_too_old_or_missing_is_one_line(
    decide: Decide, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
        with pytest.raises(SystemExit) as ended:
            decide()
    assert ended.value.code == "rbwa_fused: needs torch >= 2.10, found 2.9.1+cu128"
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10 where it is built \(.*torch"):
        decide()
