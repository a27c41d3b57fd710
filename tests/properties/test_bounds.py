"""The bounds that the twin proves hold for arithmetic in the kernels' dtypes, and are not wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import F32, F64, Value
from rules import NOT_STARTED, RULES
from torch import Tensor

COUNT = 20_000
# Of numbers that a kernel has, and of others; those that no rule uses yet, too.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / (b * b + 0.125),
    "root": lambda a, b: (a * a).sqrt(),
    "negative": lambda a, b: -a,
    "by a number": lambda a, b: 0.3 * a - b * 1.0,
    "a chain": lambda a, b: (0.9 * a + 0.1 * (b - a)) / ((a * a + b * b).sqrt() + 1e-3),
}


def drawn(seed: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all sizes, zeros and the smallest that there are among them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(COUNT, generator=generator, dtype=F64)
    size = torch.randint(-160 if dtype == F64 else -75, 4, (COUNT,), generator=generator)
    kept = torch.rand(COUNT, generator=generator) < 0.9
    return (normal * 2.0**size * kept).to(dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernels_result_is_within_its_bound(name: str) -> None:
    """Of float32, since float64 has nothing exact to be compared with here."""
    a, b = drawn(1, F32), drawn(2, F32)
    actual = OPERATIONS[name](a, b)
    value = OPERATIONS[name](Value.of(a), Value.of(b))
    assert bool(((actual.to(F64) - value.v).abs() <= value.off).all())
    if name in ("sum", "product"):  # half a unit, and that the smallest numbers have no digits
        eps, smallest = torch.finfo(F32).eps, value.arithmetic.smallest
        assert bool((value.off <= 0.51 * eps * value.v.abs() + 1.01 * smallest).all())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_copies_zeros_and_signs_are_exact(dtype: torch.dtype) -> None:
    a = drawn(1, dtype)
    nothing = torch.zeros_like(a)
    for value in (
        1.0 * Value.of(a),
        -Value.of(a) * -1.0,
        Value.of(a) + Value.of(nothing),
        Value.of(a) - 0.0 * Value.of(drawn(2, dtype)),
        Value.of(a) + 1e-60 * Value.of(nothing),
    ):
        assert torch.equal(value.v, a.to(F64)) and not value.off.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_number_in_16_bits_is_within_half_a_unit_of_it(dtype: torch.dtype) -> None:
    a, b = drawn(1, F32), drawn(2, F32)
    stored = (Value.of(a) + Value.of(b)).stored(dtype)
    assert bool((((a + b).to(dtype).to(F64) - stored.v).abs() <= stored.off).all())
    copied = Value.of(a).stored(dtype)
    assert torch.equal(copied.v, a.to(dtype).to(F64)) and not copied.off.any()


@pytest.mark.parametrize("name", RULES)
def test_an_algorithm_is_the_same_for_tensors_and_for_the_twins_numbers(name: str) -> None:
    """In float64, where the twin computes as torch does."""
    rule = RULES[name]
    plain: dict[str, Tensor] = {}
    bounded: dict[str, Value] = {}
    theta = drawn(0, F64)
    number = Value.of(theta)
    counts = NOT_STARTED
    for step in range(4):
        g = drawn(1 + step, F64)
        options, counts = rule.of_step(rule.hyperparameters, counts)
        theta = rule.literal(plain, theta, g, options)
        number = rule.literal(bounded, number, Value.of(g), options)
        assert torch.equal(number.v, theta)
        assert {k: v.v.tolist() for k, v in bounded.items()} == {
            k: v.tolist() for k, v in plain.items()
        }
