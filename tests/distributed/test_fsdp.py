"""FSDP2: a step moves the shards, averages are sharded like their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp_checkpoint_jobs
import fsdp_jobs
import pytest
import shards
import torch
from ranks import ranks
from rules import ALGORITHMS
from runs import METHODS, STEPS

import rbwa_fused as rf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")

STOP = 8  # by then every parameter has taken a step


@pytest.mark.parametrize(
    ("world", "dtype", "options"),
    [
        (2, torch.float32, {}),
        (4, torch.float32, {}),
        (2, torch.float32, {"backend": "reference"}),
        (2, torch.bfloat16, {}),
        (2, torch.bfloat16, {"master_weights": True}),
    ],
    ids=["2 ranks", "4 ranks", "reference", "bfloat16", "masters"],
)
def test_sharded_training_ends_with_the_bits_of_a_plain_model(
    world: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for answer in ranks(world).run(shards.every_method, dtype, options):
        assert answer == {method: {} for method in METHODS}


@pytest.mark.parametrize(
    "options",
    [
        *({"rule": rule, "lr": 0.01} for rule in ALGORITHMS),
        {"average": None},
        {"average": rf.mean(start=2)},
        {"average": rf.rbwa(2, 1)},
        {"average": rf.lookahead(2)},
        {"average": {"slow": rf.lookahead(2), "mean": rf.mean(start=2), "ema": rf.ema(0.5)}},
        {"average": rf.switch_ema(0.5, steps_per_epoch=3), "nesterov": True},
    ],
    ids=[*ALGORITHMS, "none", "mean", "rbwa", "lookahead", "several", "switch_ema"],
)
def test_forward_backward_and_step_on_two_ranks_are_those_of_one_process(
    options: dict[str, Any],
) -> None:
    ranks(2).run(fsdp_jobs.same_bits_as_alone, options)


def test_a_step_communicates_nothing_and_leaves_fsdps_memory_where_it_is() -> None:
    ranks(2).run(fsdp_jobs.no_collective_in_a_step)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_training_goes_on_after_an_evaluation_as_if_there_had_been_none(
    reshard_after_forward: bool,
) -> None:
    ranks(2).run(fsdp_jobs.evaluation_leaves_training_alone, reshard_after_forward)


@pytest.mark.parametrize("async_op", [False, True])
def test_what_was_gathered_ahead_is_gathered_anew_for_the_weights_that_are_live(
    async_op: bool,
) -> None:
    ranks(2).run(fsdp_jobs.gathered_ahead, async_op)


def test_the_training_weights_come_back_after_an_exception() -> None:
    ranks(2).run(fsdp_jobs.exception_in_evaluation)


def test_batch_norm_is_estimated_with_averaged_shards_and_comes_back() -> None:
    ranks(2).run(fsdp_jobs.batch_norm_statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_mixed_precision_averages_are_float32_shards(dtype: torch.dtype) -> None:
    ranks(2).run(fsdp_jobs.mixed_precision, dtype)


def test_gradients_clipped_by_their_norm_over_all_ranks_are_what_the_step_takes() -> None:
    ranks(2).run(fsdp_jobs.clipping)


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    ranks(2).run(fsdp_jobs.scaler_skips_everywhere)


@pytest.mark.parametrize("layout", fsdp_checkpoint_jobs.LAYOUTS)
@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    saving: int, loading: int, layout: str, tmp_path: Path
) -> None:
    alone, opt = shards.build("rsgdm ema", shards.plain)
    shards.train(alone, opt, 1, STOP)
    stopped = shards.result(alone, opt)
    shards.train(alone, opt, STOP + 1, STEPS)
    ended = shards.result(alone, opt)
    saved = in_ranks(saving, fsdp_checkpoint_jobs.save, str(tmp_path), STOP)
    assert saved == [stopped] * saving
    arguments = (str(tmp_path), layout, STOP + 1, STEPS)
    assert in_ranks(loading, fsdp_checkpoint_jobs.load, *arguments) == [(stopped, ended)] * loading


def in_ranks(world: int, job: Any, *args: Any) -> Any:
    """One rank is a plain model in this process, without any process group."""
    if world > 1:
        return ranks(world).run(job, *args)
    return [job(*args, make=shards.plain)]


def test_averaged_weights_saved_from_shards_load_into_a_plain_model(tmp_path: Path) -> None:
    ranks(2).run(fsdp_checkpoint_jobs.save, str(tmp_path), STOP)
    alone, opt = shards.build("rsgdm ema", shards.plain)
    shards.train(alone, opt, 1, STOP)
    averaged = opt.averaged_state_dict(alone)
    expected = {name: shards.bits(averaged[name]) for name, _ in alone.named_parameters()}
    assert fsdp_checkpoint_jobs.averaged_of(str(tmp_path)) == expected


def test_a_checkpoint_of_a_plain_run_loads_into_shards_as_it_is() -> None:
    ranks(2).run(fsdp_checkpoint_jobs.plain_checkpoint_into_shards)


def test_a_shard_that_fsdp_has_replaced_is_reached_where_it_is_now() -> None:
    ranks(2).run(fsdp_jobs.another_shard)


def test_what_shards_cannot_do_is_refused_in_plain_words() -> None:
    for found in ranks(2).run(fsdp_jobs.refusals):
        assert found == {
            "no model": "ValueError: averaged() of DTensor parameters needs their model, as in "
            "averaged(model): what FSDP has gathered of it must be freed",
            "another model": "ValueError: Invalid model: 8 of 8 DTensor parameters are not its own",
            "a part": "ValueError: Invalid model: 6 of 8 DTensor parameters are not its own",
            "a sum": "ValueError: parameter 0 is a DTensor whose shards are terms of a sum",
            "in_backward": "ValueError: in_backward=True does not go with DTensor parameters",
            "pull": "TypeError: replica 0: a DTensor among its tensors (expected shards: "
            "p.to_local())",
        }
