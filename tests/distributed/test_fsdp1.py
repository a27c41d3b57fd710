"""FullyShardedDataParallel (FSDP1): evaluated averages stay out of training, as under FSDP2."""

from __future__ import annotations

from typing import Any

import fsdp1_jobs
import pytest
from ranks import ranks
from rules import ALGORITHMS
from torch.distributed.fsdp import StateDictType

import rbwa_fused as rf


@pytest.mark.parametrize("kind", fsdp1_jobs.KINDS)
def test_training_goes_on_after_an_evaluation_as_if_there_had_been_none(kind: str) -> None:
    ranks(2).run(fsdp1_jobs.evaluation_leaves_training_alone, kind)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in fsdp1_jobs.KINDS if kind != "bfloat16 compute"),
        *(("full shard", {"rule": rule, "lr": 0.01}) for rule in ALGORITHMS if rule != "momentum"),
        ("full shard", {"average": rf.rbwa(2, 1)}),
        ("full shard", {"average": rf.lookahead(2)}),
        ("flat parameters", {"average": rf.mean(start=2), "flatten": False}),
    ],
)
def test_two_ranks_train_and_average_as_one_process(kind: str, options: dict[str, Any]) -> None:
    ranks(2).run(fsdp1_jobs.same_bits_as_alone, kind, options)


def test_parameters_stay_in_the_memory_that_fsdp_points_them_to() -> None:
    ranks(2).run(fsdp1_jobs.memory_stays_fsdps)


def test_averages_of_a_loaded_checkpoint_are_evaluated_before_anything_has_run() -> None:
    ranks(2).run(fsdp1_jobs.before_the_first_forward)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_checkpoint_by_fsdps_own_functions_goes_on_bit_for_bit(use_orig_params: bool) -> None:
    ranks(2).run(fsdp1_jobs.checkpoint_goes_on, use_orig_params)


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    ranks(2).run(fsdp1_jobs.scaler_skips_everywhere)


def test_batch_norm_is_estimated_with_averaged_shards_and_comes_back() -> None:
    ranks(2).run(fsdp1_jobs.batch_norm_statistics)


def test_the_training_weights_come_back_after_an_exception() -> None:
    ranks(2).run(fsdp1_jobs.exception_in_evaluation)


@pytest.mark.filterwarnings("ignore:.*FSDP.state_dict_type:FutureWarning")
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"])
def test_averages_of_one_of_two_models_are_saved_in_each_form(kind: str) -> None:
    ranks(2).run(fsdp1_jobs.one_of_two_models, StateDictType[kind])


def test_gathered_weights_inside_the_context_are_averages() -> None:
    ranks(2).run(fsdp1_jobs.summoned, True)


def test_averages_inside_gathered_weights_are_refused_not_lost_with_the_weights() -> None:
    for found in ranks(2).run(fsdp1_jobs.summoned, False):
        assert len(found) == 4
        for answer in found:
            assert answer.startswith("RuntimeError: averaged weights inside FullyShardedDataParal")


def test_what_would_be_wrong_under_fsdp1_is_refused_in_plain_words() -> None:
    for found in ranks(2).run(fsdp1_jobs.refusals):
        assert found == {
            "no model": "ValueError: averaged() of FullyShardedDataParallel parameters needs their "
            "model, as in averaged(model): what FSDP has gathered of it must be freed",
            "another model": "ValueError: Invalid model: 8 of 8 FullyShardedDataParallel "
            "parameters are not its own",
            "what the root wraps": "ValueError: Invalid model: 6 of 8 FullyShardedDataParallel "
            "parameters are not its own",
            "in_backward": "ValueError: in_backward=True does not go with "
            "FullyShardedDataParallel parameters",
            "pull": "TypeError: replica 0: a FullyShardedDataParallel parameter among its tensors "
            "(expected shards: p.detach())",
            "synchronize": "TypeError: Invalid opt: it has FullyShardedDataParallel parameters, "
            "whose ranks differ in their state",
        }
