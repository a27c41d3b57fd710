"""Which shards make wholes, and that they are put where they belong."""

from __future__ import annotations

from pathlib import Path

import torch

from rbwa_fused.posthoc.joined import Place, join, whole_kinds
from rbwa_fused.posthoc.tensors import Kind, Reader, Writer

Ranks = list[dict[str, Kind]]
Places = list[dict[str, Place]]

F32 = torch.float32


def halves(second: int = 2) -> tuple[Ranks, Places]:
    """A tensor of five rows on two ranks, the second of which has so many."""
    ranks = [{"a": Kind(F32, (rows, 4))} for rows in (3, second)]
    return ranks, [{"a": ([5, 4], [first, 0])} for first in (0, 3)]


def test_shards_that_leave_nothing_out_make_a_whole() -> None:
    assert whole_kinds(*halves()) == {"a": Kind(F32, (5, 4))}
    assert whole_kinds(*halves(second=1)) is None


def test_a_replica_counts_once() -> None:
    ranks, places = halves()
    assert whole_kinds(ranks * 2, places * 2) == {"a": Kind(F32, (5, 4))}
    assert whole_kinds(ranks[:1] * 2, places[:1] * 2) is None


def test_shards_of_unknown_places_and_other_names_make_none() -> None:
    ranks, places = halves()
    assert whole_kinds(ranks, [places[0], {}]) is None
    assert whole_kinds([ranks[0], {**ranks[1], "b": Kind(F32, ())}], places) is None


def test_blocks_of_two_dimensions_are_put_where_they_belong(tmp_path: Path) -> None:
    whole = torch.arange(15.0).reshape(3, 5)
    files, places = [], []
    for rank, (rows, columns) in enumerate(
        (rows, columns)
        for rows in (slice(0, 2), slice(2, 3))
        for columns in (slice(0, 3), slice(3, 5))
    ):
        block = whole[rows, columns]
        file = tmp_path / f"{rank}.safetensors"
        with Writer(file, {"a": Kind(F32, tuple(block.shape))}, {"of": "rank"}) as writer:
            writer.append(block)
        files.append(file)
        places.append({"a": ([3, 5], [rows.start, columns.start])})
    kinds = whole_kinds([Reader(file).kinds for file in files], places)
    assert kinds is not None
    join(files, places, kinds, tmp_path / "out.safetensors")
    read = Reader(tmp_path / "out.safetensors")
    assert read.metadata == {"of": "rank"} and read.read("a").reshape(3, 5).equal(whole)
