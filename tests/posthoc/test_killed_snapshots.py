"""A run that is killed while it writes snapshots leaves whole ones, and goes on to the same bits.

RBWA_KILLS=50 kills that often at random moments; RBWA_SEED repeats the delays.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import mortal_walk
import pytest
from forked import Lives
from torch import Tensor

from rbwa_fused.posthoc.folder import snapshots_in
from rbwa_fused.posthoc.tensors import Reader

if not hasattr(os, "fork"):
    pytest.skip("mortal_walk.py forks", allow_module_level=True)

KILLS = int(os.environ.get("RBWA_KILLS", "5"))


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    started = Lives(Path(mortal_walk.__file__))
    yield started
    started.close()


def outcome(folder: Path) -> dict[str, dict[str, list[float]]]:
    """What a run has come to, and that each of its files is whole and of one run."""
    folder = folder / "snapshots"
    assert all(file.suffix == ".safetensors" for file in folder.iterdir())
    found = snapshots_in(folder)
    assert len({s.about.run for s in found}) == 1
    return {s.about.name: held(s.reader) for s in found}


def held(reader: Reader) -> dict[str, list[float]]:
    tensors: dict[str, Tensor] = {name: reader.read(name) for name in reader.kinds}
    return {name: t.tolist() for name, t in tensors.items()}


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("whole")
    lives.begin(folder=str(folder), count=None, written=None)
    assert lives.end() == 0
    found = outcome(folder)
    assert len(found) == 2 * mortal_walk.LENGTH // mortal_walk.EVERY
    return {**found}


def test_killed_in_a_write_and_behind_one_it_ends_with_the_same_files(
    lives: Lives, whole: dict[str, object], tmp_path: Path
) -> None:
    for count, written in ((2, 1), (1, 2), (1, None), (2, None), (3, 3), (5, 1)):
        lives.begin(folder=str(tmp_path), count=count, written=written)
        assert lives.end() == -SIGKILL
        inside = list((tmp_path / "snapshots").iterdir())
        assert any(file.suffix == ".part" for file in inside) == (written is not None)
        assert all(Reader(f) for f in inside if f.suffix == ".safetensors")
    lives.begin(folder=str(tmp_path), count=None, written=None)
    assert lives.end() == 0
    assert outcome(tmp_path) == whole


def test_killed_at_random_moments_it_ends_with_the_same_files(
    lives: Lives, whole: dict[str, object], tmp_path: Path
) -> None:
    seed = int(os.environ.get("RBWA_SEED", random.randrange(2**32)))
    print(f"RBWA_SEED={seed}")  # shown if it fails
    rng, kills, chain = random.Random(seed), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(chain)
        folder.mkdir()
        code = -SIGKILL
        while code != 0:
            life = lives.begin(folder=str(folder), count=None, written=None)
            if kills < KILLS:
                time.sleep(rng.uniform(0.0, 0.12))  # a whole life takes about 0.1 s
                os.kill(life, SIGKILL)
            code = lives.end()
            assert code in (0, -SIGKILL)
            kills += code != 0
        assert outcome(folder) == whole
        chain += 1
