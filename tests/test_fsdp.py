"""FSDP2: a step moves the shards, averages are sharded like their parameters."""

from __future__ import annotations

from typing import Any

import pytest
import shards
import torch
from ranks import ranks
from runs import METHODS


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", [{}, {"backend": "reference"}], ids=["auto", "reference"])
def test_sharded_training_ends_with_the_bits_of_a_plain_model(
    world: int, options: dict[str, Any]
) -> None:
    for answer in ranks(world).run(shards.every_method, torch.float32, options):
        assert answer == dict.fromkeys(METHODS, {})
