"""Checkpoints of earlier versions go on as they would have gone on there, bit for bit."""

from __future__ import annotations

from typing import Any

import earlier
import pytest
import torch

RUNS = {name: run for name, *run in earlier.runs()}


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(earlier.FILE, weights_only=True)
    return saved


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_first_version_ends_with_the_bits_that_it_ended_with_there(
    name: str, backend: str, written: dict[str, Any]
) -> None:
    model, opt = earlier.started(*RUNS[name][:2], {**RUNS[name][2], "backend": backend})
    saved = written[name]
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    earlier.train(model, opt, earlier.SAVED + 1, earlier.END)
    assert earlier.ended(model, opt) == saved["end"]


def test_every_run_is_in_the_file(written: dict[str, Any]) -> None:
    assert written.keys() == RUNS.keys()
