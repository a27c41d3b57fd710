"""The launch: what a step's tables say, brought to the device, and one kernel for all segments.

A launch serves all segments of one dtype, with masters or without, and one dtype of their averages.
Its table has a row of ENTRY_COLUMNS numbers for each segment: the addresses of theta, g and a, and
of what rules keep (0: not touched), the length, the rows of both coefficient tables, the kind, the
address of a tensor learning rate (0: none), the segment's number, and the address of the parameter
that theta is the master of (0: theta is the parameter). Of averages beside the first a table of its
own has the address (0: none, or not touched) and the row of the samplings, as many for each segment
as any has. The coefficient tables, rounded to the arithmetic's dtype, follow in the same memory, so
that a step costs at most one copy to the device: none where nothing changed, and that of the
coefficients alone where only their values did.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rbwa_fused.engine.segments import (
    COLUMN_OF,
    DTYPE,
    LENGTH,
    ROW,
    SAMPLING,
    Table,
    ages_of,
    tell,
)
from rbwa_fused.rules import COLUMNS, KEPT_BY, Kind, aging, family, is_adam, served_by
from rbwa_fused.rules import Sampling as SamplingRow
from rbwa_fused.streams import AVERAGE, DTYPES, KEPT, MASTER

if TYPE_CHECKING:
    from rbwa_fused.engine.counters import DeviceCounters

CHUNK = 4096  # elements that a program takes
LARGE = 100_000_000  # elements of a table from which on a program takes several chunks in turn
PARTS = 4
# The fewest registers without local memory on sm_90: a thread holds 8 elements, or 16.
WARPS = {1: 16, PARTS: 8}
MARKS_BLOCK = 1024  # segments whose marks one program advances
GROUPS_BLOCK = 128  # groups whose schedules one program prepares
KIND, SAMPLE = COLUMNS.index("kind"), SamplingRow._fields.index("sample")
BASES = [COLUMNS.index(name) for name in ("eta", "rho", "mu", "nu")]

Grads = Sequence[Tensor | None]
# Of theta, gradients, state and tensor learning rates (None where the host knows those); and which
# segments are of age 0.
Addresses = tuple[list[int], list[int | None], list[int], list[int] | None, list[bool]]
Used = tuple[tuple[int, ...], tuple[bool, ...]]  # kinds of rows, and which samplings sample


def available(device: torch.device) -> str | None:
    """None where this backend serves tensors of a device, else the reason why it does not."""
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton does not serve {device.type}"
    interpret = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device.type == "cpu" and not interpret:
        return "on the CPU its kernels only run interpreted: set TRITON_INTERPRET=1"
    try:
        from . import update
    except ImportError as error:
        return f"Triton is missing: run `pip install triton` ({error})"
    compiled = isinstance(update.step_kernel, update.triton.JITFunction)
    if device.type == "cpu" and compiled:
        return "its kernels were loaded before TRITON_INTERPRET=1 was set"
    if device.type != "cpu" and not compiled:
        return f"TRITON_INTERPRET=1 interprets on the CPU only, not on {device.type}"
    return None


def prepare(
    params: list[Tensor],
    grads: list[Tensor | None],
    table: Table,
    counters: DeviceCounters | None = None,
    clip: Tensor | None = None,
) -> tuple[Any, ...]:
    """See engine/doors.py.."""
    return step_triton, params, grads, table, counters, clip


def step_triton(
    params: Sequence[Tensor],
    grads: Grads,
    table: Table,
    counters: DeviceCounters | None = None,
    clip: Tensor | None = None,
) -> None:
    """`reference.step_` in one launch for each set of dtypes: of parameters, theta and averages.

    Args:
        params, grads, table: as `reference.step_`'s, already checked; the tables lie on the CPU.
        counters: None, or what the device decides by itself (engine/counters.py): samplings and
            ages of its own stand for the table's; a step may be skipped. Both rows of every group
            must be up to date then, and `advance_triton` follows.
        clip: as `reference.step_`'s.

    Raises:
        RuntimeError: where the backend does not serve the device, or the first step with a table
            is taken while a CUDA graph is captured.
    """
    if not params:
        return
    device = params[0].device
    with _on(device):
        known = _launches.get(table)
        if known is None:
            reason = available(device)
            if reason is None and _capturing(device):
                reason = "take a step before you capture one"
            if reason is not None:
                raise RuntimeError(f"backend 'triton': {reason}")
            addresses = [t.data_ptr() for t in table.state]  # others come with another table
            known = _launches[table] = _plan(table, device), addresses
        launches, addresses = known
        ages = None
        if counters is None:
            segments = table.segments.tolist()
            ages = ages_of(segments, table.state, table.ages.tolist())
        elif counters.schedules is not None:
            _prepare(counters)
        for launch in launches:
            launch.run(params, grads, addresses, table, ages, counters, clip)
    if ages is not None:
        kinds = table.rows[table.segments[:, ROW], KIND].tolist()
        older = [
            age + (g is not None and bool(KEPT_BY[kind]))
            for age, g, kind in zip(ages, grads, kinds, strict=True)
        ]
        table.ages.copy_(torch.tensor(older, device="cpu"))
        tell(segments, table.state, older)


def _prepare(counters: DeviceCounters) -> None:
    """Makes the numbers of the step to come in `schedules`."""
    from . import schedule

    assert counters.schedules is not None
    groups = counters.schedules.shape[0]
    schedule.prepare_kernel[(-(-groups // GROUPS_BLOCK),)](
        counters.settings,
        counters.schedules,
        groups,
        BLOCK=GROUPS_BLOCK,
        num_warps=1,
        enable_fp_fusion=False,
    )


def advance_triton(counters: DeviceCounters) -> None:
    """Counts the step just taken, unless ``found_inf`` skipped it, and packs the next samplings.

    Args:
        counters: `step_triton`'s, with all groups' counters and all segments' marks.
    """
    from . import advance

    samplers, segments = counters.counts.shape[0] - 1, counters.marks.shape[0]
    groups = 0 if counters.schedules is None else counters.schedules.shape[0]
    with _on(counters.counts.device):
        advance.advance_kernel[(1 + -(-max(segments, groups) // MARKS_BLOCK),)](
            counters.counts,
            counters.policies,
            counters.samplings32,
            counters.samplings64,
            counters.marks,
            counters.found_inf,
            counters.schedules,
            samplers,
            segments,
            groups,
            SAMPLERS=1 << max(samplers - 1, 0).bit_length(),
            BLOCK=MARKS_BLOCK,
            num_warps=1,
            enable_fp_fusion=False,
        )


@dataclass
class Upload:
    """A launch's tables on the device, and what they ask of the kernel.

    Attributes:
        staging: the memory that the latest of them were copied from.
        further: averages beside the first of each segment; empty where there are none.
        agings: of each segment, where the host counts.
        bases: of each row what age makes them of: eta, rho, mu and nu in float64.
        kind: the one with most streams, None where no segment has anything to do.
    """

    staging: Tensor
    table: Tensor
    further: Tensor
    bases: Tensor
    rows: Tensor
    samplings: Tensor
    agings: Tensor
    kind: int | None
    averaged: bool


@dataclass
class Launch:
    """The segments of one dtype, of theta, of what is kept and of averages.

    Attributes:
        members: of each segment its number in the segment table, and its columns there.
        chunks: (n, 2) int32 on the device: each program's segment, and which part of it.
        parts, block, warps: how often a program takes how many elements, by how many warps.
        further: of each segment the averages beside its first: tensors of the state, and rows of
            the samplings.
        key: what the tables on the device were made of: addresses, and coefficients.
        used: the kinds of the rows, and which samplings sample: all that the segments' table
            depends on of the coefficients.
        captured: what captured graphs read at each replay.
    """

    dtype: torch.dtype
    theta_dtype: torch.dtype
    kept_dtype: torch.dtype
    average_dtype: torch.dtype
    members: list[tuple[int, list[int]]]
    chunks: Tensor
    parts: int
    further: list[list[list[int]]] = field(default_factory=list)
    block: int = field(init=False)
    warps: int = field(init=False)
    key: tuple[Any, ...] = ()
    used: Used = ((), ())
    upload: Upload | None = None
    captured: list[Upload] = field(default_factory=list)

    @property
    def most(self) -> int:
        """Averages beside the first that a segment has."""
        return max(map(len, self.further), default=0)

    def __post_init__(self) -> None:
        self.block, self.warps = CHUNK, WARPS[self.parts]  # as `chunks` was made for

    def run(
        self,
        params: Sequence[Tensor],
        grads: Grads,
        addresses: list[int],
        tables: Table,
        ages: list[int] | None,
        counters: DeviceCounters | None,
        clip: Tensor | None = None,
    ) -> None:
        """Brings the tables up to date where something changed, and launches. `ages` are those of
        all segments, where the host counts."""
        theta = [params[i].data_ptr() for i, _ in self.members]
        g = [None if (grad := grads[i]) is None else grad.data_ptr() for i, _ in self.members]
        rows, samplings, lrs = tables.rows, tables.samplings, None
        if counters is not None:
            samplings = samplings[:0]
            lrs = [0 if lr is None else lr.data_ptr() for lr in counters.lrs]
        first = [] if ages is None else [age == 0 for age in ages]
        at = theta, g, addresses, lrs, first
        values = rows.tolist(), samplings.tolist(), self._agings(tables, ages)
        capturing = _capturing(self.chunks.device)
        upload = self.upload
        if upload is None or (at, values) != self.key:
            kinds = tuple(int(row[KIND]) for row in values[0])
            used = kinds, tuple(sampling[SAMPLE] != 0 for sampling in values[1])
            if upload is None or not self.key or (at, used) != (self.key[0], self.used):
                upload = self._upload(rows, samplings, values[2], at, used)
            else:
                upload = self._with_coefficients(upload, rows, samplings, values[2])
            self.upload, self.used = upload, used
            self.key = () if capturing else (at, values)  # a captured copy happens at replays only
        if capturing:
            self.captured.append(upload)
        if upload.kind is not None:
            self._launch(upload, counters, clip)

    def _agings(self, tables: Table, ages: list[int] | None) -> list[float]:
        """What its age makes of the row of each segment, all in one list; empty where it makes
        nothing of any, and where the device counts."""
        if ages is None:
            return []
        rows = tables.rows.tolist()
        known: dict[tuple[int, int], tuple[float, ...]] = {}
        found: list[float] = []
        for row, age in zip(tables.segments[:, ROW].tolist(), ages, strict=True):
            if (row, age) not in known:
                known[row, age] = aging(rows[row], age)
            found += known[row, age]
        return found if any(is_adam(int(row[KIND])) for row in rows) else []

    def _upload(
        self, rows: Tensor, samplings: Tensor, agings: list[float], at: Addresses, used: Used
    ) -> Upload:
        """Packs the table and the coefficients, and copies them to the device."""
        theta, g, addresses, lrs, first = at
        entries, kinds = [], []
        further: list[int] = []
        averaged = False
        others = self.further or [[] for _ in self.members]
        members = zip(self.members, theta, g, others, strict=True)
        for (number, columns), theta_at, g_at, own in members:
            row, sampling = columns[ROW], columns[SAMPLING]
            kind = Kind.SAMPLE if g_at is None else served_by(used[0][row])
            # Where the device counts, it decides itself whether a sample is due.
            touched = {MASTER, *KEPT_BY[kind]}
            if lrs is not None or used[1][sampling]:
                touched.add(AVERAGE)
            streams_at = {
                name: addresses[columns[column]]
                for name, column in COLUMN_OF.items()
                if columns[column] != -1 and name in touched
            }
            averaged = averaged or AVERAGE in streams_at
            due = [
                [addresses[which] if lrs is not None or used[1][at] else 0, at] for which, at in own
            ]
            further += chain.from_iterable(due + [[0, 0]] * (self.most - len(due)))
            if g_at is not None or AVERAGE in streams_at or any(at for at, _ in due):
                kinds.append(kind)
            master = streams_at.get(MASTER, 0)
            entries += [master or theta_at, g_at or 0]
            entries += [streams_at.get(name, 0) for name in (AVERAGE, *KEPT)]
            lr = lrs[row // 2] if lrs else 0
            row += bool(KEPT_BY[kind]) and bool(first) and first[number] and not is_adam(kind)
            entries += [columns[LENGTH], row, sampling, kind, lr, number]
            entries += [theta_at if master else 0]

        if len({family(kind) for kind in kinds if kind != Kind.SAMPLE}) > 1:
            raise RuntimeError("backend 'triton': one launch of kinds of several families")
        addresses_of = [
            torch.tensor(own, dtype=torch.int64, device="cpu") for own in (entries, further)
        ]
        pieces = [*addresses_of, *self._coefficients(rows, samplings, agings)]
        staging, (table, *coefficients) = _copied(pieces, self.chunks.device)
        return Upload(staging, table, *coefficients, max(kinds, default=None), averaged)

    def _with_coefficients(
        self, upload: Upload, rows: Tensor, samplings: Tensor, agings: list[float]
    ) -> Upload:
        """The same table of segments with other coefficients, which alone are copied."""
        pieces = self._coefficients(rows, samplings, agings)
        staging, tables = _copied(pieces, self.chunks.device)
        names = "bases", "rows", "samplings", "agings"
        return replace(upload, staging=staging, **dict(zip(names, tables, strict=True)))

    def _coefficients(self, rows: Tensor, samplings: Tensor, agings: list[float]) -> list[Tensor]:
        own = torch.tensor(agings, dtype=torch.float64, device="cpu")
        wide = [t.reshape(-1).to(self._wide) for t in (rows, samplings, own)]
        # Of kinds that no age matters to there is nothing to make anything of.
        aged = any(map(is_adam, rows[:, KIND].tolist()))
        bases = rows[:, BASES].reshape(-1) if aged else rows.new_empty(0)
        return [bases, *wide]  # eight bytes each come first, where they are aligned

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _launch(self, upload: Upload, counters: DeviceCounters | None, clip: Tensor | None) -> None:
        from . import update

        samplings, agings = upload.samplings, upload.agings
        marks, grad_scale, found_inf, schedules = None, None, None, None
        if counters is not None:
            samplings = (
                counters.samplings64 if self._wide == torch.float64 else counters.samplings32
            )
            marks, grad_scale = counters.marks, counters.grad_scale
            found_inf = counters.found_inf
            if upload.kind in (Kind.DECOUPLED, Kind.SCHEDULE_FREE):
                schedules = counters.schedules
            agings = counters.agings.reshape(-1).view(self._wide)
            if upload.kind is not None and is_adam(upload.kind):
                segments = len(self.members)
                update.age_kernel[(-(-segments // MARKS_BLOCK),)](
                    upload.table,
                    upload.bases,
                    marks,
                    agings,
                    segments,
                    BLOCK=MARKS_BLOCK,
                    num_warps=4,
                    enable_fp_fusion=False,
                )
        update.step_kernel[(self.chunks.shape[0],)](
            self.chunks,
            upload.table,
            upload.rows,
            samplings,
            marks,
            agings,
            grad_scale,
            found_inf,
            clip,
            schedules,
            upload.further if self.most else None,
            DTYPE=_triton_dtype(self.dtype),
            THETA_DTYPE=_triton_dtype(self.theta_dtype),
            KEPT_DTYPE=_triton_dtype(self.kept_dtype),
            AVERAGE_DTYPE=_triton_dtype(self.average_dtype),
            KIND=int(max(upload.kind or 0, Kind.PLAIN)),
            AVERAGED=upload.averaged,
            BLOCK=self.block,
            PARTS=self.parts,
            FURTHER=self.most,
            num_warps=self.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )


# One table is one layout; its launches are forgotten with it.
_launches: WeakKeyDictionary[Table, tuple[list[Launch], list[int]]] = WeakKeyDictionary()


def _plan(tables: Table, device: torch.device) -> list[Launch]:
    """Sorts segments into launches. Those that have nothing kept, or no average, join others of
    their dtype."""
    kinds: dict[tuple[torch.dtype, ...], list[tuple[int, list[int]]]] = {}
    table = tables.segments.tolist()
    further: dict[int, list[list[int]]] = {}
    for number, *row in [] if tables.further is None else tables.further.tolist():
        further.setdefault(number, []).append(row)

    def dtypes_of(number: int, columns: list[int]) -> list[torch.dtype | None]:
        dtype = DTYPES[columns[DTYPE]]
        averages = [columns[COLUMN_OF[AVERAGE]], *(at for at, _ in further.get(number, ()))]
        theta = torch.float32 if columns[COLUMN_OF[MASTER]] != -1 else dtype
        kept, average = (
            None if at == -1 else tables.state[at].dtype
            for at in (columns[COLUMN_OF[KEPT[0]]], max(averages))
        )
        return [dtype, theta, kept, average]

    def lacking(member: tuple[int, list[int]]) -> int:
        return dtypes_of(*member).count(None)

    for number, columns in sorted(enumerate(table), key=lacking):
        own = dtypes_of(number, columns)
        key = next(
            (k for k in kinds if all(a is None or a == b for a, b in zip(own, k, strict=True))),
            tuple(own[1] if dtype is None else dtype for dtype in own),
        )
        kinds.setdefault(key, []).append((number, columns))
    parts = PARTS if sum(columns[LENGTH] for columns in table) >= LARGE else 1
    launches = []
    for key, members in kinds.items():
        launch = Launch(*key, members, _chunks(members, parts * CHUNK).to(device), parts)
        if any(number in further for number, _ in members):
            launch.further = [further.get(number, []) for number, _ in members]
        launches.append(launch)
    return launches


def _chunks(members: list[tuple[int, list[int]]], chunk: int) -> Tensor:
    """The table of programs. An empty segment has one, which marks its first step."""
    lengths = torch.tensor([columns[LENGTH] for _, columns in members], device="cpu")
    programs = (lengths + chunk - 1).div(chunk, rounding_mode="floor").clamp(min=1)
    member = torch.repeat_interleave(torch.arange(len(members), device="cpu"), programs)
    first = programs.cumsum(0) - programs
    within = torch.arange(len(member), device="cpu") - first[member]
    return torch.stack([member, within], dim=1).int()


def _copied(pieces: list[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Pieces in one memory from which they can be copied while the host goes on, and there."""
    staging = torch.empty(
        sum(piece.nbytes for piece in pieces),
        dtype=torch.uint8,
        device="cpu",
        pin_memory=device.type != "cpu",
    )
    for piece, part in zip(pieces, _split(staging, pieces), strict=True):
        part.copy_(piece)
    return staging, _split(staging.to(device, non_blocking=True), pieces)


def _split(memory: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of the pieces that lie in memory one after the other."""
    sizes = [piece.nbytes for piece in like]
    parts = memory.split(sizes)
    return [part.view(piece.dtype) for part, piece in zip(parts, like, strict=True)]


def _triton_dtype(dtype: torch.dtype) -> Any:
    from triton import language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device current, as Triton's launches need it."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
