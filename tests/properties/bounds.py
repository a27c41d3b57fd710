"""Numbers in float64, each with a proved bound of what a kernel's rounding may make of it.

The bound follows from counting. In a sum of n products every term goes through one product and at
most n - 1 additions, each wrong by at most half an eps of the arithmetic, so `linear` allows n eps
of the sum of absolute values; the half that is left over covers the higher orders. Storing in 16
bits allows half a unit in the last place more. Copies and zeros allow nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64


@dataclass
class Value:
    """A number of the twin, and how far the kernel's may be from it."""

    v: Tensor
    off: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        v = tensor.detach().to(F64, copy=True)
        return cls(v, torch.zeros_like(v))

    def clone(self) -> Value:
        return Value(self.v.clone(), self.off.clone())


class Arithmetic:
    """How a kernel computes for a parameter: in float64 for float64, else in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = F64 if dtype == F64 else F32
        info = torch.finfo(self.dtype)
        # Where the kernel computes in float64, the twin's own roundings are as large as its.
        self.eps = info.eps * (2 if self.dtype == F64 else 1)
        self.smallest = info.smallest_normal * info.eps

    def round(self, coefficient: float) -> float:
        """The number that a kernel works with for one that the host computed."""
        if self.dtype == F64:
            return coefficient
        return struct.unpack("f", struct.pack("f", coefficient))[0]

    def linear(self, *terms: tuple[float, Value]) -> Value:
        """The sum of coefficient times value, with the bound of this module's docstring."""
        rounded = [(self.round(c), t) for c, t in terms]
        rounded = [(c, t) for c, t in rounded if c != 0.0]
        if not rounded:
            return Value.of(torch.zeros_like(terms[0][1].v))
        n = len(rounded)
        v = sum(c * t.v for c, t in rounded)
        off = sum(abs(c) * t.off for c, t in rounded)
        if n > 1 or abs(rounded[0][0]) != 1.0:
            size = sum(abs(c) * (t.v.abs() + t.off) for c, t in rounded)
            off = off + n * (self.eps * size + self.smallest * (size > 0).to(F64))
        return Value(v, off)

    def stored(self, value: Value, dtype: torch.dtype) -> Value:
        """What memory of a dtype holds of a value: the same, or to 16 bits the nearest."""
        if dtype == self.dtype:
            return value
        info = torch.finfo(dtype)
        nearest = value.v.to(dtype).to(F64)
        half_ulp = 0.5 * info.eps * (value.v.abs() + value.off) + info.smallest_normal * info.eps
        known = value.off == 0
        return Value(
            torch.where(known, nearest, value.v),
            torch.where(known, value.off, value.off + half_ulp),
        )
