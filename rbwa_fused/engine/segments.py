"""The table of segments, by which the kernels find every tensor of a launch in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rbwa_fused.engine.memory import is_dense, is_plain, laid_out, same_layout
from rbwa_fused.engine.sharded import is_sharded, laid_out_as, local
from rbwa_fused.streams import AVERAGE, DTYPES, FURTHER, KEPT, KEYS, MASTER, STEP

# Columns of the segment table (csrc/tables.h has the same list). A stream's column says which of
# the `state` tensors it is, -1 where the segment has none.
LENGTH, ROW, SAMPLING, SHAPE, DIMS, DTYPE, FIRST_STREAM = range(7)
SLOTS = (AVERAGE, MASTER, STEP, *KEPT)
SLOT_OF = {AVERAGE: AVERAGE, MASTER: MASTER, STEP: STEP, **KEYS}  # of a key in opt.state[p]
COLUMN_OF = {slot: FIRST_STREAM + i for i, slot in enumerate(SLOTS)}
COLUMNS = FIRST_STREAM + len(SLOTS)


@dataclass(eq=False)
class Table:
    """What a launch is told beside parameters and gradients: the same tensors at each step, until
    segments or groups are added.

    Attributes:
        state: what the streams lie in, each tensor as a vector in the order of its memory.
        segments: (n, COLUMNS) int64.
        shapes: 1-d int64, of each segment its sizes, then its strides.
        ages: (n,) int64, how many steps each has taken with what its rule keeps. A step of age 0
            reads its group's first-step row. Whoever takes the step counts, in `state`'s ``step``
            as well, which is the truth where the two differ: its owner has set it.
        rows, samplings: the coefficient tables (rows.py, samplers.py).
        further: (m, 3) int64, each average beside a segment's first: the segment, by which they are
            sorted, the tensor of `state` and the row of `samplings`; or None where there are none.
        views: all these for the compiled modules, made by the first step with them.
    """

    state: list[Tensor]
    segments: Tensor
    shapes: Tensor
    ages: Tensor
    rows: Tensor
    samplings: Tensor
    further: Tensor | None = None
    views: Any = None


def ages_of(
    columns: Sequence[Sequence[int]], state: Sequence[Tensor], ages: Sequence[int]
) -> list[int]:
    """The ages of some segments, by their columns: as counted, or as a ``step`` says that somebody
    has set. csrc/tables.cpp does the same."""
    found = list(ages)
    for i, own in enumerate(columns):
        if own[COLUMN_OF[STEP]] != -1:
            step = float(state[own[COLUMN_OF[STEP]]])
            if step != _rounded(found[i]):
                if not 0.0 <= step < 9e18:
                    raise RuntimeError(f"step_: the age of segment {i} is no count: {step}")
                found[i] = int(step)
    return found


def tell(columns: Sequence[Sequence[int]], state: Sequence[Tensor], ages: Sequence[int]) -> None:
    """Writes ages to the ``step`` of each segment that has one."""
    for own, age in zip(columns, ages, strict=False):
        if own[COLUMN_OF[STEP]] != -1:
            state[own[COLUMN_OF[STEP]]].fill_(age)


def _rounded(age: int) -> float:
    return float(torch.tensor(age, dtype=torch.float32, device="cpu")) if age > 1 << 24 else age


class Segments:
    """The segments of one launch: parameters of one device that share no memory.

    Attributes:
        params: the parameters, one segment each.
        memory: what the kernel steps: the parameter, or this process's shard of a DTensor, or a
            dense copy of one that is not dense or plain.
        stepped: the parameters again; in the place of one that is only averaged, whose gradient
            is its owner's, a tensor that has none.
        groups, index: the param group of each, and its number there.
        copies: the parameters (shards) that are not dense or plain, each with its copy.
        shards: the DTensor parameters, each with the shard that the table was made for.
        lacking: segments that may still come to need state, once they have a gradient.
    """

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self.memory: list[Tensor] = []
        self.stepped: list[Tensor] = []
        self.groups: list[int] = []
        self.index: list[int] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.shards: list[tuple[Tensor, Tensor]] = []
        self.lacking: list[int] = []
        self._columns: list[list[int]] = []
        self._shapes: list[int] = []
        self._made_for: list[Tensor] = []
        self._state: list[Tensor] = []
        self._samplings: list[Sequence[int]] = []  # rows of each segment's further averages
        self._further: dict[tuple[int, int], int] = {}  # of a segment, by number: its state tensor
        self._ages: list[int] = []
        self._table: Table | None = None

    def add(
        self,
        param: Tensor,
        group: int,
        index: int,
        row: int,
        sampling: int,
        further: Sequence[int] = (),
        *,
        steps: bool = True,
    ) -> None:
        """Appends a segment for a parameter, with its rows in the coefficient tables; ``further``
        are those of its averages beside the first."""
        memory = shard = local(param)
        if is_sharded(param):
            self.shards.append((param, shard))
        if not (is_dense(shard) and is_plain(shard)):
            memory = laid_out(shard, shard.dtype)
            self.copies.append((shard, memory))
        dtype = DTYPES.index(memory.dtype)
        columns = [memory.numel(), row, sampling, len(self._shapes), memory.dim(), dtype]
        self._columns.append(columns + [-1] * len(SLOTS))
        self._shapes += [*memory.shape, *memory.stride()]
        self._made_for.append(torch.empty_like(memory, device="meta"))
        self.params.append(param)
        self.memory.append(memory)
        self.stepped.append(param if steps else self._made_for[-1])
        self.groups.append(group)
        self.index.append(index)
        self._samplings.append(further)
        self._change()
        self._ages.append(0)

    def attach(self, stream: str, tensors: dict[int, Tensor]) -> None:
        """Gives segments a stream, by its key in a state: dense tensors, laid out as what the
        kernel steps; ``step`` has one element."""
        if not tensors:
            return
        self._change()
        for i, tensor in tensors.items():
            self._state.append(tensor.as_strided((tensor.numel(),), (1,)))
            if stream in FURTHER:
                self._further[i, FURTHER.index(stream)] = len(self._state) - 1
            else:
                self._columns[i][COLUMN_OF[SLOT_OF[stream]]] = len(self._state) - 1

    @property
    def ages(self) -> list[int]:
        """Of each segment, see Table."""
        ages = self._ages if self._table is None else self._table.ages.tolist()
        return ages_of(self._columns, self._state, ages)

    def set_ages(self, ages: Iterable[int]) -> None:
        """Of all segments, as somebody else has counted them."""
        self._ages = list(ages)
        self._table = None
        tell(self._columns, self._state, self._ages)

    def _change(self) -> None:
        self.set_ages(self.ages)

    def holds_shards(self) -> bool:
        """Whether all shards are those that the table was made for; FSDP may make others."""
        return all(local(param) is shard for param, shard in self.shards)

    @torch.no_grad()
    def gradients(self) -> list[Tensor | None]:
        """What the backward pass left, of DTensors the shards. A gradient laid out otherwise than
        its parameter is laid out anew, which communicates."""
        grads = [p.grad for p in self.stepped]
        for i, g in enumerate(grads):
            if g is not None and is_sharded(g):
                param = self.params[i]
                alike = laid_out_as(param, g)
                if alike is not g:
                    param.grad = alike
                grads[i] = local(alike)
        return grads

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

    def table(self, rows: Tensor, samplings: Tensor) -> Table:
        """The table of all these, with the coefficient tables."""
        known = self._table
        if known is None or known.rows is not rows:  # which grow with each group
            self._change()
            # On the host, whatever torch.set_default_device says.
            columns = torch.tensor(self._columns, dtype=torch.int64, device="cpu")
            further = [
                (i, at, self._samplings[i][number])
                for (i, number), at in sorted(self._further.items())
            ]
            known = self._table = Table(
                list(self._state),
                columns.reshape(-1, COLUMNS),
                torch.tensor(self._shapes, dtype=torch.int64, device="cpu"),
                torch.tensor(self._ages, dtype=torch.int64, device="cpu"),
                rows,
                samplings,
                torch.tensor(further, dtype=torch.int64, device="cpu") if further else None,
            )
        return known
