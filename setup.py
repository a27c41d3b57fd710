"""Builds the extension; everything else stands in pyproject.toml.

With a C++ compiler the CPU kernels are built, and an error in them is an error of the install.
Without one the package still installs: it then runs the plain PyTorch reference and says so.
"""

import os
import shutil
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10: one build runs on all later
FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", STABLE_ABI]


def extensions() -> list:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("rbwa_fused: no C++ compiler found; installing without the CPU kernels")
        return []
    sources = ["csrc/ops.cpp", "csrc/tables.cpp", "csrc/step_cpu.cpp"]
    depends = glob("csrc/*.h")
    return [
        CppExtension(
            "rbwa_fused._C", sources, depends=depends, extra_compile_args=FLAGS, libraries=[]
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
