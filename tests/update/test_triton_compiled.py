"""Every Triton kernel in every variant, compiled for GPUs that are not here.

Launches go through Triton's own just-in-time compiler up to where they would leave the host, so
what is compiled is what a GPU would run: the arguments that are None, the options and the promises
about addresses are those of a launch.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import policy_for, products
from rbwa_fused.triton_kernels import norm as triton_norm
from rbwa_fused.triton_kernels import step as triton_step
from rules import RULES
from torch import Tensor, nn

from rbwa_fused.engine import norm
from rbwa_fused.engine.counters import POLICY_COLUMNS, DeviceCounters
from rbwa_fused.rules import Kind
from rbwa_fused.streams import DTYPES

pytest.importorskip("triton")

import triton
from rbwa_fused.triton_kernels import update
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction, driver

pytestmark = pytest.mark.skipif(
    not isinstance(update.step_kernel, JITFunction), reason="Triton interprets in this process"
)

ARCHITECTURES = (80, 90)
SAMPLERS = (1, 2, 64)
FOUND_INF = (None, torch.zeros(1))
WIDE = (torch.float32, torch.float64)
FULL = os.environ.get("RBWA_PROFILE") == "long"


class Variant(NamedTuple):
    """What one step kernel is compiled for."""

    dtypes: tuple[torch.dtype, ...]  # of parameters, theta, what is kept, averages
    rule: int
    averaged: bool
    given: tuple[bool, bool, bool, bool, bool]  # marks, grad_scale, found_inf, clip, schedules
    parts: int
    further: int = 0  # averages beside the first


DTYPE_SETS = [
    (dtype, theta, kept, average)
    for dtype in DTYPES
    for theta in dict.fromkeys((dtype, dtype if dtype in WIDE else torch.float32))
    for kept in dict.fromkeys((theta, theta if theta in WIDE else torch.float32))
    for average in dict.fromkeys((theta, theta if theta in WIDE else torch.float32))
]
COUNTED = [(False, False, False, clip, False) for clip in (False, True)]
for free in (False, True):
    COUNTED += [
        (True, *scaled, False, free) for scaled in itertools.product((False, True), repeat=2)
    ]
    COUNTED += [(True, False, skips, True, free) for skips in (False, True)]  # unscaled gradients
VARIANTS = [
    Variant(*choices)
    for choices in itertools.product(
        DTYPE_SETS,
        (int(kind) for kind in Kind if kind not in (Kind.SAMPLE, Kind.MOMENTUM)),
        (False, True),
        COUNTED,
        (1, triton_step.PARTS),
    )
]
KINDS = tuple(dict.fromkeys(variant.rule for variant in VARIANTS))
SEVERAL = [
    Variant(dtypes, kind, averaged, given, 1, further=2)
    for dtypes in DTYPE_SETS
    for kind in KINDS
    for averaged in (False, True)
    for given in COUNTED
]


class Source(NamedTuple):
    """What a launch hands to the compiler."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any
    target: GPUTarget

    @property
    def key(self) -> str:
        name = self.kernel.__name__
        return repr((name, *self[1:]))

    @property
    def ast(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


class Gpu:
    """A GPU, of which Triton only asks what it is. It is given no launch to run: `sources` has what
    would have been compiled for each."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._architecture = ARCHITECTURES[-1]

    def sources_of(
        self, call: Callable[..., Any], *args: Any, architecture: int = ARCHITECTURES[-1]
    ) -> list[Source]:
        """What a call launches."""
        self.sources, self._architecture = [], architecture
        call(*args)
        return self.sources

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    """Tensors on the CPU stand for those on it."""
    gpu, run = Gpu(), JITFunction.run

    def keep(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, *told: Any
    ) -> None:
        target = gpu.get_current_target()
        gpu.sources.append(Source(self, signature, constants, told[0], options, target))

    def launch(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, warmup=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", gpu)
        patch.setattr(JITFunction, "run", launch)
        patch.setattr(JITFunction, "_do_compile", keep)
        patch.setattr(triton_step, "available", lambda device: None)
        yield gpu


def counters(samplers: int = 1, groups: int = 0) -> DeviceCounters:
    return DeviceCounters(
        settings=torch.zeros(groups, 6, dtype=torch.float64) if groups else None,
        schedules=torch.zeros(groups, 12, dtype=torch.float64) if groups else None,
        counts=torch.zeros(1 + samplers, dtype=torch.int64),
        policies=torch.zeros(samplers * POLICY_COLUMNS, dtype=torch.float64),
        samplings64=torch.zeros(2 * samplers, 5, dtype=torch.float64),
        samplings32=torch.zeros(2 * samplers, 5),
        marks=torch.zeros(3, 2, dtype=torch.int32),
        agings=torch.zeros(3, 3, dtype=torch.float64),
    )


def launch_step(variant: Variant, offset: int = 0) -> None:
    """Launches a variant; its tables lie `offset` elements off the alignment."""
    dtype, *others = variant.dtypes
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def table(columns: int, of: torch.dtype) -> Tensor:
        return torch.zeros(16 + columns, dtype=of)[offset:]

    marks, scaled, skipping, clipped, scheduled = variant.given
    deferred = None
    if marks:
        one = torch.ones(1 + offset)[offset:]
        deferred = replace(
            counters(),
            grad_scale=one if scaled else None,
            found_inf=one if skipping else None,
            schedules=table(12, torch.float64) if scheduled else None,
        )
    entries, bases = table(15, torch.int64), table(8, torch.float64)
    tables = entries, table(4, torch.int64), bases, table(28, wide), table(5, wide), table(9, wide)
    upload = triton_step.Upload(entries, *tables, variant.rule, variant.averaged)
    chunks = torch.zeros(5, 2, dtype=torch.int32)
    launch = triton_step.Launch(dtype, *others, [], chunks, variant.parts)
    launch.further = [[[0, 0]] * variant.further]
    clip = torch.ones(1 + offset, dtype=torch.float64)[offset:] if clipped else None
    launch._launch(upload, deferred, clip)


def front_end(source: Source) -> None:
    """From Python to Triton's intermediate representation, where its language has its errors."""
    backend, context = make_backend(source.target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parts = backend.get_codegen_implementation(source.options), backend.get_module_map(), context
    source.ast.make_ir(source.target, source.options, *parts)


def machine_code(source: Source) -> None:
    """From Python to the code of a GPU."""
    compiled = triton.compile(source.ast, target=source.target, options=source.options.__dict__)
    assert len(compiled.asm["cubin"]) > 1000


work: list[Source] = []


def one(compile_: Callable[[Source], None], index: int) -> str:
    """What is wrong with a part of the work, or nothing."""
    try:
        compile_(work[index])
    except Exception as error:
        return f"{work[index].key}: {str(error)[-600:]}"
    return ""


def failures(compile_: Callable[[Source], None], sources: list[Source]) -> list[str]:
    """Compiles in a process for each core; they inherit the work, which cannot be sent."""
    work[:] = sources
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        said = pool.map(partial(one, compile_), range(len(work)), chunksize=4)
        return list(filter(None, said))


def covering(variants: list[tuple[Any, ...]], together: int) -> list[tuple[Any, ...]]:
    """A few among which so many choices meet, whichever they are, as meet in any."""
    met = {v: set(itertools.combinations(enumerate(v), together)) for v in variants}
    left = set().union(*met.values())
    chosen = []
    while left:
        best = max(variants, key=lambda variant: len(met[variant] & left))
        left -= met[best]
        chosen.append(best)
    return chosen


def test_steps_pass_the_front_end_with_every_three_choices(gpu: Gpu) -> None:
    sources = []
    few = covering([v for v in VARIANTS if v.parts == 1], together=3)
    for variant in [*few, *covering(SEVERAL, together=2)]:
        sources += gpu.sources_of(launch_step, variant)
    assert len(sources) >= 8 * 3 * 5
    assert failures(front_end, sources) == []


def test_steps_compile_to_machine_code_with_every_two_choices(gpu: Gpu) -> None:
    """All of them with RBWA_PROFILE=long."""
    every, several = (
        [(*variant, architecture) for variant in variants for architecture in ARCHITECTURES]
        for variants in (VARIANTS, SEVERAL)
    )
    few = covering(every, together=2) + covering(several, together=2)
    sources = []
    for *variant, architecture in every + several if FULL else few:
        sources += gpu.sources_of(launch_step, Variant(*variant), architecture=architecture)
    assert len(sources) >= 8 * 5
    assert failures(machine_code, sources) == []


def test_the_counters_kernel_compiles_to_machine_code(gpu: Gpu) -> None:
    sources = []
    for samplers, found_inf, groups in itertools.product(SAMPLERS, FOUND_INF, (0, 3)):
        own = replace(counters(samplers, groups), found_inf=found_inf)
        for architecture in ARCHITECTURES:
            sources += gpu.sources_of(triton_step.advance_triton, own, architecture=architecture)
    assert len(sources) == len(SAMPLERS) * 2 * 2 * 2
    assert failures(machine_code, sources) == []


def test_the_kernel_of_schedules_compiles_to_machine_code(gpu: Gpu) -> None:
    sources = []
    for groups, architecture in itertools.product((1, 300), ARCHITECTURES):
        own = counters(groups=groups)
        sources += gpu.sources_of(triton_step._prepare, own, architecture=architecture)
    assert len({source.key for source in sources}) == len(ARCHITECTURES)
    assert failures(machine_code, sources) == []


SIZES = ((5,), (4096 * 300, 1))  # one row of chunks, and several


def launch_norm(dtype: torch.dtype, sizes: tuple[int, ...], offset: int = 0) -> None:
    grads = [torch.zeros(n + offset, dtype=dtype)[offset:] for n in sizes]
    triton_norm.sum_squares(grads, norm.memory(grads))


def test_the_norm_compiles_to_machine_code(gpu: Gpu) -> None:
    sources = []
    for dtype, sizes in itertools.product(DTYPES, SIZES):
        for architecture in ARCHITECTURES:
            sources += gpu.sources_of(launch_norm, dtype, sizes, architecture=architecture)
    assert len(sources) == 2 * len(DTYPES) * len(SIZES) * len(ARCHITECTURES)
    assert failures(machine_code, sources) == []


def test_the_norm_of_more_gradients_needs_no_kernel_of_its_own(gpu: Gpu) -> None:
    few, more = (
        {source.key for source in gpu.sources_of(launch_norm, torch.float32, (5,) * n, n % 2)}
        for n in (1, 40)
    )
    assert few == more


def test_tables_anywhere_in_memory_need_no_kernel_of_their_own(gpu: Gpu) -> None:
    """One that had to be compiled in the middle of training, or of a capture."""
    for given in ((True, True, True, False, False), (True, False, True, True, True)):
        variant = VARIANTS[-1]._replace(given=given)
        on, off = (gpu.sources_of(launch_step, variant, offset) for offset in (0, 1))
        assert len(on) == 2  # ages come first
        assert [source.key for source in on] == [source.key for source in off]


def train(options: dict[str, Any]) -> None:
    """Steps of every kind: without a gradient, scaled, unscaled before, unscaled by nobody."""
    one = torch.ones(1)
    amp = [{}, {"grad_scale": one, "found_inf": one}, {"grad_scale": None, "found_inf": one}]
    averages = ("none", "ema", "same-dtype", "rbwa", "mean-write-back", "three")
    for dtype, rule, average in products(DTYPES, RULES, averages):
        ps = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in (5, 40)]
        policy = policy_for(average, rule, dtype)
        opt = RULES[rule].made(ps, average=policy, backend="triton", **options)
        for step, scaler in enumerate(amp):
            for p in ps:
                p.grad = torch.ones_like(p)
            ps[step % 2].grad = None
            if scaler.get("grad_scale") is None:
                opt.clip_grad_norm_(0.5)
                assert opt.pending_clip is not None
                opt.pending_clip.coefficient = torch.ones((), dtype=torch.float64)
            vars(opt).update(scaler)
            opt.step()
            for name in scaler:
                delattr(opt, name)


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_training_launches_nothing_else(gpu: Gpu, options: dict[str, Any]) -> None:
    known = set()
    for variant in [*VARIANTS, *SEVERAL]:
        known |= {source.key for source in gpu.sources_of(launch_step, variant)}
    for samplers, found_inf, groups in itertools.product((1, 3), FOUND_INF, (0, 1)):
        own = replace(counters(samplers, groups), found_inf=found_inf)
        known |= {source.key for source in gpu.sources_of(triton_step.advance_triton, own)}
    known |= {source.key for source in gpu.sources_of(triton_step._prepare, counters(groups=1))}
    for dtype in DTYPES:
        known |= {source.key for source in gpu.sources_of(launch_norm, dtype, (5, 40))}
    trained = {source.key for source in gpu.sources_of(train, options)}
    assert len(trained) > 50
    assert trained <= known
