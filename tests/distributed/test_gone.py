"""A rank that is killed or hangs: the others are told in time, keep what they have, and all of
them go on from the last checkpoint as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gone_jobs
import pytest
from gone_jobs import TIMEOUT
from ranks import RankError, Ranks, ranks

HOW = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
SLACK = 4  # seconds, of a busy machine


@pytest.fixture
def mortal() -> Iterator[Ranks]:
    """Two processes for one test."""
    fresh = Ranks(2)
    yield fresh
    fresh.stop()


def in_time(answer: dict[str, Any]) -> bool:
    return answer["seconds"] < TIMEOUT + SLACK


@pytest.mark.parametrize("how", HOW)
def test_a_rank_gone_in_backward_costs_the_steps_since_the_checkpoint_and_nothing_else(
    how: str, mortal: Ranks, tmp_path: Path
) -> None:
    survivor, lost = mortal.outcomes(gone_jobs.data_parallel, str(tmp_path), HOW[how], patience=40)
    assert isinstance(lost, RankError) and "died" in str(lost)
    assert isinstance(survivor, dict), survivor
    assert in_time(survivor) and survivor["kept"] and survivor["message"]
    resumed = ranks(2).run(gone_jobs.data_parallel, str(tmp_path), None)
    (tmp_path / "rank0.pt").unlink()
    assert resumed == ranks(2).run(gone_jobs.data_parallel, str(tmp_path), None)


@pytest.mark.parametrize("how", HOW)
def test_a_rank_gone_in_a_pull_leaves_the_weights_as_they_are_and_says_what_to_do(
    how: str, mortal: Ranks, tmp_path: Path
) -> None:
    survivor, lost = mortal.outcomes(gone_jobs.elastic, str(tmp_path), HOW[how], patience=40)
    assert isinstance(lost, RankError) and "died" in str(lost)
    assert isinstance(survivor, dict), survivor
    assert survivor["kept"]
    assert survivor["can be saved"] == [{"steps": gone_jobs.GONE - 1}, {"steps": 0}]
    for error in survivor["errors"]:
        assert in_time(error)
        assert "a process of the group has gone, or did not answer within" in error["message"]
        assert "of this rank" in error["message"] and "unchanged" in error["message"]
        assert "Restart all ranks from the last checkpoint" in error["message"]
        assert error["cause"] not in ("None", "")
    resumed = ranks(2).run(gone_jobs.elastic, str(tmp_path), None)
    for file in tmp_path.glob("*.pt"):
        file.unlink()
    assert resumed == ranks(2).run(gone_jobs.elastic, str(tmp_path), None)
