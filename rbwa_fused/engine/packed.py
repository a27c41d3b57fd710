"""Rows of numbers, packed into memory that a tensor sees: the form of both coefficient tables."""

from __future__ import annotations

import struct

import torch

NUMBER = struct.Struct("d")


class RowTable:
    """Rows of one format, packed into memory that a float64 tensor of shape (rows, columns) sees.

    An element written into a tensor costs microseconds, a packed row tenths of one.
    """

    def __init__(self, row: struct.Struct) -> None:
        self.tensor = torch.empty(0, row.size // 8, dtype=torch.float64, device="cpu")
        self._row = row
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes) // self._row.size

    def grow(self, rows: int) -> None:
        """Appends rows of zeros; the tensor is another one then."""
        grown = self._bytes + bytearray(rows * self._row.size)
        self.tensor = torch.frombuffer(grown, dtype=torch.float64).reshape(-1, self._row.size // 8)
        self._bytes = grown

    def pack(self, row: int, *values: float) -> None:
        """Writes a row."""
        self._row.pack_into(self._bytes, row * self._row.size, *values)

    def pack_from(self, row: int, column: int, *values: float) -> None:
        """Writes some numbers of a row, from a column on."""
        at = row * self._row.size + column * NUMBER.size
        struct.pack_into(f"{len(values)}d", self._bytes, at, *values)

    def pack_last(self, row: int, value: float) -> None:
        """Writes the last number of a row."""
        NUMBER.pack_into(self._bytes, (row + 1) * self._row.size - NUMBER.size, value)
