"""Files of tensors in the safetensors format, read and written a piece at a time.

The safetensors package writes a whole dict of tensors from memory and maps whole files into it.
Here neither is so: a file may be larger than the memory. The format is a length (8 bytes, little
endian), so many bytes of JSON, and the tensors' bytes without gaps:

    {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART = ".part"  # the end of the name of a file that is being written
LARGEST_HEADER = 100 << 20  # bytes, as the package has it


def part_of(file: Path) -> Path:
    """A name that no other writer of that file has meanwhile."""
    return file.with_name(f"{file.name}.{uuid4().hex[:8]}{PART}")


class Kind(NamedTuple):
    """What a tensor is, without its elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


class _StrangeError(Exception):
    """A dtype that there is nothing for."""


class Reader:
    """A file, of which the header was read and of the tensors nothing.

    Attributes:
        metadata: texts by name.
        kinds: what its tensors are, by name, in the order of their bytes.

    Raises:
        ValueError: for a file that ends early, or is none of tensors.
        OSError: for one that cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = os.fstat(opened.fileno()).st_size
            if not 2 <= length <= min(size - 8, LARGEST_HEADER):
                raise self._torn()
            text = opened.read(length)
        try:
            header: dict[str, Any] = json.loads(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            offsets = {name: told["data_offsets"] for name, told in header.items()}
            strange = [n for n, told in header.items() if told["dtype"] not in DTYPES]
            in_order = sorted(header, key=lambda name: offsets[name])
            if strange:
                raise self._strange(strange[0], header[strange[0]]["dtype"])
            self.kinds = {
                name: Kind(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]))
                for name in in_order
            }
        except _StrangeError as error:
            raise ValueError(str(error)) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._torn() from error
        self._begins: dict[str, int] = {}
        at = 0
        for name, kind in self.kinds.items():
            self._begins[name] = 8 + length + at
            if list(offsets[name]) != [at, at + kind.elements * kind.dtype.itemsize]:
                raise self._torn()
            at = offsets[name][1]
        if 8 + length + at != size:
            raise self._torn()

    def _strange(self, name: str, dtype: object) -> _StrangeError:
        return _StrangeError(
            f"Invalid file: {self.file} has {name} of dtype {dtype} (expected one of "
            f"{', '.join(DTYPES)})"
        )

    def _torn(self) -> ValueError:
        return ValueError(f"Invalid file: {self.file} (expected a whole safetensors file)")

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Elements of a tensor in logical order, 1-dim: ``count`` from the ``first`` on, or all."""
        dtype, kind = self.kinds[name].dtype, self.kinds[name]
        count = kind.elements - first if count is None else count
        if count == 0:
            return torch.empty(0, dtype=dtype)
        held = bytearray(count * dtype.itemsize)
        with self.file.open("rb") as opened:
            opened.seek(self._begins[name] + first * dtype.itemsize)
            if opened.readinto(held) != len(held):
                raise self._torn()
        return torch.frombuffer(held, dtype=dtype)


class Writer(AbstractContextManager["Writer"]):
    """A file that is there, whole and on the disk, once the context is left without an error; until
    then it is ``PART``, and after an error nothing. What had its name stays until then.

    Args:
        file: to write or to replace.
        kinds: of its tensors, whose elements ``append`` is given in the order of ``names``.
        metadata: texts by name.

    Raises:
        TypeError: for a dtype that the format has not.
        OSError: for what cannot be written, such as to a full disk.
    """

    def __init__(self, file: Path, kinds: Mapping[str, Kind], metadata: Mapping[str, str]) -> None:
        self.file = file
        # The largest first, so that all are aligned to their own size.
        self.names = sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name in self.names:
            dtype, shape = kinds[name]
            if name == "__metadata__":
                raise ValueError(f"Invalid name: {name!r} (expected another: the format has it)")
            if dtype not in NAMES:
                raise TypeError(f"Invalid dtype: {dtype} of {name} (expected one of {[*NAMES]})")
            begin, end = end, end + kinds[name].elements * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._left = end
        self._part = part_of(file)
        self._opened = self._part.open("wb")
        try:
            self._opened.write(len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._give_up()
            raise

    def append(self, tensor: Tensor) -> None:
        """Writes the elements that come next, in logical order."""
        tensor = tensor.detach().cpu().contiguous().reshape(-1)
        size = tensor.numel() * tensor.element_size()
        self._left -= size
        if size > 0:
            self._opened.write((ctypes.c_ubyte * size).from_address(tensor.data_ptr()))

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None:
            return self._give_up()
        try:
            if self._left != 0:
                raise ValueError(f"{self.file} is not complete: {self._left} bytes are missing")
            self._opened.flush()
            os.fsync(self._opened.fileno())
            self._opened.close()
            os.replace(self._part, self.file)
        except BaseException:
            self._give_up()
            raise
        sync_folder(self.file.parent)

    def _give_up(self) -> None:
        with suppress(OSError):
            self._opened.close()
        with suppress(OSError):
            self._part.unlink()


def sync_folder(folder: Path) -> None:
    """Has the disk know the names in a folder, where the system can say so."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
