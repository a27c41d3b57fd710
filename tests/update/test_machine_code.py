"""The compiled CUDA kernels, read: wide accesses, no spills, no float64, enough loads in flight."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from rbwa_fused.engine import backends
from rbwa_fused.engine.counters import POLICY_COLUMNS
from rbwa_fused.rules import KEPT_BY, Kind, is_adam

if backends._C_cuda is None:
    pytest.skip("the CUDA kernels are not built here", allow_module_level=True)

ARCHITECTURES = [
    name
    for name in ("sm_80", "sm_90")
    if f"{name[-2]}.{name[-1]}" in backends._C_cuda.ARCHITECTURES
]
# As g++ mangles it: storage of the parameter, of theta, of what is kept, of the average, where S1_
# repeats the first; kind, averaged, arithmetic; bytes of tables.
OTHER = r"(f|d|S1_)"
NAME = rf"step_kernelI(f|d|6__half|13__nv_bfloat16){OTHER * 3}L4Kind(\d)ELb(\d)E[fd]Li(\d+)E"
SEVERAL = rf"several_kernelI(f|d|6__half|13__nv_bfloat16){OTHER * 3}L4Kind(\d)E[fd]E"
TABLE_BYTES, SMALL_TABLE_BYTES = 32672, 8112
SIZES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}
SERVING = tuple(kind for kind in Kind if kind not in (Kind.SAMPLE, Kind.MOMENTUM))
STEPS = 89  # kernels that take one
THREADS = 256
REGISTERS = 65536  # of a multiprocessor, handed out to a thread by eights
MOST_THREADS = 2048
IN_FLIGHT = 64 * 1024  # bytes of loads a multiprocessor needs to hide the memory's latency


class Kernel(NamedTuple):
    """One compiled step: storage of the parameter, of theta (another for a master), of what is kept
    and of the average, enum Kind, averaged, bytes of the launch's tables, registers, code."""

    storage: str
    theta: str
    kept: str
    average: str
    kind: int
    averaged: bool
    table_bytes: int
    registers: int
    code: str

    @property
    def bytes_in_flight(self) -> int:
        """What a thread has loaded before it uses the first of it (csrc/cuda/body.h)."""
        return 16 * (1 + self.vectors) * (1 if SIZES[self.storage] == 2 else 2)

    @property
    def vectors(self) -> int:
        """Of 128 bits, beside one of the gradient: of theta and its parameter, of what is kept and
        of the average."""
        size = SIZES[self.storage]
        vectors = SIZES[self.theta] // size + (self.theta != self.storage)
        vectors += len(KEPT_BY[self.kind]) * (SIZES[self.kept] // size)
        if self.averaged:
            vectors += SIZES[self.average] // size
        return vectors


def cuobjdump(*args: str) -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    command = [found, *args, backends._C_cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels(architecture: str) -> list[Kernel]:
    usage = cuobjdump("-res-usage", "-arch", architecture)
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
    found = []
    for part in cuobjdump("-sass", "-arch", architecture).split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        kind = re.search(NAME, name)
        if kind is not None:
            storage, *others, rule, averaged, table_bytes = kind.groups()
            dtypes = storage, *(storage if s == "S1_" else s for s in others)
            sizes = int(table_bytes), int(registers[name])
            found.append(Kernel(*dtypes, int(rule), averaged == "1", *sizes, part))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_a_kernel_for_every_set_of_streams(architecture: str) -> None:
    kinds = {kernel[:7] for kernel in kernels(architecture)}
    expected = {
        (storage, theta, kept, average, int(rule), averaged, table_bytes)
        for storage, size in SIZES.items()
        for theta in ({storage, "f"} if size == 2 else {storage})
        for rule in SERVING
        for wide in (rule == Kind.DECOUPLED or is_adam(rule),)
        for narrow in (set() if rule == Kind.SCHEDULE_FREE else {theta},)
        for kept in (narrow | {"f"} if wide and size == 2 else {theta})
        for averaged in ({True} if is_adam(rule) else {False, True})
        for average in ({theta, "f"} if averaged and size == 2 else {theta})
        for table_bytes in {TABLE_BYTES, SMALL_TABLE_BYTES if storage == "f" else TABLE_BYTES}
    }
    assert kinds == expected and len(kernels(architecture)) == len(expected) == STEPS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_for_small_launches_is_the_same_with_less_to_hand_over(architecture: str) -> None:
    usage = cuobjdump("-res-usage", "-arch", architecture)
    handed = {
        name: int(size)
        for name, size in re.findall(r"Function (\S+):\s+REG:\d+.*?CONSTANT\[0\]:(\d+)", usage)
    }
    small = {name: size for name, size in handed.items() if f"Li{SMALL_TABLE_BYTES}E" in name}
    assert len(small) == 9
    for name, size in small.items():
        large = name.replace(f"Li{SMALL_TABLE_BYTES}E", f"Li{TABLE_BYTES}E")
        twins = [
            handed[other] for other in handed if other.split("EEv")[0] == large.split("EEv")[0]
        ]
        assert twins == [size + TABLE_BYTES - SMALL_TABLE_BYTES], name
    by_kind = {kernel[:7]: kernel.registers for kernel in kernels(architecture)}
    for kind, registers in by_kind.items():
        if kind[6] == SMALL_TABLE_BYTES:
            assert registers == by_kind[(*kind[:6], TABLE_BYTES)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_is_read_and_written_by_128_bits(architecture: str) -> None:
    for kernel in kernels(architecture):
        loads = len(re.findall(r"\bLDG\.E[.A-Z]*\.128\b", kernel.code))
        stores = len(re.findall(r"\bSTG\.E[.A-Z]*\.128\b", kernel.code))
        assert loads >= kernel.vectors + 1, kernel[:6]  # and the gradient
        assert stores >= kernel.vectors, kernel[:6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_averages_are_read_and_written_by_128_bits(architecture: str) -> None:
    """In kernels of their own, one for each set of dtypes and the last kind of a family."""
    found = 0
    for part in cuobjdump("-sass", "-arch", architecture).split("Function : ")[1:]:
        kind = re.search(SEVERAL, part.split(maxsplit=1)[0])
        if kind is not None:
            storage, *others, rule = kind.groups()
            dtypes = storage, *(storage if s == "S1_" else s for s in others)
            kernel = Kernel(*dtypes, int(rule), True, TABLE_BYTES, 0, part)
            loads = len(re.findall(r"\bLDG\.E[.A-Z]*\.128\b", part))
            stores = len(re.findall(r"\bSTG\.E[.A-Z]*\.128\b", part))
            assert loads >= kernel.vectors + 1 and stores >= kernel.vectors, kernel[:5]
            found += 1
    assert found == 40


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_goes_through_local_memory(architecture: str) -> None:
    for kernel in kernels(architecture):
        assert not re.findall(r"\b(?:LDL|STL)\b", kernel.code), kernel[:6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_float64_computes_in_float64(architecture: str) -> None:
    for kernel in kernels(architecture):
        arithmetic = re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP)\b", kernel.code)
        assert bool(arithmetic) == (kernel.storage == "d"), kernel[:6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_multiply_add_is_contracted(architecture: str) -> None:
    """It would round once where the CPU rounds twice. FFMA and DFMA remain in 1/grad_scale, and in
    Adam's divisions and roots."""
    for kernel in kernels(architecture):
        if kernel.storage != "d":
            fused = re.findall(r"\bFFMA\b", kernel.code)
            reciprocal = re.findall(r"\bMUFU\.(?:RCP|RSQ)\b", kernel.code)
            assert len(fused) <= 8 * len(reciprocal), kernel[:6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_leave_room_for_enough_loads_in_flight(architecture: str) -> None:
    for kernel in kernels(architecture):
        of_a_block = THREADS * -(-kernel.registers // 8) * 8
        blocks = min(REGISTERS // of_a_block, MOST_THREADS // THREADS)
        assert blocks * THREADS * kernel.bytes_in_flight >= IN_FLIGHT, (kernel[:7], blocks)


@functools.cache
def pulls(architecture: str) -> dict[str, str]:
    """The code of the replicas' kernels, by storage."""
    sass = cuobjdump("-sass", "-arch", architecture).split("Function : ")[1:]
    named = [(re.search(r"pull_kernelI(f|d|6__half|13__nv_bfloat16)", part), part) for part in sass]
    return {kind[1]: part for kind, part in named if kind is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replicas_are_pulled_by_128_bits_in_registers_and_their_own_arithmetic(
    architecture: str,
) -> None:
    assert pulls(architecture).keys() == SIZES.keys()
    for storage, code in pulls(architecture).items():
        flight = 1 if SIZES[storage] == 2 else 2
        # Four replicas that are kept; of further ones a loop reads to sum, and one to pull. The
        # path by elements has the same once again.
        for kind, count in (("LDG", 6), ("STG", 5)):
            accesses = re.findall(rf"\b{kind}\.E[.A-Z0-9]*", code)
            by_vectors = sum(".128" in access for access in accesses)
            assert by_vectors >= flight * count, (storage, accesses)
            assert len(accesses) - by_vectors <= count, (storage, accesses)
        assert not re.findall(r"\b(?:LDL|STL|FFMA|DFMA)\b", code), storage
        assert bool(re.findall(r"\b(?:DADD|DMUL)\b", code)) == (storage == "d"), storage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_that_may_be_launched_is_compiled(architecture: str) -> None:
    sass = cuobjdump("-sass", "-arch", architecture)
    names = re.findall(r"Function : \S*?([a-z]+)_kernel", sass)
    assert Counter(names) == {
        **{"step": STEPS, "several": 40, "age": 2, "prepare": 1, "pull": 4, "advance": 1},
        **{"squares": 4, "sums": 1},  # of the gradients' norm
    }


def test_python_and_cpp_agree_on_a_policy() -> None:
    assert backends._C_cuda.POLICY_COLUMNS == POLICY_COLUMNS


def test_the_module_is_small_enough_to_ship() -> None:
    assert Path(backends._C_cuda.__file__).stat().st_size < 5e6
