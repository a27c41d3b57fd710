"""studies.digits beside files that it cannot go on with: one line, and not a byte is changed."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    *("--method", "rsgdm,ema", "--model", "mlp", "--epochs", "2", "--batch-size", "128"),
    *("--seeds", "1", "--checkpoint-every", "3"),
)
STOP = 13  # writes: results.json twice, 4 + 5 checkpoints in rsgdm's epochs, 2 in ema's first
Main = Callable[..., int]


@pytest.fixture(scope="module")
def main() -> Iterator[Main]:
    """The program's `main` in this process, whose number of threads it gets back."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from studies.digits.__main__ import main

        yield lambda folder, *options: main((*options, "--out", str(folder)))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stopped(main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison stopped in its second run."""
    folder = tmp_path_factory.mktemp("stopped")
    writes = 0
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        nonlocal writes
        writes += 1
        replace(source, target)
        if writes == STOP:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert main(folder, *OPTIONS) == 130
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [run["method"] for run in results["runs"]] == ["rsgdm"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert (state["run"]["method"], state["epoch"], state["batch"]) == ("ema", 0, 6)
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {p.name: p.read_bytes() if p.is_file() else None for p in sorted(folder.iterdir())}


class Code:
    """A pickle of it calls a function where it is loaded without care."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def becomes(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The file with other content."""

    def become(file: Path) -> None:
        file.write_bytes(content(file.read_bytes()))

    return become


def edited(*path: str | int, value: Any) -> Callable[[Path], None]:
    """The file with another value in it."""

    def edit(file: Path) -> None:
        binary = file.suffix == ".pt"
        whole = torch.load(file, weights_only=True) if binary else json.loads(file.read_bytes())
        inner = whole
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        file.write_bytes(saved(whole) if binary else json.dumps(whole).encode())

    return edit


def cut(part: float) -> Callable[[Path], None]:
    return becomes(lambda content: content[: int(part * len(content))])


def into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FOREIGN = "is damaged, or not a file of studies.digits"
OTHER = "was written with other settings"
NOISE = random.Random(0).randbytes(5000)
# file, what has become of it, what is said about it
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    **{f"cut to {part}": ("checkpoint.pt", cut(part), FOREIGN) for part in (0.02, 0.5, 0.9, 0.999)},
    "empty": ("checkpoint.pt", cut(0), FOREIGN),
    "noise": ("checkpoint.pt", becomes(lambda _: NOISE), FOREIGN),
    "like a zip file": ("checkpoint.pt", becomes(lambda _: b"PK\3\4" + NOISE), FOREIGN),
    "like a pickle": (
        "checkpoint.pt",
        becomes(lambda _: b"\x80\2" + NOISE),
        FOREIGN,
    ),
    "text": ("checkpoint.pt", becomes(lambda _: b"not a checkpoint\n"), FOREIGN),
    "the results": (
        "checkpoint.pt",
        lambda file: shutil.copy(file.with_name("results.json"), file),
        FOREIGN,
    ),
    "a plain pickle": ("checkpoint.pt", becomes(lambda _: pickle.dumps({"state": {}})), FOREIGN),
    "a tensor": ("checkpoint.pt", becomes(lambda _: saved(torch.ones(3))), FOREIGN),
    "a state dict": (
        "checkpoint.pt",
        becomes(lambda _: saved(torch.nn.Linear(2, 2).state_dict())),
        FOREIGN,
    ),
    "a module": ("checkpoint.pt", becomes(lambda _: saved(torch.nn.Linear(2, 2))), FOREIGN),
    "a folder": ("checkpoint.pt", into_folder, "cannot be read (Is a directory)"),
    "without its model": ("checkpoint.pt", edited("state", value={}), FOREIGN),
    "with another model": ("checkpoint.pt", edited("state", "model", value={}), "does not fit"),
    "with another optimizer": (
        "checkpoint.pt",
        edited("state", "optimizer", "param_groups", 0, "rule", value="rsgdm_implicit"),
        "does not fit",
    ),
    "without the order": ("checkpoint.pt", edited("state", "order", value=None), "does not fit"),
    "beyond its epoch": ("checkpoint.pt", edited("state", "batch", value=11), FOREIGN),
    "beyond its figures": ("checkpoint.pt", edited("state", "epoch", value=1), FOREIGN),
    "of another run": (
        "checkpoint.pt",
        edited("state", "run", "method", value="sgd"),
        FOREIGN,
    ),
    "with half of a setting": ("checkpoint.pt", edited("settings", "lr", value=0.015), OTHER),
    "without settings": ("checkpoint.pt", edited("settings", value={}), OTHER),
    "without results": (
        "checkpoint.pt",
        lambda file: file.with_name("results.json").unlink(),
        "lacks the results.json that belongs to it",
    ),
    "results cut": ("results.json", cut(0.5), FOREIGN),
    "results empty": ("results.json", cut(0), FOREIGN),
    "results in noise": ("results.json", becomes(lambda _: NOISE), FOREIGN),
    "results a list": ("results.json", becomes(lambda _: b"[]"), FOREIGN),
    "results too deep": ("results.json", becomes(lambda _: b"[" * 10**5), FOREIGN),
    "results a folder": ("results.json", into_folder, "cannot be read (Is a directory)"),
    "results of others": ("results.json", edited("settings", "seeds", value=[1]), OTHER),
    "results without times": ("results.json", edited("times", value={"ema": {}}), FOREIGN),
    "results with words": ("results.json", edited("runs", 0, "test_loss", 0, value="0"), FOREIGN),
    "results too short": ("results.json", edited("runs", 0, "test_loss", value=[0.5]), FOREIGN),
    "results out of order": ("results.json", edited("runs", 0, "method", value="ema"), FOREIGN),
    "results of another torch": (
        "results.json",
        edited("versions", "torch", value="2.10.0"),
        f"was begun with torch '2.10.0', now '{torch.__version__}'",
    ),
    "results of another machine": (
        "results.json",
        edited("cpu", value="Z80"),
        "was begun with cpu 'Z80', now ",
    ),
    "results too early": (
        "results.json",
        edited("runs", value=[]),
        "does not belong to checkpoint.pt beside it",
    ),
}


def refused(main: Main, folder: Path, options: tuple[str, ...], capsys: Any) -> str:
    """The one line with which it refuses; nothing is changed."""
    capsys.readouterr()
    before = contents(folder)
    assert main(folder, *options) == 1
    out, line = capsys.readouterr()
    assert out == ""
    assert line.count("\n") == 1
    assert contents(folder) == before
    return line


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_gone_on_with_is_named_and_kept(
    kind: str, main: Main, folder: Path, capsys: Any
) -> None:
    name, change, words = BAD[kind]
    change(folder / name)
    line = refused(main, folder, OPTIONS, capsys)
    assert line.startswith(f"digits: error: {folder / name} {words}")
    assert line.endswith("; delete it or choose another --out\n")


def test_code_in_a_checkpoint_is_not_run(main: Main, folder: Path, capsys: Any) -> None:
    canary = folder.parent / "canary"
    for content in (saved(Code(canary)), pickle.dumps(Code(canary))):
        (folder / "checkpoint.pt").write_bytes(content)
        assert f"checkpoint.pt {FOREIGN}" in refused(main, folder, OPTIONS, capsys)
        assert not canary.exists()
    pickle.loads(content)
    assert canary.exists()  # it would have


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--lr", "0.04"), "lr 0.03, now 0.04"),
        (("--epochs", "3"), "epochs 2, now 3"),
        (("--method", "sgd"), "methods ['rsgdm', 'ema'], now ['sgd', 'rsgdm', 'ema']"),
        (("--seeds", "2"), "seeds [0], now [0, 1]"),
        (("--threads", "2"), "threads 1, now 2"),
        (("--dtype", "float64"), "dtype 'float32', now 'float64'"),
    ],
)
def test_another_setting_is_named_and_nothing_overwritten(
    option: tuple[str, ...], words: str, main: Main, folder: Path, capsys: Any
) -> None:
    for name in ("checkpoint.pt", "results.json"):
        line = refused(main, folder, (*OPTIONS, *option), capsys)
        assert line.startswith(f"digits: error: {folder / name} {OTHER} ({words})")
        (folder / name).unlink()


def test_a_checkpoint_is_not_overwritten_by_who_forgets_the_option(
    main: Main, folder: Path, capsys: Any
) -> None:
    line = refused(main, folder, (*OPTIONS, "--checkpoint-every", "0"), capsys)
    assert f"{folder / 'checkpoint.pt'} is there for --checkpoint-every to go on with" in line


def test_without_its_checkpoint_the_run_under_way_begins_anew(
    main: Main, folder: Path, capsys: Any
) -> None:
    """What the error says to do. The run that was finished is not trained again."""
    first = json.loads((folder / "results.json").read_bytes())
    (folder / "checkpoint.pt").unlink()
    assert main(folder, *OPTIONS) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "digits: going on after 1 of 2 runs with ema, seed 0, from its start"
    assert [line.split(":")[0] for line in said[1:]] == ["2/2 ema, seed 0"]
    results = json.loads((folder / "results.json").read_bytes())
    assert results["runs"][0] == first["runs"][0]
    assert results["times"] == first["times"]
    assert results["seconds"]["wall"] >= first["seconds"]["wall"]


@pytest.mark.parametrize("every", ["0", "3"])
def test_leftovers_of_killed_writers_are_swept_and_other_files_are_not(
    every: str, main: Main, folder: Path
) -> None:
    if every == "0":
        (folder / "checkpoint.pt").unlink()
    own = ["results.json.ab1_cdef.tmp", "checkpoint.pt.00000000.tmp"][: 1 + (every == "3")]
    others = ["results.json.old", "results.json.of-last-week.tmp", "notes.tmp", "model.pt"]
    for name in own + others:
        (folder / name).write_bytes(b"some")
    assert main(folder, *OPTIONS, "--checkpoint-every", every) == 0
    left = {path.name for path in folder.iterdir()}
    assert left.isdisjoint(own)
    assert left.issuperset(others)


def test_a_full_disk_costs_nothing_that_was_written(
    main: Main, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(folder)
    assert main(folder, *OPTIONS) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "digits: error: [Errno 28] No space left on device"
    )
    assert calls == 1
    assert contents(folder) == before


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure would show: who is synchronised when."""
    from studies.digits import durable

    happened = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        inode = os.fstat(handle).st_ino
        happened.append("folder" if inode == tmp_path.stat().st_ino else "file")
        size.append(os.fstat(handle).st_size)
        fsync(handle)

    def watched_replace(source: Any, target: Any) -> None:
        happened.append("name")
        replace(source, target)

    size: list[int] = []
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    durable.write(tmp_path / "file", b"content")
    assert happened == ["file", "name", "folder"]
    assert size[0] == len(b"content")  # nothing waits in Python's buffer
    assert contents(tmp_path) == {"file": b"content"}
