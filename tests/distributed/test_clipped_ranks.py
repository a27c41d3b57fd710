"""clip_grad_norm_ on several ranks: DDP, ZeRO, FSDP2, hybrid shards, tensor parallel layers."""

from __future__ import annotations

import clipping_jobs as jobs
import pytest
from ddp_jobs import WAYS
from ranks import ranks


@pytest.mark.parametrize("way", WAYS)
def test_data_parallel_training_is_that_with_torchs_clipping(way: str) -> None:
    first, second = ranks(2).run(jobs.data_parallel, way)
    assert first == second


@pytest.mark.parametrize("view", [False, True])
def test_a_zero_optimizer_clips_by_all_gradients_and_communicates_nothing(view: bool) -> None:
    ranks(2).run(jobs.zero, view)


@pytest.mark.parametrize(
    ("world", "kind", "reductions"),
    [
        (2, "sharded", 1),
        (4, "sharded", 1),
        (4, "hybrid", 1),
        (2, "parallel 1 2", 3),  # two gradients come as terms of a sum
        (4, "parallel 2 2", 2),  # of gradients over one dimension of the mesh, and over both
    ],
)
def test_each_element_of_a_sharded_gradient_counts_once(
    world: int, kind: str, reductions: int
) -> None:
    """A replicated one that every rank adds would count twice."""
    for layouts in ranks(world).run(jobs.of_shards, kind, reductions):
        assert any("Shard" in layout for layout in layouts)
        replicated = any("Replicate" in layout for layout in layouts)
        assert replicated == (kind != "sharded")


def test_gradients_that_fsdp2_adds_to_are_noticed() -> None:
    ranks(2).run(jobs.accumulated_shards)


def test_terms_of_a_sum_and_fsdp1_are_refused() -> None:
    ranks(2).run(jobs.refused)
