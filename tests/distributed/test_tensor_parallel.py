"""DTensor parameters of tensor parallel layers, alone and sharded once more by FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensor_parallel_jobs as jobs
import torch
from ranks import ranks
from rules import ALGORITHMS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import rbwa_fused as rf


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


@pytest.mark.parametrize("how", ["another tensor", "another shard in it"])
def test_a_program_may_replace_the_state_of_a_shard(how: str, process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    zeros, ones, fours = (
        distribute_tensor(torch.full((4,), value), mesh, [Shard(0)]) for value in (0.0, 1.0, 4.0)
    )
    p = nn.Parameter(zeros)
    opt = rf.FusedSGD([p], lr=1.0, momentum=0.5)
    p.grad = ones
    opt.step()
    if how == "another tensor":
        opt.state[p]["momentum_buffer"] = fours
    else:
        opt.state[p]["momentum_buffer"]._local_tensor = fours.to_local()
    opt.step()
    assert opt.state[p]["momentum_buffer"].full_tensor().tolist() == [3.0] * 4
    assert p.full_tensor().tolist() == [-4.0] * 4
