"""However the CUDA step is launched, small or large, with a table of blocks or by bisection: the
same bits. The emulated kernel gets a copy of as many bytes as the compiled one would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, gradients, params
from rules import KERNELS
from test_update import assert_same_bits, run
from torch import nn

import rbwa_fused as rf

pytest.importorskip("rbwa_fused._C")
FORMS = list(itertools.product((True, False), repeat=2))  # small, with a table of blocks
SEGMENT, GROUP, SAMPLING = 96, 160, 20  # bytes in a launch, float32
SMALL = 8112  # of tables


@pytest.fixture
def forms(emulated_cuda: Any) -> Iterator[Any]:
    emulated_cuda.small_launches(), emulated_cuda.tabled_launches()
    yield emulated_cuda
    emulated_cuda.launch_form(True, False)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rule", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form_has_the_bits_of_the_cpu(
    dtype: torch.dtype, rule: str, form: tuple[bool, bool], forms: Any
) -> None:
    if KERNELS[rule].master and dtype.itemsize != 2:
        pytest.skip("masters are of 16-bit parameters")
    forms.launch_form(*form)
    average = "mean-write-back" if KERNELS[rule].writes_back else "ema"
    ours = run(dtype, rule, average, backend="cuda")
    small, tabled = forms.small_launches(), forms.tabled_launches()
    assert (small > 0) == (form[0] and dtype == torch.float32)
    assert (tabled > 0) == form[1]
    assert_same_bits(ours, run(dtype, rule, average))


def step_of(ps: list[nn.Parameter], backend: str) -> list[torch.Tensor]:
    opt = rf.FusedSGD(ps, lr=0.1, momentum=0.9, average=rf.ema(0.9), backend=backend)
    for p, g in zip(ps, gradients(ps, 1), strict=True):
        p.grad = g
    opt.step()
    return [t for p in ps for t in (p.detach(), *opt.state[p].values())]


def many(count: int, numel: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, numel + i % 2)) for i in range(count)]


MOST = (SMALL - GROUP - SAMPLING) // SEGMENT  # segments of one group that a small launch holds


@pytest.mark.parametrize(("count", "small"), [(MOST, 1), (MOST + 1, 0)])
def test_a_launch_is_small_up_to_the_last_segment_that_fits(
    count: int, small: int, forms: Any
) -> None:
    ours = step_of(many(count), "cuda")
    assert forms.small_launches() == small
    assert_same_bits(ours, step_of(many(count), "cpu"))


def test_blocks_that_do_not_fit_into_a_table_find_their_segments(forms: Any) -> None:
    forms.launch_form(False, True)
    most = (32_672 - GROUP - SAMPLING) // (
        SEGMENT + 2
    )  # segments of one block, which takes 2 bytes
    for count, tabled in ((most, 1), (most + 1, 0)):
        ours = step_of(many(count), "cuda")
        assert forms.tabled_launches() == tabled
        assert_same_bits(ours, step_of(many(count), "cpu"))


def test_segments_without_elements_have_no_blocks_in_the_table(forms: Any) -> None:
    forms.launch_form(False, True)
    ends = []
    for backend in ("cuda", "cpu"):
        empty = [nn.Parameter(torch.zeros(0)) for _ in range(2)]
        ps = [empty[0], *params(torch.float32), empty[1], nn.Parameter(torch.ones(9000))]
        ends.append(step_of(ps, backend))
    assert forms.tabled_launches() == 1
    assert_same_bits(*ends)
