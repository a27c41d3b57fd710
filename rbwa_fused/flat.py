"""Flat buffers, and the table of segments by which the kernels find every tensor in them.

A parameter's memory and its state live in flat buffers, one segment each, aligned to 128 bytes.
Every tensor that a user can see has a storage of its own that aliases its segment, so saving,
copying or sharing one moves that tensor's bytes and not the whole buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from rbwa_fused.sharded import beside, is_flattened, is_sharded, laid_out_as, local

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as in csrc/step.h
ALIGNMENT = 128  # bytes
LARGEST_BUFFER = 256 * 2**20  # bytes; a larger tensor gets a buffer of its own

# Columns of the segment table (csrc/ops.cpp has the same list). A stream is a pair: which state
# buffer holds it (-1: none) and the element at which it starts.
LENGTH, ROW, SAMPLING, SHAPE, DIMS, DTYPE = range(6)
STREAMS = {
    "momentum_buffer": 6,
    "average": 8,
    "difference_buffer": 10,
    "previous_gradient": 12,
    "master_param": 14,  # float32, of a 16-bit parameter
}
COLUMNS = 16


def kept_dtype(dtype: torch.dtype, master_weights: bool) -> torch.dtype:
    """The dtype of momentum and of what the step works on: float32 where there is a master."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if master_weights and narrow else dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory exactly once, in whatever order."""
    expected = 1
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    for size, stride in sorted(dims, key=lambda d: (d[1], d[0])):
        if size != 1:
            if stride != expected:
                return tensor.numel() == 0
            expected *= size
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the elements as they are: not their negatives (the imaginary part of a
    conjugate, torch.resolve_neg), and not zeros that take no memory."""
    return tensor.numel() == 0 or not (tensor.is_neg() or torch._is_zerotensor(tensor))


def strides_like(tensor: Tensor) -> tuple[int, ...]:
    """The parameter's strides, or contiguous ones where it does not fill its memory."""
    return (
        tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
    )


def same_layout(tensor: Tensor, like: Tensor) -> bool:
    """Equal shape, and strides that differ at most where a size of 1 makes them meaningless."""
    return tensor.shape == like.shape and all(
        a == b or size == 1 or tensor.numel() == 0
        for a, b, size in zip(tensor.stride(), like.stride(), tensor.shape, strict=True)
    )


def alias(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of `like`'s shape in `flat` from an element on, with a storage of its own."""
    # By a capsule: Tensor.__dlpack__ refuses memory of a GPU that is not the current one.
    piece = to_dlpack(flat[offset : offset + like.numel()])
    return from_dlpack(piece).as_strided(like.shape, strides_like(like))


def allocate(
    tensors: Iterable[tuple[int, Tensor]], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, dict[int, int]]]:
    """Zeroed flat buffers with a segment for each (key, tensor), filled in order.

    Yields each buffer as soon as it is needed, with the offset of every key in it.
    """
    size = torch.empty((), dtype=dtype).element_size()
    step = ALIGNMENT // size
    offsets: dict[int, int] = {}
    end = 0

    def buffer() -> Tensor:
        flat = torch.zeros(end + step, dtype=dtype, device=device)
        shift = -flat.data_ptr() % ALIGNMENT // size
        return flat[shift : shift + end]

    for key, tensor in tensors:
        length = -(-tensor.numel() // step) * step
        if offsets and (end + length) * size > LARGEST_BUFFER:
            yield buffer(), offsets
            offsets, end = {}, 0
        offsets[key] = end
        end += length
    if offsets:
        yield buffer(), offsets


def turns(params: Sequence[Tensor], known: Sequence[int] = ()) -> tuple[list[int], list[bool]]:
    """For each parameter, the launch that it may take part in, and whether its memory is its own.

    Parameters that share memory are stepped one after the other, in their order, as torch does:
    the turn is 0, or one more than the last turn of an earlier parameter that overlaps. The first
    parameters keep the turns that are known.
    """
    spans = []
    for i, p in enumerate(map(local, params)):
        if p.numel() > 0:
            reach = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
            device = str(p.device)
            spans.append((device, p.data_ptr(), p.data_ptr() + reach * p.element_size(), i))
    clusters: list[list[tuple[str, int, int, int]]] = []
    end = 0
    for span in sorted(spans):
        if clusters and clusters[-1][0][0] == span[0] and span[1] < end:
            clusters[-1].append(span)
            end = max(end, span[2])
        else:
            clusters.append([span])
            end = span[2]
    turn = [*known, *[0] * (len(params) - len(known))]
    alone = [True] * len(params)
    for cluster in clusters:
        if len(cluster) == 1:
            continue
        in_order = sorted(cluster, key=lambda span: span[3])
        for at, (_, start, stop, i) in enumerate(in_order):
            earlier = [turn[j] for _, a, b, j in in_order[:at] if a < stop and start < b]
            if i >= len(known):
                turn[i] = 1 + max(earlier, default=-1)
            alone[i] = False
    return turn, alone


def may_move(param: Tensor) -> bool:
    """Whether a parameter on the CPU fills a storage of its own that nothing else is known to hold.

    On a GPU parameters stay: its kernels are given every address anyway, and torch counts all of
    its memory as shared.
    """
    return (
        type(param) in (Tensor, torch.nn.Parameter)
        and param.device.type == "cpu"
        and param.numel() > 0
        and is_dense(param)
        and not is_flattened(param)
        and param.untyped_storage().nbytes() == param.numel() * param.element_size()
        and not param.is_shared()
        and not param.is_pinned()
    )


def move(params: Sequence[Tensor]) -> None:
    """Moves parameters into flat buffers, one per dtype, where their memory is theirs.

    Buffers are filled one by one, so memory peaks one buffer above the model.
    """
    params = [p for p in params if may_move(p)]
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for i, p in enumerate(params):
        kinds.setdefault((p.device, p.dtype), []).append((i, p))
    for (device, dtype), members in kinds.items():
        for flat, offsets in allocate(members, dtype, device):
            for i, offset in offsets.items():
                segment = alias(flat, offset, params[i])
                segment.copy_(params[i].detach())
                params[i].data = segment


class Table:
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
        state: the flat buffers that the streams lie in.
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
        self.state: list[Tensor] = []
        self._columns: list[list[int]] = []
        self._shapes: list[int] = []
        self._made_for: list[Tensor] = []
        self._tensors: tuple[Tensor, Tensor] | None = None
        self._holders: list[tuple[int, int]] = []  # of each state buffer: its storage, its holders

    def add(self, param: Tensor, group: int, index: int, row: int, sampling: int) -> None:
        """Appends a segment for a parameter, with its rows in the coefficient tables."""
        memory = shard = local(param)
        if is_sharded(param):
            self.shards.append((param, shard))
        if not (is_dense(shard) and is_plain(shard)):
            memory = torch.empty_strided(
                shard.shape, strides_like(shard), dtype=shard.dtype, device=shard.device
            )
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

    def attach(
        self, stream: str, values: dict[int, Tensor | None], dtypes: dict[int, torch.dtype]
    ) -> dict[int, Tensor]:
        """Gives segments a state buffer: zeros, or a copy of the value. Returns its tensors, of
        DTensor parameters as DTensors.

        `dtypes` names those that differ from the parameter's.
        """
        if not values:
            return {}
        kinds: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
        for i in values:
            dtype = dtypes.get(i, self.memory[i].dtype)
            kinds.setdefault(dtype, []).append((i, self.memory[i]))
        views: dict[int, Tensor] = {}
        for dtype, members in kinds.items():
            for flat, offsets in allocate(members, dtype, members[0][1].device):
                for i, offset in offsets.items():
                    column = STREAMS[stream]
                    self._columns[i][column : column + 2] = len(self.state), offset
                    views[i] = alias(flat, offset, self.memory[i])
                    value = values[i]
                    if value is not None:
                        views[i].copy_(value)
                self.state.append(flat)
                storage = flat.untyped_storage()._cdata
                self._holders.append((storage, torch._C._storage_Use_Count(storage)))
        self._tensors = None
        return {i: beside(view, self.params[i]) for i, view in views.items()}

    def holds_state(self) -> bool:
        """Whether all state tensors lie in the buffers still. To share one with a process, as
        sending it there does, moves its storage elsewhere; the buffer loses a holder then."""
        for storage, holders in self._holders:
            if torch._C._storage_Use_Count(storage) != holders:
                return False
        return True

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
        """The tables `segments` (n, COLUMNS) and `shapes` (1-d) of csrc/ops.cpp, int64."""
        if self._tensors is None:
            # On the host, whatever torch.set_default_device says.
            columns = torch.tensor(self._columns, dtype=torch.int64, device="cpu")
            shapes = torch.tensor(self._shapes, dtype=torch.int64, device="cpu")
            self._tensors = columns.reshape(-1, COLUMNS), shapes
        return self._tensors
