"""transformers' Trainer on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import ranks

jobs = pytest.importorskip("trainer_jobs", reason="needs transformers")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")


def test_every_rank_of_ddp_evaluates_and_goes_on_with_the_same_averages(tmp_path: Path) -> None:
    first, second = ranks(2).run(jobs.replicated, tmp_path)
    assert first == second


def test_sharded_weights_are_refused() -> None:
    for message in ranks(2).run(jobs.sharded):
        assert message == "AveragedWeights does not work with DTensor parameters"
