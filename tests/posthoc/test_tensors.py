"""Files of tensors, against the safetensors package, torn at every place, and on a full disk."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rbwa_fused.posthoc.tensors import DTYPES, Kind, Reader, Writer

safetensors = pytest.importorskip("safetensors.torch")


def some() -> dict[str, Tensor]:
    """A tensor of each dtype, a scalar, one without elements, and one that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2, (3, 5), generator=generator)
    found = {name: numbers.to(dtype) for name, dtype in DTYPES.items()}
    found |= {"none": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    return {**found, "turned": torch.randn(4, 3, generator=generator).t()}


def write(file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    kinds = {name: Kind(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with Writer(file, kinds, metadata) as writer:
        for name in writer.names:
            writer.append(tensors[name])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def test_what_is_written_the_safetensors_package_reads(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, some(), of="ä text")
    read = safetensors.load_file(file)
    assert read.keys() == some().keys()
    assert all(same(read[name], tensor) for name, tensor in some().items())
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {"of": "ä text"}


def test_what_the_package_writes_is_read_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.save_file({n: t.contiguous() for n, t in some().items()}, file, {"a": "b"})
    reader = Reader(file)
    assert reader.metadata == {"a": "b"} and reader.kinds.keys() == some().keys()
    for name, tensor in some().items():
        kind, flat = reader.kinds[name], tensor.reshape(-1)
        assert (kind.dtype, kind.shape) == (tensor.dtype, tuple(tensor.shape))
        assert same(reader.read(name), flat)
        for first in range(0, kind.elements, 4):
            count = min(4, kind.elements - first)
            assert same(reader.read(name, first, count), flat[first : first + count])


def test_a_torn_file_is_named_wherever_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, some())
    content = file.read_bytes()
    for length in [*range(0, len(content), 37), len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors \(expected a whole"):
            Reader(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="expected a whole"):
        Reader(file)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_what_is_no_file_of_tensors_is_refused(header: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(ValueError, match="expected a whole"):
        Reader(file)


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"a": torch.ones(3)})
    before = file.read_bytes()
    kinds = {"a": Kind(torch.float32, (3,))}
    with pytest.raises(AttributeError), Writer(file, kinds, {}) as writer:
        writer.append(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 bytes are missing"), Writer(file, kinds, {}) as writer:
        writer.append(torch.zeros(2))
    with pytest.raises(TypeError, match=r"Invalid dtype: torch.complex128 of a"):
        Writer(file, {"a": Kind(torch.complex128, (3,))}, {})
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]
    assert file.read_bytes() == before


def test_a_disk_without_room_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"a": torch.ones(3)})
    before = file.read_bytes()
    for elements in (1, 100_000):  # which fails at the end, and on the way
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write(file, {"a": torch.ones(elements)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]
        assert file.read_bytes() == before


def test_tensors_begin_at_multiples_of_their_size(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"b": torch.ones(1, dtype=torch.uint8), "a": torch.ones(1), "c": torch.ones(1)})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["a"]["data_offsets"][0] == 0 and header["b"]["data_offsets"] == [8, 9]
