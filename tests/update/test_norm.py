"""The norm of all gradients: one order of summation, whoever adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import emulation
import pytest
import torch
from cases import DTYPES
from torch import Tensor

from rbwa_fused import _C
from rbwa_fused.engine import backends, norm
from rbwa_fused.total_norm import total_norm

SIZES = (1, 0, 5000, 4096, 257, 300_000, 12, 3 * 4096 + 1, 255)  # of chunks and lanes, and beside
SQUARES = torch.ops.rbwa_fused.sum_squares_.default


def gradients(dtype: torch.dtype | None, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """Of one dtype, or of all in turn."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [dtype] if dtype is not None else DTYPES
    return [
        torch.randn(n, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        for i, n in enumerate(sizes)
    ]


def sums_by(sum_squares: Callable[[list[Tensor], Tensor], None], grads: list[Tensor]) -> Tensor:
    sums = norm.memory(grads).fill_(math.nan)
    sum_squares(grads, sums)
    return sums


def as_stated(grads: list[Tensor]) -> list[float]:
    """csrc/norm.h, word by word."""

    def added(numbers: list[float]) -> float:
        lanes = [0.0] * 256
        for i, number in enumerate(numbers):
            lanes[i % 256] += number
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        return lanes[0]

    chunks = []
    for g in grads:
        squares = [x * x for x in g.double().tolist()]
        chunks += [added(squares[at : at + 4096]) for at in range(0, len(squares), 4096)]
    return [added(chunks), *chunks]


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
def test_every_backend_adds_in_the_stated_order(
    backend: str, dtype: torch.dtype | None, emulated_cuda: Any
) -> None:
    grads = gradients(dtype)
    chosen = backends.choose(backend, torch.device("cpu"))
    assert sums_by(chosen.sum_squares, grads).tolist() == as_stated(grads)


def test_more_chunks_than_lanes_are_added_lane_by_lane(emulated_cuda: Any) -> None:
    grads = gradients(torch.float32, (3, 700 * 4096 + 9, 5))
    expected = as_stated(grads)
    for backend in ("cpu", "reference", "cuda"):
        chosen = backends.choose(backend, torch.device("cpu"))
        assert sums_by(chosen.sum_squares, grads).tolist() == expected, backend


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_instruction_set_and_number_of_threads_gives_the_same_bits(
    capability: str, dtype: torch.dtype
) -> None:
    grads = gradients(dtype)
    best, threads = _C.cpu_capability(), torch.get_num_threads()
    expected = sums_by(norm.sum_squares_, grads)
    if not _C.set_cpu_capability(capability):
        pytest.skip(f"no {capability} here")
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(sums_by(backends.CPU.sum_squares, grads), expected), count
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_capability(best)


def test_as_few_launches_as_fit(emulated_cuda: Any) -> None:
    """One for each dtype, or 1,364 gradients of it, and one for the chunks' sums."""
    sum_squares = emulation.backend().sum_squares
    many = gradients(torch.float32, (3,) * 3000)
    emulated_cuda.launches()
    assert sums_by(sum_squares, many).tolist() == as_stated(many)
    assert emulated_cuda.launches() == 4
    sums_by(sum_squares, gradients(None))
    assert emulated_cuda.launches() == 5
    emulated_cuda.fail(2)
    with pytest.raises(RuntimeError, match="sum_squares_: out of luck"):
        sums_by(sum_squares, many)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_right_to_a_unit_of_its_last_place(dtype: torch.dtype) -> None:
    grads = gradients(dtype)
    expected = math.sqrt(math.fsum(x * x for g in grads for x in g.double().tolist()))
    found = total_norm(grads)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide and found.dim() == 0
    # Some 1,250 additions of float64 for a number, which half a unit of float32 hides.
    rounded = torch.tensor(expected, dtype=wide).item()
    assert found.item() == pytest.approx(rounded, rel=1e-15 if wide == torch.float64 else 0)


def test_what_is_inf_in_float32_is_not_here_and_what_is_not_finite_shows() -> None:
    """torch's norm of float32 gradients is inf from 1.8e19 on, and clips them to zeros."""
    large = [torch.full((3,), 3e30), torch.full((4,), 1.0)]
    assert total_norm(large).item() == pytest.approx(math.sqrt(27e60), rel=1e-7)
    for value in (math.inf, -math.inf, math.nan):
        for at in (0, 4095, 4096, 4999):
            grads = gradients(torch.float32)
            grads[2][at] = value
            for sum_squares in (backends.CPU.sum_squares, norm.sum_squares_):
                found = sums_by(sum_squares, grads)[0].item()
                assert math.isnan(found) if math.isnan(value) else found == math.inf


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t(),
    "channels last": lambda t: t.view(2, 30, 5, 4).contiguous(memory_format=torch.channels_last),
    "with gaps": lambda t: t[:, ::2],
    "expanded": lambda t: t[:, :1].expand(60, 7),
    "overlapping": lambda t: t.view(-1).as_strided((60, 60), (3, 1)),
    "expanded over as many as it skips": lambda t: t.view(-1).as_strided((2, 2), (3, 0)),
    "flipped in memory only": lambda t: torch.complex(t, t).conj().imag,
    "zeros without memory": lambda t: torch._efficientzerotensor((4, 5)),
    "off the alignment": lambda t: t.view(-1)[1:],
    "complex": lambda t: torch.complex(t, t + 1).conj(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "0-dimensional": lambda t: t[3, 4],
    "none": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_any_layout_counts_each_element_once(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = LAYOUTS[layout](torch.randn(60, 20, generator=generator))
    values = grad.to(torch.complex128).flatten().tolist()
    expected = math.sqrt(sum(abs(x) ** 2 for x in values) + 4)
    before = grad.float().clone() if not grad.is_complex() else grad.clone()
    found = total_norm([torch.full((1,), 2.0), grad])
    assert found.item() == pytest.approx(expected, rel=1e-7)
    assert torch.equal(grad if grad.is_complex() else grad.float(), before)


MISFITS: dict[str, tuple[Callable[[], list[Tensor]], Callable[[], Tensor], str]] = {
    "not dense": (lambda: [torch.ones(9), torch.ones(8)[::2]], lambda: sums(3), "gradient 1 is"),
    "expanded": (
        lambda: [torch.ones(8).as_strided((2, 2), (3, 0))],
        lambda: sums(2),
        "gradient 0 is",
    ),
    "no memory": (
        lambda: [torch._efficientzerotensor((4,))],
        lambda: sums(2),
        "gradient 0",
    ),
    "integers": (lambda: [torch.ones(4, dtype=torch.int64)], lambda: sums(2), "must be float32"),
    "sums too short": (lambda: [torch.ones(4097)], lambda: sums(2), "of 3 elements"),
    "sums too long": (lambda: [torch.ones(4096)], lambda: sums(3), "of 2 elements"),
    "sums of float32": (lambda: [torch.ones(4)], lambda: sums(2).float(), "float64"),
    "sums with gaps": (lambda: [torch.ones(4)], lambda: sums(4)[::2], "contiguous"),
}


def sums(count: int) -> Tensor:
    return torch.full((count,), 7.0, dtype=torch.float64)


@pytest.mark.parametrize("door", ["dispatcher", "direct"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_is_named_and_nothing_is_written(misfit: str, door: str) -> None:
    make_grads, make_sums, words = MISFITS[misfit]
    into = make_sums()
    with pytest.raises(RuntimeError, match=words):
        (SQUARES if door == "dispatcher" else _C.sum_squares)(make_grads(), into)
    assert bool((into == 7).all())


def test_both_doors_and_the_profiler_give_the_same() -> None:
    grads = gradients(None)
    expected = sums_by(_C.sum_squares, grads)
    assert torch.equal(sums_by(SQUARES, grads), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        assert torch.equal(sums_by(backends.CPU.sum_squares, grads), expected)
    assert "rbwa_fused::sum_squares_" in {event.key for event in watched.key_averages()}


def test_the_operator_keeps_its_schema() -> None:
    grads = gradients(torch.float32, (5, 4097))
    torch.library.opcheck(SQUARES, (grads, norm.memory(grads)))
