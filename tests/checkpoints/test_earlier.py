"""Checkpoints of earlier versions go on as they would have gone on there, bit for bit."""

from __future__ import annotations

from typing import Any

import earlier
import pytest
import torch

RUNS = {name: run for name, *run in earlier.runs()}
WRITTEN: dict[str, Any] = torch.load(earlier.FILE, weights_only=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_of_the_first_version_ends_with_the_bits_that_it_ended_with_there(
    name: str, backend: str
) -> None:
    model, opt = earlier.started(*RUNS[name][:2], {**RUNS[name][2], "backend": backend})
    saved = WRITTEN[name]
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    earlier.train(model, opt, earlier.SAVED + 1, earlier.END)
    assert earlier.ended(model, opt) == saved["end"]


def test_the_file_has_every_method_that_the_first_version_had() -> None:
    """Rules that came later are in no file of it."""
    assert len(WRITTEN) == 34 and RUNS.keys() >= WRITTEN.keys()
