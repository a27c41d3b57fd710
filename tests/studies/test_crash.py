"""Killed at any moment and started again, a comparison ends with the bits of one that never was.

RBWA_KILLS=500 kills more often, and in more kinds of comparison; RBWA_SEED repeats the delays.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import pytest
import torch
from forked import Lives
from runs import bits

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
if not hasattr(os, "fork"):
    pytest.skip("lives.py forks", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
LIVES = Path(__file__).with_name("lives.py")
KILLS = int(os.environ.get("RBWA_KILLS", "5"))
KILLS_A_CHAIN = 5  # about: then a comparison comes to its end, and another begins
METHODS = ("rsgdm", "swa", "ema", "rbwa", "rbwa-e")
STEPS = 29  # an epoch, of 48 images each
SMALL = (
    *("--checkpoint-every", "2", "--epochs", "2", "--batch-size", "48", "--seeds", "1"),
    *("--method", ",".join(METHODS)),
)
COMPARISONS = (
    SMALL,
    (
        *("--checkpoint-every", "5", "--epochs", "3", "--seeds", "2", "--model", "mlp"),
        *("--method", "momentum,rswa,lookahead,rbwa-algorithm2,rbwa-control", "--momentum", "0.8"),
        *("--dtype", "float64", "--start-epoch", "0"),
    ),
    ("--checkpoint-every", "1", "--epochs", "2", "--seeds", "7,", "--threads", "2"),
)
Death = tuple[str, int, str, int]  # see lives.py


class Comparisons(Lives):
    """Comparisons of lives.py."""

    def start(self, options: tuple[str, ...], folder: Path, death: Death | None = None) -> int:
        """Begins one that writes into a folder, and may die by itself; returns its process id."""
        notes = notes_of(folder)
        notes.mkdir(exist_ok=True)
        options = (*options, "--out", str(folder))
        return self.begin(options=options, notes=str(notes), death=death)

    def live(self, options: tuple[str, ...], folder: Path, death: Death | None = None) -> int:
        """Returns the exit code of a whole one."""
        self.start(options, folder, death)
        return self.end()


def notes_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name} notes")


def printed(folder: Path) -> list[str]:
    return (notes_of(folder) / "printed").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def lives() -> Iterator[Comparisons]:
    started = Comparisons(LIVES)
    yield started
    started.close()


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a comparison comes to, and the writes that `see_writes` sees of it."""

    @cache
    def once(options: tuple[str, ...]) -> tuple[dict[str, Any], int]:
        folder = tmp_path_factory.mktemp("never_killed") / "out"
        own = Comparisons(LIVES)  # memory lies elsewhere than in the lives that are killed
        own.start(options, folder)
        seen = see_writes(folder, {}, 10**6)
        code = own.end()
        own.close()
        assert code == 0, printed(folder)[-1]
        return outcome(folder), seen

    return once


def digest(value: Any) -> Any:
    """The same with bits, dtype and shape in place of tensors."""
    if isinstance(value, dict):
        return {key: digest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [digest(item) for item in value]
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {bits(value)}"
    return value


def state(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)["state"]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def is_complete(folder: Path) -> bool:
    return (folder / "results.json").exists() and results(folder)["complete"]


def outcome(folder: Path) -> dict[str, Any]:
    """Figures, the last state, and every run's last state if lives.py has copied it: weights,
    buffers, momentum, averages, counters, and the generator that orders the batches."""
    known = results(folder)
    assert known["complete"] is True
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    left = {path.name for path in folder.iterdir()}
    assert left == {"results.json", "checkpoint.pt", "curves.png"}
    found = {key: known[key] for key in ("settings", "runs")}
    found["last"] = digest(state(folder / "checkpoint.pt"))
    copied = [file for file in notes_of(folder).glob("*") if file.name != "printed"]
    return found | {file.name: digest(state(file)) for file in copied}


def written(folder: Path) -> dict[str, int]:
    """Tells a file from one that replaced it."""
    files = [folder / name for name in ("results.json", "checkpoint.pt")]
    return {file.name: file.stat().st_mtime_ns for file in files if file.exists()}


def see_writes(folder: Path, known: dict[str, int], wanted: int) -> int:
    """Waits until that many writes were seen, or the last one. Returns how many."""
    seen, patience = 0, time.monotonic() + 120  # a busy machine imports for long
    while seen < wanted and time.monotonic() < patience:
        if (now := written(folder)) != known:
            seen, known = seen + 1, now
            if is_complete(folder):
                break
        time.sleep(0.002)
    return seen


def place(folder: Path) -> str:
    """Where a life was when it was killed, by what it left."""
    if not (folder / "results.json").exists():
        return "at the beginning"
    finished = len(results(folder)["runs"])
    if not (folder / "checkpoint.pt").exists():
        return f"before the first checkpoint: {finished} runs"
    left = state(folder / "checkpoint.pt")
    at = f"{finished} runs, {left['run']['method']}, epoch {left['epoch']}, batch {left['batch']}"
    return f"{'mid-epoch' if left['batch'] > 0 else 'between epochs'}: {at}"


def test_the_last_states_hold_all_that_a_crash_could_lose(never_killed: Any) -> None:
    """What the comparisons of bits below would not miss if it were in neither of the two."""
    found, _ = never_killed(SMALL)
    assert found.keys() == {"settings", "runs", "last", *(f"{name}.0" for name in METHODS)}
    for name in METHODS:
        last = found[f"{name}.0"]
        assert (last["epoch"], last["batch"], len(last["run"]["test_loss"])) == (2, 0, 2)
        assert any(key.endswith("running_var") for key in last["model"])
        for held in last["optimizer"]["state"].values():
            assert "momentum_buffer" in held
            assert ("average" in held) == (name in ("swa", "ema"))
        (group,) = last["optimizer"]["param_groups"]
        assert group["step"] == 2 * STEPS
        assert (group["n_averaged"] > 0) == (name != "rsgdm")


def test_killed_at_random_moments_it_ends_with_the_same_bits(
    never_killed: Any, lives: Comparisons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("RBWA_SEED", random.randrange(2**32)))
    print(f"RBWA_SEED={seed}")  # shown if it fails, as are the kills
    rng = random.Random(seed)
    hits: Counter[str] = Counter()
    chain = 0
    while hits["kills"] < KILLS:
        options = COMPARISONS[chain % len(COMPARISONS)]
        expected, writes = never_killed(options)
        print(f"{chain}: {writes} writes seen of the comparison that is not killed")
        folder = tmp_path / str(chain)
        code = -SIGKILL
        while code != 0:
            known, complete = written(folder), is_complete(folder)
            life = lives.start(options, folder)
            if hits["kills"] < KILLS and not complete:
                if rng.random() < 0.15:  # while it loads what the last one left
                    time.sleep(rng.uniform(0.0, 0.1))
                else:
                    wanted = rng.randint(1, 3 * writes // (2 * KILLS_A_CHAIN))
                    if see_writes(folder, known, wanted) < wanted:
                        time.sleep(rng.uniform(0.0, 1.0))  # while it draws
                    time.sleep(rng.uniform(0.0, 0.02))  # two batches, a write between them
                os.kill(life, SIGKILL)
            code = lives.end()
            assert code in (0, -SIGKILL), printed(folder)[-1]
            if code != 0:
                hits["kills"] += 1
                print(f"{chain}: {place(folder)}")
                hits[place(folder).split(":")[0]] += 1
                hits["while writing"] += any(folder.glob("*.tmp"))
        assert outcome(folder) == expected
        chain += 1
    with capsys.disabled():
        print(f"\n{chain} comparisons, {dict(hits)} ", end="")
    assert hits["mid-epoch"] >= max(1, KILLS // 4)


# how a life dies, what it leaves, and where the next one says that it goes on
FIRST: list[tuple[Death, set[str], str | None]] = [
    (("results.json", 1, "before", SIGKILL), {"tmp"}, None),
    (
        ("results.json", 1, "after", SIGKILL),
        {"results.json"},
        "0 of 5 runs with rsgdm, seed 0, from its start",
    ),
    (
        ("checkpoint.pt", 1, "before", SIGKILL),
        {"results.json", "tmp"},
        "0 of 5 runs with rsgdm, seed 0, from its start",
    ),
    (
        ("checkpoint.pt", 20, "before", SIGKILL),
        {"results.json", "checkpoint.pt", "tmp"},
        "0 of 5 runs with rsgdm, seed 0, after 1 of 2 epochs and 7 of 29 batches",
    ),
    (  # the run is finished in one file and not yet in the other
        ("results.json", 1, "before", SIGKILL),
        {"results.json", "checkpoint.pt", "tmp"},
        "0 of 5 runs with rsgdm, seed 0, after 2 of 2 epochs",
    ),
    (  # in both
        ("results.json", 1, "after", SIGKILL),
        {"results.json", "checkpoint.pt"},
        "1 of 5 runs with swa, seed 0, from its start",
    ),
    (
        ("checkpoint.pt", 1, "after", SIGKILL),
        {"results.json", "checkpoint.pt"},
        "1 of 5 runs with swa, seed 0, after 0 of 2 epochs and 2 of 29 batches",
    ),
    (
        ("checkpoint.pt", 17, "before", SIGINT),
        {"results.json", "checkpoint.pt"},
        "1 of 5 runs with swa, seed 0, after 1 of 2 epochs and 3 of 29 batches",
    ),
    (  # where there are samples in the average
        ("checkpoint.pt", 38, "after", SIGKILL),
        {"results.json", "checkpoint.pt"},
        "2 of 5 runs with ema, seed 0, after 1 of 2 epochs and 19 of 29 batches",
    ),
]


def test_stopped_between_two_writes_it_neither_loses_nor_doubles_a_run(
    never_killed: Any, lives: Comparisons, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    times = {}
    for death, left, _ in FIRST:
        code = lives.live(SMALL, folder, death)
        assert code == (-SIGKILL if death[3] == SIGKILL else 130)
        found = [path.name for path in folder.iterdir()]
        assert {"tmp" if name.endswith(".tmp") else name for name in found} == left
        assert len(found) == len(left)  # what earlier lives left behind is swept
        if "results.json" in left:
            times = times or results(folder)["times"]
            assert results(folder)["times"] == times  # measured once
    note = "digits: interrupted: 1 of 5 runs finished, the same command goes on from there"
    assert note in printed(folder)
    assert lives.live(SMALL, folder) == 0
    assert [line for line in printed(folder) if " going on " in line] == [
        f"digits: going on after {place}" for _, _, place in FIRST if place is not None
    ]
    assert outcome(folder) == never_killed(SMALL)[0]
    assert results(folder)["times"] == times != {}

    # Complete, it is drawn again and not trained again.
    lines = printed(folder)
    before = written(folder)
    (folder / "curves.png").write_bytes(b"half a pic")  # killed while it was drawn
    assert lives.live(SMALL, folder) == 0
    assert written(folder) == before
    assert outcome(folder) == never_killed(SMALL)[0]
    note, *table = printed(folder)[len(lines) :]
    assert note == "digits: complete before; the table and the picture are drawn anew"
    assert len(table) > 10 and table == lines[-len(table) :]


def test_a_diverged_run_is_still_one_after_a_crash(lives: Comparisons, tmp_path: Path) -> None:
    """Its nan is null in results.json, and must be known again."""
    folder = tmp_path / "out"
    options = (
        *("--method", "sgd,momentum", "--lr", "1e20", "--epochs", "1", "--model", "mlp"),
        *("--seeds", "1", "--checkpoint-every", "9"),
    )
    assert lives.live(options, folder, ("results.json", 2, "after", SIGKILL)) == -SIGKILL
    assert lives.live(options, folder) == 0
    assert [run["test_loss"] for run in results(folder)["runs"]] == [[None], [None]]
    assert sum("nan" in line for line in printed(folder)) == 3  # the second run, two rows
    assert math.isnan(state(folder / "checkpoint.pt")["run"]["test_loss"][0])


def test_the_command_itself_goes_on_in_another_process(never_killed: Any, tmp_path: Path) -> None:
    """Nothing forked: two starts of the interpreter, as a user has them."""
    folder = tmp_path / "out"
    command = (sys.executable, "-m", "studies.digits", *SMALL, "--out", str(folder))
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        see_writes(folder, {}, 30)
        process.kill()
    assert process.returncode == -SIGKILL
    again = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stderr.startswith("digits: going on after ")
    expected = never_killed(SMALL)[0]
    assert outcome(folder) == {key: expected[key] for key in ("settings", "runs", "last")}
