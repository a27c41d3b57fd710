"""Builds the extensions; everything else stands in pyproject.toml.

With a C++ compiler the CPU kernels are built, with the nvcc of torch's CUDA major the CUDA kernels
too, GPU or not (RBWA_CUDA=0 leaves them out, TORCH_CUDA_ARCH_LIST chooses architectures); an error
in them is an error of the install. What is left out is said in a line. Without a compiler the
package still installs: it then runs the plain PyTorch reference and says so.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import setup

try:
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"rbwa_fused: needs torch >= 2.10 where it is built ({error})")
if torch.__version__ < "2.10":
    sys.exit(f"rbwa_fused: needs torch >= 2.10, found {torch.__version__}")

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10: one build runs on all later
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=off",
    # What g++ needs to vectorise the loop of every rule and dtype
    # (tests/update/test_vectorised.py):
    "-fno-trapping-math",  # both sides of a select may be computed
    "-fno-math-errno",  # a square root is an instruction, not a call
    "-fwrapv",  # most Pythons' own flags have it; without it loops inlined into tiles stayed scalar
    *("--param", "max-unswitch-insns=300"),  # a long update has more choices than the default 50
    "-fvisibility=hidden",
    "-Wall",
    STABLE_ABI,
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xfatbin", "-compress-all", "--threads", "2"]
# One of each generation: code for 8.0 runs on 8.6 and 8.9 too, and memory limits these kernels. The
# virtual ones take most of the time, so the second serves all that convert bfloat16 by an
# instruction, and stays in the module for generations to come.
ARCHITECTURES = {
    "compute_75": ("sm_75",),
    "compute_80": ("sm_80", "compute_80", "sm_90", "sm_100", "sm_120"),
}


def told_by(*command: str) -> str:
    """What a program writes, or nothing where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def cuda_home() -> str | None:
    """The toolkit's folder: nvcc itself knows it best, as it may be a wrapper on PATH."""
    nvcc = shutil.which("nvcc")
    if "CUDA_HOME" in os.environ or nvcc is None:
        return os.environ.get("CUDA_HOME")
    found = re.search(r"^#\$ TOP=(.+)$", told_by(nvcc, "--dryrun", "none.cu"), re.MULTILINE)
    return os.path.normpath(found[1]) if found else None


def nvcc_flags() -> list[str]:
    """Those of this toolkit: a module a fifth smaller where it knows how."""
    major = int((torch.version.cuda or "0").split(".")[0])
    return [*NVCC_FLAGS, "--compress-mode=size"] if major >= 13 else NVCC_FLAGS


def architectures() -> tuple[list[str], str]:
    """nvcc's flags for those that are compiled for, and their names."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if given:  # torch's build tools have the flags; an empty entry, of a blank too many, stops them
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(given)
        return [], " ".join(given)
    nvcc = os.path.join(home or "", "bin", "nvcc")
    known = re.findall(r"\bsm_\d+\b", told_by(nvcc, "--list-gpu-code"))
    flags, names = [], ""
    for virtual, codes in ARCHITECTURES.items():
        for code in codes:
            if code == virtual:
                names += "+PTX"
            elif code in known or not known:
                names += f" {code[3:-1]}.{code[-1]}"
            else:
                continue
            flags.append(f"-gencode=arch={virtual},code={code}")
    return flags, names.strip()


def without_cuda() -> str | None:
    """Why the CUDA kernels are left out, or None where they are built."""
    if os.environ.get("RBWA_CUDA", "1") == "0":
        return "RBWA_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if not home:
        return "CUDA_HOME is empty" if home == "" else "no nvcc that works on PATH, no CUDA_HOME"
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        return f"no nvcc in {os.path.join(home, 'bin')}"
    release = re.search(r"release (\d+)\.\d+", told_by(nvcc, "--version"))
    if release is None:
        return f"{nvcc} --version fails"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release[0].split()[1]}, torch of CUDA {torch.version.cuda}"
    return None


def pybind11() -> list[str]:
    """The folder of pybind11's own headers; torch's copy refuses the stable ABI before 2.12."""
    try:
        from pybind11 import get_include
    except ImportError:
        return []
    return [get_include()]


def extensions() -> list:
    compiler = os.environ.get("CXX", "").split()
    if not compiler:
        os.environ.pop("CXX", None)  # torch's build tools take an empty one as a name
    if shutil.which(compiler[0] if compiler else "c++") is None:
        print("rbwa_fused: no C++ compiler found; installing without compiled kernels")
        return []
    depends = glob("csrc/**/*.h", recursive=True)
    include_dirs = [os.path.abspath("csrc"), *pybind11()]
    names = [
        "cpu/ops_cpu.cpp",
        "tables.cpp",
        "views.cpp",
        "cpu/step_cpu.cpp",
        "replica_tables.cpp",
        "cpu/pull_cpu.cpp",
        "summed.cpp",
        "cpu/norm_cpu.cpp",
    ]
    found = [
        CppExtension(
            "rbwa_fused._C",
            [f"csrc/{name}" for name in names],
            depends=depends,
            include_dirs=include_dirs,
            extra_compile_args=FLAGS,
        )
    ]
    why = without_cuda()
    if why is not None:
        print(f"rbwa_fused: without CUDA kernels: {why}")
    else:
        flags, named = architectures()
        names = [
            "cuda/ops_cuda.cpp",
            "tables.cpp",
            "views.cpp",
            "cuda/device_tables.cpp",
            "cuda/packer.cpp",
            "cuda/step_cuda.cu",
        ]
        names += ["replica_tables.cpp", "cuda/pull_packer.cpp", "cuda/pull_cuda.cu"]
        names += ["summed.cpp", "cuda/norm_packer.cpp", "cuda/norm_cuda.cu"]
        found.append(
            CUDAExtension(
                "rbwa_fused._C_cuda",
                [f"csrc/{name}" for name in names],
                depends=depends,
                include_dirs=include_dirs,
                extra_compile_args={
                    "cxx": [*FLAGS, f'-DRBWA_ARCHITECTURES="{named}"'],
                    "nvcc": [*nvcc_flags(), *flags],
                },
            )
        )
    return found


home = cuda_home()
if home:
    os.environ["CUDA_HOME"] = home  # before torch's build tools look for it
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
