"""Memory: how tensors lie in it, which of them share it, and flat buffers for parameters.

A flat buffer holds one segment for each parameter, aligned to 128 bytes. A parameter has a storage
of its own that aliases its segment, so saving, copying or sharing it moves its bytes and not the
whole buffer. State tensors are allocated one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from rbwa_fused.engine.sharded import is_flattened, local

ALIGNMENT = 128  # bytes
LARGEST_BUFFER = 256 * 2**20  # bytes; a larger tensor gets a buffer of its own


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


def laid_out(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that is not filled, in the layout of another, in a storage of its own."""
    with torch.inference_mode(False):
        return torch.empty_strided(
            like.shape, strides_like(like), dtype=dtype, device=like.device, requires_grad=False
        )


def lies_as(tensor: Tensor, like: Tensor) -> bool:
    """Whether a kernel that steps the one finds the other's elements in the same order."""
    return (
        tensor.device == like.device
        and tensor.layout == torch.strided
        and same_layout(tensor, like)
        and is_dense(tensor)
        and is_plain(tensor)
        and not tensor.requires_grad
        and not tensor.is_inference()
    )


class Spans:
    """Ranges of memory that have an owner."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._taken: list[tuple[str, int, int]] = []  # device, start, end; in order, disjoint
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> bool:
        """Takes a tensor's memory. False where another one has some of it."""
        if tensor.numel() == 0:
            return True
        device, start, end = _span(tensor)
        first = last = bisect_left(self._taken, (device, start, end))
        if first > 0 and self._taken[first - 1][0] == device and self._taken[first - 1][2] > start:
            first -= 1
        while last < len(self._taken) and self._taken[last][0] == device:
            if self._taken[last][1] >= end:
                break
            last += 1
        others = self._taken[first:last]
        whole = min([start, *(o[1] for o in others)]), max([end, *(o[2] for o in others)])
        self._taken[first:last] = [(device, *whole)]
        return not others


def _span(tensor: Tensor) -> tuple[str, int, int]:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return str(tensor.device), start, start + reach * tensor.element_size()


def launch_order(
    params: Sequence[Tensor], known: Sequence[int] = ()
) -> tuple[list[int], list[bool]]:
    """For each parameter, the launch that it may take part in, and whether its memory is its own.

    Parameters that share memory are stepped one after the other, in their order, as torch does:
    the turn is 0, or one more than the last turn of an earlier parameter that overlaps. The first
    parameters keep the turns that are known.
    """
    spans = []
    for i, p in enumerate(map(local, params)):
        if p.numel() > 0:
            spans.append((*_span(p), i))
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
