"""Weighted sums of tensors in files, a piece of a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rbwa_fused.posthoc.tensors import Kind, Writer

PIECE = 1 << 15  # elements, which torch adds on one thread; larger ones took three times as long


class Source(Protocol):
    """Where tensors are read, such as tensors.Reader."""

    @property
    def kinds(self) -> Mapping[str, Kind]: ...

    def read(self, name: str, first: int, count: int) -> Tensor: ...


def sums(
    sources: Sequence[Source],
    rows: Sequence[Sequence[float]],
    kinds: Mapping[str, Kind],
    names: Sequence[str],
    done: Callable[[int], object],
) -> Iterator[tuple[str, list[Tensor]]]:
    """Pieces of the tensors of these names, in their order, of one sum for each row of weights.

    Sums are made in float64 (complex128), and what has no fractions, such as a count, is that of
    the last source. Each source is read once, and no piece has more than ``PIECE`` elements.

    Args:
        rows: weights of the sources.
        kinds: of the sums, whose dtypes may be others than the sources'.
        done: is told how many elements were read, again and again.
    """
    for name in names:
        kind = kinds[name]
        wide = torch.complex128 if kind.dtype.is_complex else torch.float64
        averaged = kind.dtype.is_complex or kind.dtype.is_floating_point
        for first in range(0, kind.elements, PIECE):
            count = min(PIECE, kind.elements - first)
            if not averaged:
                last = sources[-1].read(name, first, count)
                done(count * len(sources))
                yield name, [last] * len(rows)
                continue
            totals = [torch.zeros(count, dtype=wide) for _ in rows]
            for i, source in enumerate(sources):
                if any(row[i] != 0.0 for row in rows):
                    piece = source.read(name, first, count).to(wide)
                    for total, row in zip(totals, rows, strict=True):
                        if row[i] != 0.0:
                            total.add_(piece, alpha=row[i])
                done(count)
            yield name, [total.to(kind.dtype) for total in totals]


def write_sums(
    sources: Sequence[Source],
    rows: Sequence[Sequence[float]],
    files: Sequence[Path],
    metadata: Sequence[Mapping[str, str]],
    kinds: Mapping[str, Kind],
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """A safetensors file for each row of weights; each is whole or not there.

    Raises:
        OSError: for what cannot be read or written.
    """
    with ExitStack() as stack:
        writers = [
            stack.enter_context(Writer(file, kinds, texts))
            for file, texts in zip(files, metadata, strict=True)
        ]
        for _, pieces in sums(sources, rows, kinds, writers[0].names, done):
            for writer, piece in zip(writers, pieces, strict=True):
                writer.append(piece)


def sums_in_memory(
    sources: Sequence[Source],
    row: Sequence[float],
    kinds: Mapping[str, Kind],
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, Tensor]:
    """The sum of one row of weights, by name."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in kinds}
    for name, (piece,) in sums(sources, [row], kinds, list(kinds), done):
        pieces[name].append(piece)
    return {
        name: torch.cat([torch.empty(0, dtype=kinds[name].dtype), *found]).reshape(
            kinds[name].shape
        )
        for name, found in pieces.items()
    }
