"""python -m rbwa_fused.posthoc: its table, its files, its picture, and one line where it fails."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import walks
from started import environment

from rbwa_fused.command import run
from rbwa_fused.posthoc import Snapshots
from rbwa_fused.posthoc.__main__ import main
from rbwa_fused.posthoc.tensors import Reader

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("snapshots")
    model = walks.Small()
    walks.walked(model, walks.averagers(model), Snapshots(made, every=20))
    return made


def told(*words: str | Path) -> int:
    """The exit status of the command."""
    try:
        return run("posthoc", lambda: main([str(word) for word in words]))
    except SystemExit as ended:
        return int(ended.code or 0)


def test_it_writes_each_length_a_table_and_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert told(folder, "--sigma-rel", "0.05", "0.075", "0.15", "--out", out) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first == "step 200, 20 snapshots, 1 ranks, 0.0 MB"
    assert head.split() == ["asked", "realised", "residual", "rounding", "file"]
    cells = [row.split() for row in rows]
    assert [row[:4] for row in cells] == [
        ["0.05", "0.0500", "0.00%", "-"],
        ["0.075", "0.0751", "0.84%", "-"],
        ["0.15", "0.1490", "2.21%", "-"],
    ]
    assert all(Reader(Path(row[4])).kinds.keys() for row in cells)
    assert (out / "profiles.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == 4


def test_without_out_it_only_says_how_near_they_come(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("a tensor is read"))
    words = [folder, "--sigma-rel", "0.25", "--keep", "5", "--step", "180"]
    assert told(*words) == 0
    first, _, row = capsys.readouterr().out.splitlines()
    assert first.startswith("step 180, 10 snapshots")
    assert float(row.split()[2].rstrip("%")) > 30 and row.split()[4] == "-"
    assert told(folder, "--gamma", "6.93720394") == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["0.1", "0.1000"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no FOLDER"),
        (["{folder}"], "no length was given"),
        (["{folder}", "--sigma-rel", "0.3"], "Invalid sigma_rel: 0.3"),
        (["{folder}", "--sigma-rel", "0.1", "--step", "30"], "20 or 40"),
        (["{folder}", "--sigma-rel", "0.1", "--keep", "0"], "Invalid --keep: 0"),
        (["{folder}", "--sigma-rel", "0.25", "--out", "{out}"], "0.25 has a residual of 0.14"),
        (["{out}", "--sigma-rel", "0.1"], "No such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    words: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "none"
    assert told(*(word.format(folder=folder, out=out) for word in words)) != 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line and not captured.out and not out.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        assert told(folder, "--sigma-rel", "0.05", "0.1", "--out", tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    lines = [line for line in capsys.readouterr().err.splitlines() if "elements" not in line]
    assert len(lines) == 1 and "File too large" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_most_lets_a_far_one_be_written(folder: Path, tmp_path: Path) -> None:
    words = [folder, "--sigma-rel", "0.25", "--most", "0.2", "--out", tmp_path]
    assert told(*words) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_without_matplotlib_and_tqdm_it_makes_the_averages_and_says_what_is_not_drawn(
    folder: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules.update(matplotlib=None, tqdm=None, numpy=None, safetensors=None); "
        "from rbwa_fused.posthoc.__main__ import main; main(sys.argv[1:])"
    )
    words = [str(folder), "--sigma-rel", "0.075", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "0.84%" in done.stdout and "profiles.png: matplotlib is not installed" in done.stderr
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
