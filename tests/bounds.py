"""Numbers in float64, each with a proved bound of what a kernel's rounding may make of it.

An operator of `Value` stands for one operation of a kernel. The kernel's operands are within `off`
of `v`, and IEEE 754 rounds what it makes of them by at most half a unit in the last place, which is
half an eps of the largest result that they allow. The bound adds up both. Where an operand is
exactly 0, a sum or a product is not rounded, nor is a product by 1 or -1. Storing in 16 bits allows
half a unit in the last place more. Copies and zeros allow nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Arithmetic:
    """How a kernel computes for a dtype: in float64 for float64, else in float32."""

    dtype: torch.dtype

    @classmethod
    def of(cls, dtype: torch.dtype) -> Arithmetic:
        return cls(F64 if dtype == F64 else F32)

    @property
    def unit(self) -> float:
        """What one rounding may lose of a result, and a little for the roundings of the twin, which
        are as large where the kernel computes in float64, too."""
        return torch.finfo(self.dtype).eps * (1.0 if self.dtype == F64 else 0.5) * (1 + 2**-20)

    @property
    def smallest(self) -> float:
        """Below which numbers have no digits."""
        info = torch.finfo(self.dtype)
        return float(info.smallest_normal * info.eps)

    def round(self, coefficient: float) -> float:
        """The number that a kernel works with for one that the host computed."""
        if self.dtype == F64:
            return coefficient
        rounded: float = struct.unpack("f", struct.pack("f", coefficient))[0]
        return rounded


@dataclass
class Value:
    """A number of the twin, and how far the kernel's may be from it."""

    v: Tensor
    off: Tensor
    arithmetic: Arithmetic

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        """What a tensor holds, to go on with as the kernels do for its dtype."""
        v = tensor.detach().to(F64, copy=True)
        return cls(v, torch.zeros_like(v), Arithmetic.of(tensor.dtype))

    def clone(self) -> Value:
        return Value(self.v.clone(), self.off.clone(), self.arithmetic)

    @property
    def zero(self) -> Tensor:
        """Where it is 0, and the kernel's is."""
        return (self.v == 0) & (self.off == 0)

    def __neg__(self) -> Value:
        return Value(-self.v, self.off, self.arithmetic)

    def __add__(self, other: Value | float) -> Value:
        term = self._like(other)
        exact = self.zero | term.zero
        return self._rounded(self.v + term.v, self.off + term.off, exact)

    def __sub__(self, other: Value | float) -> Value:
        return self + -self._like(other)

    def __mul__(self, other: Value | float) -> Value:
        if not isinstance(other, Value):
            factor = self.arithmetic.round(other)
            if factor == 0.0:
                zero = torch.zeros_like(self.v)
                return Value(zero, zero.clone(), self.arithmetic)
            exact = torch.full_like(self.v, abs(factor) == 1.0, dtype=torch.bool)
            return self._rounded(factor * self.v, abs(factor) * self.off, exact)
        off = self.v.abs() * other.off + self.off * (other.v.abs() + other.off)
        return self._rounded(self.v * other.v, off, self.zero | other.zero)

    __rmul__ = __mul__

    def __truediv__(self, other: Value | float) -> Value:
        divisor = self._like(other)
        v = self.v / divisor.v
        off = (self.off + v.abs() * divisor.off) / (divisor.v.abs() - divisor.off)
        return self._rounded(v, off, self.zero)

    def sqrt(self) -> Value:
        v = self.v.sqrt()
        least, most = (self.v - self.off).clamp(min=0.0), self.v + self.off
        return self._rounded(v, torch.maximum(most.sqrt() - v, v - least.sqrt()), self.zero)

    def stored(self, dtype: torch.dtype) -> Value:
        """What memory of a dtype holds of it: the same, or in 16 bits the nearest."""
        if dtype == self.arithmetic.dtype:
            return self
        info = torch.finfo(dtype)
        half_ulp = 0.5 * info.eps * (self.v.abs() + self.off) + info.smallest_normal * info.eps
        known = self.off == 0
        nearest = self.v.to(dtype).to(F64)
        return Value(
            torch.where(known, nearest, self.v),
            torch.where(known, self.off, self.off + half_ulp),
            self.arithmetic,
        )

    def _like(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            assert other.arithmetic == self.arithmetic, "a kernel computes in one dtype"
            return other
        v = torch.full_like(self.v, self.arithmetic.round(other))
        return Value(v, torch.zeros_like(v), self.arithmetic)

    def _rounded(self, v: Tensor, off: Tensor, exact: Tensor) -> Value:
        """The result of one operation; `off` is what its operands may be off by."""
        size = v.abs() + off
        rounding = self.arithmetic.unit * size + self.arithmetic.smallest * (size > 0).to(F64)
        return Value(v, torch.where(exact, off, off + rounding), self.arithmetic)


def ulps(actual: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the last place of max(1, |expected|) in actual's dtype."""
    if actual.numel() == 0:
        return 0.0
    scale = expected.double().abs().clamp(min=1.0) * torch.finfo(actual.dtype).eps
    return float(((actual.double() - expected.double()).abs() / scale).max())
