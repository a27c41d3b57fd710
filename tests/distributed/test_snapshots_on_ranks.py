"""Snapshots of shards, which each rank writes, and of replicas, which the first one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import snapshot_jobs as jobs
import torch
from ranks import ranks

from rbwa_fused.posthoc import synthesize
from rbwa_fused.posthoc.folder import snapshots_in
from rbwa_fused.posthoc.tensors import Reader

safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")


def test_each_rank_writes_its_shards_and_what_is_made_is_that_of_a_plain_model(
    tmp_path: Path,
) -> None:
    shards = ranks(2).run(jobs.sharded, tmp_path / "shards")
    ranks(2).run(jobs.plain, tmp_path / "plain")
    found = snapshots_in(tmp_path / "shards")
    assert len(found) == 2 * 2 * jobs.LENGTH // jobs.EVERY
    assert {(s.about.rank, s.about.world) for s in found} == {(0, 2), (1, 2)}
    for snapshot in found[-4:]:
        about = snapshot.about
        expected = shards[about.rank][0 if about.gamma and about.gamma > 10 else 1]
        read = safetensors.load_file(snapshot.reader.file)
        assert read.keys() == expected.keys()
        assert all(read[n].equal(expected[n]) for n in read)
    made = synthesize(tmp_path / "shards", sigma_rel=0.075, out=tmp_path / "made.safetensors")
    assert made.files == (tmp_path / "made.safetensors",)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["made.safetensors", "plain", "shards"]
    whole = synthesize(tmp_path / "plain", sigma_rel=0.075)
    assert whole.residual == made.residual and whole.state_dict is not None
    read = safetensors.load_file(made.files[0])
    assert read.keys() == whole.state_dict.keys()
    for name, tensor in whole.state_dict.items():
        assert read[name].equal(tensor), name
    with pytest.raises(ValueError, match=r"Invalid out: None .* sharded"):
        synthesize(tmp_path / "shards", sigma_rel=0.075)


@pytest.mark.parametrize(("data", "across"), [(1, 2), (2, 2)])
def test_tensor_parallel_shards_make_whole_tensors(data: int, across: int, tmp_path: Path) -> None:
    expected, *_ = ranks(data * across).run(jobs.tensor_parallel, tmp_path, data, across)
    made = synthesize(tmp_path, sigma_rel=0.1, out=tmp_path / "made.safetensors")
    read = safetensors.load_file(*made.files)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].shape == tensor.shape
        assert torch.allclose(read[name], tensor, rtol=0, atol=1e-6), name


def test_flat_shards_make_a_file_for_each_rank(tmp_path: Path) -> None:
    shards = ranks(2).run(jobs.flat, tmp_path)
    made = synthesize(tmp_path, sigma_rel=0.1, out=tmp_path / "made.safetensors")
    assert [f.name for f in made.files] == [f"made.rank-{r}-of-2.safetensors" for r in range(2)]
    for file, expected in zip(made.files, shards, strict=True):
        read = safetensors.load_file(file)
        assert read.keys() == expected.keys()
        assert all(torch.allclose(read[n], expected[n], rtol=0, atol=1e-6) for n in read)


def test_a_snapshot_that_a_rank_did_not_write_before_it_was_killed_is_left_out(
    tmp_path: Path,
) -> None:
    ranks(2).run(jobs.sharded, tmp_path)
    for snapshot in snapshots_in(tmp_path):
        if (snapshot.about.step, snapshot.about.rank) == (jobs.LENGTH, 1):
            snapshot.reader.file.unlink()
    made = synthesize(tmp_path, sigma_rel=0.1, out=tmp_path / "made.safetensors")
    assert made.step == jobs.LENGTH - jobs.EVERY
    for snapshot in snapshots_in(tmp_path):
        if snapshot.about.rank == 1:
            snapshot.reader.file.unlink()
    with pytest.raises(ValueError, match=r"no snapshots of ranks \[1\] of 2"):
        synthesize(tmp_path, sigma_rel=0.1, out=tmp_path / "made.safetensors")


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    ranks(2).run(jobs.sharded, tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    said = ranks(4).run(jobs.refused, tmp_path)
    assert all("is one of 2 shards, and this run has 4" in line for line in said)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_the_first_of_the_replicas_writes(tmp_path: Path) -> None:
    first, *others = ranks(2).run(jobs.replicated, tmp_path)
    assert len(first) == 4 and others == [[]]
    assert {file.name for file in tmp_path.iterdir()} == set(first)
    assert "0.weight" in Reader(tmp_path / first[0]).kinds
