"""DTensor parameters of tensor parallel layers, alone and sharded once more by FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensor_parallel_jobs as jobs
from ranks import ranks
from rules import ALGORITHMS


@pytest.mark.parametrize("rule", ALGORITHMS)
@pytest.mark.parametrize(("data", "across"), [(1, 2), (2, 2), (1, 4)])
def test_parallel_layers_step_and_average_with_the_bits_of_a_plain_one(
    data: int, across: int, rule: str
) -> None:
    for placements in ranks(data * across).run(jobs.same_bits_as_alone, data, across, rule):
        assert any("Shard(dim=1)" in p for p in placements), placements
        assert data == 1 or all("Shard" in p for p in placements)


def test_a_gradient_laid_out_otherwise_than_its_parameter_is_taken_whole() -> None:
    ranks(2).run(jobs.gradients_laid_out_otherwise)


def test_a_gradient_whose_collective_is_under_way_is_waited_for() -> None:
    ranks(2).run(jobs.gradients_under_way)


def test_a_checkpoint_of_a_2d_mesh_goes_on_with_other_meshes(tmp_path: Path) -> None:
    ranks(4).run(jobs.checkpoint, str(tmp_path))
