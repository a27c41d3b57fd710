"""Schedule-free optimizers under ZeroRedundancyOptimizer: two modes, on all ranks at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import modes_jobs
import pytest
import torch
from gone_jobs import TIMEOUT
from modes_jobs import OPTIONS, alone, of_bytes
from ranks import RankError, Ranks, ranks
from test_gone import SLACK

import rbwa_fused as rf

IN_EVAL_MODE = "RuntimeError: step() in eval mode (expected train() before it)"
CLASSES = [rf.SGDScheduleFree, rf.AdamWScheduleFree]
PROGRAM = (
    *("eval", "train", "step", "step", "averaged", "eval", "eval", "averaged", "train", "train"),
    *("step", "blended", "lr", "step", "eval", "train", "step", "averaged", "step"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def agree(answers: Sequence[Any], seen: list[Any], whole: modes_jobs.Run) -> bytes:
    """Every rank has seen what one process has. Returns a checkpoint of the last."""
    for answer in answers:
        for ours, _ in answer:
            assert ours == seen
    expected = of_bytes(whole.bytes())
    for _, saved in answers[-1]:
        assert of_bytes(saved) == expected
    first, second = answers[-1]
    assert first[1] is not None and second[1] is not None
    return bytes(first[1])


@pytest.mark.filterwarnings("ignore:schedule-free steps of 16-bit")
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_modes_reach_the_weights_of_all_ranks_and_give_the_training_bits_back(
    name: str, world: int
) -> None:
    words = [*PROGRAM, *(("beside",) if name == "averaged" else ())]
    seen, whole = alone(name, words)
    states = dict(zip(words, (weights for _, _, weights in seen), strict=True))
    assert states["eval"] != states["train"] != states["step"]
    agree(ranks(world).run(modes_jobs.programmed, name, words), seen, whole)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "averaged"])
def test_checkpoints_of_either_mode_go_on_with_other_ranks_and_alone(name: str, mode: str) -> None:
    before = ["train", "step", "step", "step", mode]
    after = ["averaged", "train", "step", "eval", "train", "step", "averaged", mode]
    seen, whole = alone(name, before)
    saved = agree(ranks(2).run(modes_jobs.programmed, name, before), seen, whole)
    seen, resumed = alone(name, after, saved)
    saved_later = agree(ranks(4).run(modes_jobs.programmed, name, after, saved), seen, resumed)
    assert of_bytes(saved_later) == of_bytes(alone(name, [*before, *after])[1].bytes())
    answers = ranks(2).run(modes_jobs.programmed, name, after, whole.bytes())
    agree(answers, seen, resumed)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_group_that_is_added_gets_the_mode_of_all(mode: str) -> None:
    words = ["train", "step", mode, "late", "train", "step", "eval", "train", "step"]
    seen, whole = alone("sgd", words)
    agree(ranks(2).run(modes_jobs.programmed, "sgd", words), seen, whole)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_one_rank_alone_has_stepped_is_counted_on_all(name: str) -> None:
    """The others' next c would be another one."""
    words = ["train", "part", "step", "part", "part", "step", "eval", "train", "step"]
    seen, whole = alone(name, words)
    answers = ranks(2).run(modes_jobs.counted, name, words)
    for ours, groups in answers:
        assert ours == seen
        assert groups == [
            {key: group[key] for key in groups[0]} for group in whole.opt.param_groups
        ]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_in_eval_mode_raises_on_all_ranks_and_sends_nothing(name: str) -> None:
    for answer in ranks(2).run(modes_jobs.not_trained, name):
        assert answer["errors"] == [IN_EVAL_MODE] * 2
        assert answer["kept"]


def test_torchs_own_class_raises_and_an_optimizer_without_modes_has_none() -> None:
    first, second = ranks(2).run(modes_jobs.torchs)
    assert first == second
    assert first["step"] == IN_EVAL_MODE
    assert first["untouched"] and first["averaged"]
    assert first["modes"] == first["without modes"] == [False, False]
    assert first["asked"] == "AttributeError: FusedSGD has no eval()"


def test_modes_and_steps_are_refused_inside_averaged_before_anything_is_sent() -> None:
    for answer in ranks(2).run(modes_jobs.refusals):
        for what in ("train", "eval", "step"):
            assert answer[f"{what} inside"].startswith(f"RuntimeError: {what}() inside averaged()")
        assert answer["live"] == answer["exactly"] == "True"
        for what, call in (("beside", "which='average'"), ("blended", "blend=0.25")):
            assert answer[what].startswith(f"RuntimeError: averaged({call}) in eval mode")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cls", CLASSES)
def test_batchnorm_is_estimated_anew_for_x(cls: Any, mode: str) -> None:
    expected = modes_jobs.estimated(cls, mode, False)
    assert expected["exactly"]
    assert ranks(2).run(modes_jobs.estimated, cls, mode, True) == [expected] * 2


def test_autograd_is_told_that_weights_of_other_ranks_have_changed() -> None:
    assert ranks(2).run(modes_jobs.told) == [True, True]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_rank_that_is_gone_leaves_weights_and_mode_as_they_are(mode: str) -> None:
    mortal = Ranks(2)
    survivor, lost = mortal.outcomes(modes_jobs.gone, mode, patience=40)
    mortal.stop()
    assert isinstance(lost, RankError) and isinstance(survivor, dict), survivor
    assert survivor["seconds"] < TIMEOUT + SLACK and survivor["kept"]
    assert survivor["train_mode"] is (mode == "eval")
    assert f"{mode}: a process of the group has gone" in survivor["message"]
    assert "The weights of this rank are unchanged. Restart all ranks" in survivor["message"]
