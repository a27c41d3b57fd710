"""Averages beside others' optimizers under FSDP2, tensor parallelism, DDP and ZeRO-1."""

from __future__ import annotations

from pathlib import Path

import averager_jobs as jobs
import pytest
from beside import POLICIES
from ranks import ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "function"])
def test_shards_have_the_averages_of_a_plain_model(policy: str) -> None:
    ranks(2).run(jobs.sharded_as_alone, policy)


@pytest.mark.parametrize("world", [2, 4])
def test_shards_have_the_literal_average_on_every_rank(world: int) -> None:
    ranks(world).run(jobs.sharded_literally)


def test_a_sharded_teacher_follows_its_student() -> None:
    ranks(2).run(jobs.teacher_as_alone)


def test_a_teacher_that_is_sharded_otherwise_is_refused() -> None:
    for message in ranks(2).run(jobs.teacher_sharded_otherwise):
        assert "'0.weight') is sharded otherwise there (expected both alike)" in message


def test_what_an_evaluation_has_gathered_is_not_taken_for_the_weights() -> None:
    ranks(2).run(jobs.evaluated_before_a_sample)


def test_a_sample_communicates_nothing() -> None:
    ranks(2).run(jobs.no_collective_in_a_sample)


@pytest.mark.parametrize(("data", "across"), [(1, 2), (1, 4), (2, 2)])
def test_tensor_parallel_parameters_have_the_averages_of_plain_ones(data: int, across: int) -> None:
    ranks(data * across).run(jobs.tensor_parallel_as_alone, data, across)


@pytest.mark.parametrize("zero", [False, True], ids=["DDP", "ZeRO-1"])
@pytest.mark.parametrize("world", [2, 4])
def test_replicas_have_the_literal_average_on_every_rank(world: int, zero: bool) -> None:
    first, *others = ranks(world).run(jobs.replicated, zero)
    assert all(other == first for other in others)


def test_a_distributed_checkpoint_goes_on_with_other_ranks(tmp_path: Path) -> None:
    ranks(2).run(jobs.saved, tmp_path)
    expected = ranks(2).run(jobs.saved_averages)[0]
    assert expected[1] == 3
    for answer in ranks(4).run(jobs.loaded, tmp_path):
        assert answer == expected
