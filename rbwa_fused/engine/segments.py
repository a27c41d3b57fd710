"""The table of segments, by which the kernels find every tensor of a launch in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rbwa_fused.engine.memory import is_dense, is_plain, laid_out, same_layout
from rbwa_fused.engine.sharded import is_sharded, laid_out_as, local
from rbwa_fused.streams import DTYPES, STREAMS

# Columns of the segment table (csrc/tables.h has the same list). A stream is a pair: which state
# buffer holds it (-1: none) and the element at which it starts.
LENGTH, ROW, SAMPLING, SHAPE, DIMS, DTYPE, FIRST_STREAM = range(7)
COLUMN_OF = {name: FIRST_STREAM + 2 * i for i, name in enumerate(STREAMS)}
COLUMNS = FIRST_STREAM + 2 * len(STREAMS)


class Streams(list[Tensor]):
    """The tensors of a launch's streams, which stay what they are.

    Attributes:
        views: the same for the compiled modules, made by the first step with them.
    """

    views: Any = None


class Segments:
    """The segments of one launch: parameters of one device that share no memory.

    Attributes:
        params: the parameters, one segment each.
        memory: what the kernel steps: the parameter, or this process's shard of a DTensor, or a
            dense copy of one that is not dense or plain.
        groups, index: the param group of each, and its number there.
        copies: the parameters (shards) that are not dense or plain, each with its copy.
        shards: the DTensor parameters, each with the shard that the table was made for.
        lacking: segments whose group has momentum, without a momentum buffer so far.
        first: segments that take their first step with momentum now.
        state: what the streams lie in, each tensor as a vector in the order of its memory.
    """

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.memory: list[Tensor] = []
        self.groups: list[int] = []
        self.index: list[int] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.shards: list[tuple[Tensor, Tensor]] = []
        self.lacking: list[int] = []
        self.first: list[int] = []
        self.state = Streams()
        self._columns: list[list[int]] = []
        self._shapes: list[int] = []
        self._made_for: list[Tensor] = []
        self._tensors: tuple[Tensor, Tensor] | None = None

    def add(self, param: Tensor, group: int, index: int, row: int, sampling: int) -> None:
        """Appends a segment for a parameter, with its rows in the coefficient tables."""
        memory = shard = local(param)
        if is_sharded(param):
            self.shards.append((param, shard))
        if not (is_dense(shard) and is_plain(shard)):
            memory = laid_out(shard, shard.dtype)
            self.copies.append((shard, memory))
        dtype = DTYPES.index(memory.dtype)
        columns = [memory.numel(), row, sampling, len(self._shapes), memory.dim(), dtype]
        self._columns.append(columns + [-1, 0] * len(STREAMS))
        self._shapes += [*memory.shape, *memory.stride()]
        self._made_for.append(torch.empty_like(memory, device="meta"))
        self.params.append(param)
        self.memory.append(memory)
        self.groups.append(group)
        self.index.append(index)
        self._tensors = None

    def attach(self, stream: str, tensors: dict[int, Tensor]) -> None:
        """Gives segments a stream: dense tensors, laid out as what the kernel steps."""
        if not tensors:
            return
        state = Streams(self.state)  # another list for other tensors: launches know it again
        for i, tensor in tensors.items():
            column = COLUMN_OF[stream]
            self._columns[i][column : column + 2] = len(state), 0
            state.append(tensor.as_strided((tensor.numel(),), (1,)))
        self.state = state
        self._tensors = None

    def holds_shards(self) -> bool:
        """Whether all shards are those that the table was made for; FSDP may make others."""
        return all(local(param) is shard for param, shard in self.shards)

    def gradients(self) -> list[Tensor | None]:
        """What the backward pass left, of DTensors the shards. A gradient laid out otherwise than
        its parameter is laid out anew, which communicates."""
        grads = [p.grad for p in self.params]
        for i, g in enumerate(grads):
            if g is not None and is_sharded(g):
                param = self.params[i]
                alike = laid_out_as(param, g)
                if alike is not g:
                    param.grad = alike
                grads[i] = local(alike)
        return grads

    def set_row(self, segment: int, row: int) -> None:
        """Points a segment at another of its group's rows."""
        self._columns[segment][ROW] = row
        self._tensors = None

    def fits(self, segment: int) -> bool:
        """Whether the parameter still is what its segment was made for, wherever it lies."""
        param, made_for = local(self.params[segment]), self._made_for[segment]
        return (
            param.dtype == made_for.dtype
            and param.device == self.memory[segment].device
            and param.shape == made_for.shape
            and (
                self.memory[segment] is not param
                or (same_layout(param, made_for) and is_plain(param))
            )
        )

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tables `segments` (n, COLUMNS) and `shapes` (1-d) of csrc/tables.h, int64."""
        if self._tensors is None:
            # On the host, whatever torch.set_default_device says.
            columns = torch.tensor(self._columns, dtype=torch.int64, device="cpu")
            shapes = torch.tensor(self._shapes, dtype=torch.int64, device="cpu")
            self._tensors = columns.reshape(-1, COLUMNS), shapes
        return self._tensors
