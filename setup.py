"""Builds the extensions; everything else stands in pyproject.toml.

With a C++ compiler the CPU kernels are built, with nvcc and a CUDA build of torch the CUDA kernels
too, GPU or not (RBWA_CUDA=0 leaves them out, TORCH_CUDA_ARCH_LIST chooses architectures); an error
in them is an error of the install. Without a compiler the package still installs: it then runs the
plain PyTorch reference and says so.
"""

import os
import re
import shutil
import subprocess
from glob import glob

import torch
from setuptools import setup

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10: one build runs on all later
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=off",
    # What g++ needs to vectorise the loop of every rule and dtype (tests/test_vectorised.py):
    "-fno-trapping-math",  # both sides of a select may be computed
    "-fno-math-errno",  # a square root is an instruction, not a call
    "-fwrapv",  # most Pythons' own flags have it; without it loops inlined into tiles stayed scalar
    *("--param", "max-unswitch-insns=300"),  # a long update has more choices than the default 50
    "-fvisibility=hidden",
    "-Wall",
    STABLE_ABI,
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xfatbin", "-compress-all", "--threads", "2"]
ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def cuda_home() -> str | None:
    """The toolkit's folder: nvcc itself knows it best, as it may be a wrapper on PATH."""
    nvcc = shutil.which("nvcc")
    if "CUDA_HOME" in os.environ or nvcc is None:
        return os.environ.get("CUDA_HOME")
    said = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.normpath(found[1]) if found else None


def pybind11() -> list[str]:
    """The folder of pybind11's own headers; torch's copy refuses the stable ABI before 2.12."""
    try:
        from pybind11 import get_include
    except ImportError:
        return []
    return [get_include()]


def extensions() -> list:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("rbwa_fused: no C++ compiler found; installing without compiled kernels")
        return []
    depends = glob("csrc/*.h")
    names = ["ops.cpp", "tables.cpp", "step_cpu.cpp", "replica_tables.cpp", "replicas_cpu.cpp"]
    found = [
        CppExtension(
            "rbwa_fused._C",
            [f"csrc/{name}" for name in names],
            depends=depends,
            include_dirs=pybind11(),
            extra_compile_args=FLAGS,
        )
    ]
    if home and torch.version.cuda and os.environ.get("RBWA_CUDA", "1") != "0":
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        told = f'-DRBWA_ARCHITECTURES="{architectures}"'
        names = ["ops_cuda.cpp", "tables.cpp", "cuda_tables.cpp", "launches.cpp", "step_cuda.cu"]
        names += ["replica_tables.cpp", "replicas_launches.cpp", "replicas_cuda.cu"]
        found.append(
            CUDAExtension(
                "rbwa_fused._C_cuda",
                [f"csrc/{name}" for name in names],
                depends=depends,
                include_dirs=pybind11(),
                extra_compile_args={"cxx": [*FLAGS, told], "nvcc": NVCC_FLAGS},
            )
        )
    return found


home = cuda_home()
if home:
    os.environ["CUDA_HOME"] = home  # before torch's build tools look for it
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
