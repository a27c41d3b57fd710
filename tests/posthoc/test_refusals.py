"""What synthesis and merging refuse by name, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import walks

from rbwa_fused.command import run
from rbwa_fused.posthoc import Snapshots, sweep, synthesize
from rbwa_fused.posthoc.__main__ import main
from rbwa_fused.posthoc.checkpoints import Torchs, latest
from rbwa_fused.posthoc.merge_command import main as merge_main
from rbwa_fused.posthoc.merging import merge_files
from rbwa_fused.posthoc.tensors import Kind, Reader, Writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("snapshots")
    model = walks.Small()
    walks.walked(model, walks.averagers(model), Snapshots(made, every=20))
    return made


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([0.1, 0.1000000001], r"0\.1 and 0\.1000000001 have both the file"),
        ([], "Invalid sigma_rel"),
    ],
)
def test_lengths_of_one_file_name_and_none_are_refused(
    lengths: list[float], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        sweep(folder, lengths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_writers_of_one_file_have_parts_of_their_own(tmp_path: Path) -> None:
    kinds = {"a": Kind(torch.float32, (1,))}
    file = tmp_path / "a.safetensors"
    with Writer(file, kinds, {}) as first, Writer(file, kinds, {}) as second:
        second.append(torch.zeros(1))
        first.append(torch.ones(1))
    assert Reader(file).read("a").tolist() == [1.0]
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"step": "a"}, TypeError, "Invalid step: 'a'"),
        ({"most": float("nan")}, ValueError, "Invalid most: nan"),
        ({"most": -1}, ValueError, "Invalid most: -1"),
        ({"out": "."}, ValueError, r"Invalid out: \. \(expected a file"),
    ],
)
def test_bad_arguments_are_named(options: Any, error: Any, said: str, folder: Path) -> None:
    with pytest.raises(error, match=said):
        synthesize(folder, sigma_rel=0.1, **options)


def status(begin: Any, *words: str | Path) -> int:
    try:
        return run("posthoc", lambda: begin([str(word) for word in words]))
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gamma", "1e200"], "Invalid gamma: 1e+200"),
        (["--sigma-rel", "0.1", "--picture", "p.xyz"], "Invalid picture: p.xyz"),
        (["--sigma-rel", "0.1", "0.1", "--out", "{out}"], "have both the file"),
    ],
)
def test_the_command_says_it_in_one_line(
    words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert status(main, folder, *(word.format(out=out) for word in words)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line and not captured.out and not out.exists()


# ---- merges --------------------------------------------------------------------------------------


def test_weights_whose_sum_is_infinite_are_divided_first(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"w": torch.ones(2)}, tmp_path / f"{name}.pt")
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    assert merge_files(files, tmp_path / "o.pt", weights=[1e308, 1e308]) == [0.5, 0.5]


def test_a_tensor_that_is_not_contiguous_is_copied_once(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "a.pt")
    source = Torchs(tmp_path / "a.pt", "")
    pieces = [source.read("w", first, 2) for first in (0, 2, 4)]
    assert torch.cat(pieces).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"w": torch.ones(2).to_sparse()}, "a.pt has w, which is sparse"),
        ({"w": torch.ones(2), "epoch": 3}, r"holds no state dict \(epoch is of int; expected"),
        ({"__metadata__": torch.ones(2)}, "Invalid name: '__metadata__'"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "no torch.complex128, which w is of"),
    ],
)
def test_what_a_merge_has_no_place_for_is_named(saved: Any, said: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        merge_files([tmp_path / "a.pt"], tmp_path / "o.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]


def test_unsigned_integers_are_merged(tmp_path: Path) -> None:
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        torch.save({"w": torch.tensor([1, 2]).to(dtype)}, tmp_path / "a.pt")
        merge_files([tmp_path / "a.pt"], tmp_path / "o.safetensors")
        assert Reader(tmp_path / "o.safetensors").read("w").tolist() == [1, 2]


def test_a_dtype_that_torch_has_not_is_named(tmp_path: Path) -> None:
    header = '{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}'
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(ValueError, match="has a of dtype F99"):
        Reader(file)


def test_the_latest_are_neither_last_ckpt_nor_an_earlier_merge(tmp_path: Path) -> None:
    for name in ("epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt", "mean-99.ckpt"):
        (tmp_path / name).write_bytes(b"")
    found = latest(tmp_path, 2, tmp_path / "mean-99.ckpt")
    assert [file.name for file in found] == ["epoch=1.ckpt", "epoch=2.ckpt"]


def test_a_folder_is_no_file_to_merge_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert status(merge_main, tmp_path / "a.pt", "--out", ".") == 2
    assert "Invalid out: . (expected a file, not a folder)" in capsys.readouterr().err
