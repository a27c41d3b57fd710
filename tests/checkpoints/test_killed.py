"""A process that is killed, in a step or in the write of a checkpoint, goes on bit for bit.

RBWA_KILLS=50 kills each run that often; RBWA_SEED repeats the delays. tests/studies/test_crash.py
kills comparisons of SGD's methods.
"""

from __future__ import annotations

import os
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import mortal
import pytest
import torch
from forked import Lives
from runs import Model, groups, train

if not hasattr(os, "fork"):
    pytest.skip("mortal.py forks", allow_module_level=True)

KILLS = int(os.environ.get("RBWA_KILLS", "5"))


class Runs(Lives):
    """Runs of mortal.py."""

    def start(self, method: str, folder: Path, *death: int | None) -> int:
        """Begins one, which may die by itself; returns its process id."""
        count, written = death or (None, None)
        return self.begin(method=method, folder=str(folder), count=count, written=written)

    def live(self, method: str, folder: Path, *death: int | None) -> int:
        """Returns the exit code of a whole one."""
        self.start(method, folder, *death)
        return self.end()


@pytest.fixture(scope="module")
def lives() -> Iterator[Runs]:
    started = Runs(Path(__file__).with_name("mortal.py"))
    yield started
    started.close()


def taken(folder: Path) -> int:
    """The steps that the checkpoint has."""
    file = folder / "checkpoint.pt"
    return int(torch.load(file, weights_only=True)["taken"]) if file.exists() else 0


def outcome(folder: Path) -> Any:
    return pickle.loads((folder / "result").read_bytes())


def never_stopped(method: str) -> Any:
    """What a run comes to that is neither killed nor saved, nor ever in eval mode."""
    made, dtype = mortal.METHODS[method]
    model = Model(dtype)
    opt = made(groups(model))
    train(model, opt, 1, mortal.STEPS)
    return mortal.seen(opt)


@pytest.mark.parametrize("method", mortal.METHODS)
def test_killed_in_a_write_and_behind_one_it_ends_with_the_same_bits(
    method: str, lives: Runs, tmp_path: Path
) -> None:
    """Each life dies at the count of its own writes: behind one in train mode, in the midst of one
    in eval mode, and the other way round."""
    expected = never_stopped(method)
    folder = tmp_path / "killed"
    folder.mkdir()
    has = 0
    for count, written in ((3, None), (3, 100), (3, None), (4, 1), (1, 0), (6, None)):
        assert lives.live(method, folder, count, written) == -SIGKILL
        has += count - (written is not None)
        assert taken(folder) == has
        assert (folder / "checkpoint.pt.tmp").exists() == (written is not None)
    assert lives.live(method, folder) == 0
    assert outcome(folder) == expected


@pytest.mark.parametrize("method", mortal.METHODS)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    method: str, lives: Runs, tmp_path: Path
) -> None:
    expected = never_stopped(method)
    seed = int(os.environ.get("RBWA_SEED", random.randrange(2**32)))
    print(f"RBWA_SEED={seed}")  # shown if it fails
    rng = random.Random(seed)
    kills = chain = 0
    midst = set()
    while kills < KILLS:
        folder = tmp_path / str(chain)
        folder.mkdir()
        code = -SIGKILL
        while code != 0:
            before = taken(folder)
            life = lives.start(method, folder)
            if kills < KILLS:
                wanted = min(before + rng.randint(1, mortal.STEPS // 4), mortal.STEPS)
                deadline = time.monotonic() + 60
                while taken(folder) < wanted and time.monotonic() < deadline:
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0.0, 0.003))  # about a step and its write
                os.kill(life, SIGKILL)
            code = lives.end()
            assert code in (0, -SIGKILL)
            kills += code != 0
            midst.add(taken(folder))
        assert outcome(folder) == expected
        chain += 1
    assert midst - {0, mortal.STEPS}, "no life was killed between its first step and its last"
