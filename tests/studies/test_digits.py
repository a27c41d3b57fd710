"""studies.digits: what it leaves behind, what it proves, how it ends when it is told to stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--epochs", "3", "--batch-size", "128", "--start-epoch", "1")
METHODS = (
    "sgd",
    "momentum",
    "rsgdm",
    "swa",
    "rswa",
    "ema",
    "lookahead",
    "rbwa",
    "rbwa-control",
    "rbwa-algorithm2",
    "rbwa-e",
    "rbwa-e-control",
)


def run(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, at the repository's root."""
    finished = subprocess.run(
        (sys.executable, *command),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == code, finished.stderr
    return finished


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All methods on one seed, once for all tests, and what was printed."""
    folder = tmp_path_factory.mktemp("everything")
    return folder, run("-m", "studies.digits", *QUICK, "--seeds", "1", "--out", str(folder)).stdout


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Sequence[str]], int]]:
    """The program's `main` in this process, whose number of threads it gets back."""
    monkeypatch.syspath_prepend(ROOT)
    from studies.digits.__main__ import main

    threads = torch.get_num_threads()
    yield main
    torch.set_num_threads(threads)


def test_every_method_leaves_its_curves_and_the_machine_they_were_made_on(everything):
    results = load(everything[0])
    assert results["complete"] is True
    assert results["settings"]["methods"] == list(METHODS)
    assert results["settings"]["start_epoch"] == 1
    assert {"python", "torch", "rbwa_fused"} <= results["versions"].keys()
    assert results["cpu"]
    assert results["seconds"].keys() == {"wall", "cpu"}
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [(m, 0) for m in METHODS]
    for r in results["runs"]:
        for curve in ("train_loss", "test_loss", "test_accuracy"):
            assert len(r[curve]) == 3
            assert all(math.isfinite(value) for value in r[curve])
    for name in METHODS:
        assert results["times"][name]["ms"] > 0.0
    assert results["times"]["torch.optim.SGD(fused=True, momentum=0.9)"]["ratio"] == 1.0


def test_the_picture_is_a_png(everything):
    assert (everything[0] / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_table_has_a_row_for_each_method(everything):
    lines = everything[1].splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(METHODS)]] == list(METHODS)


def test_the_methods_of_a_seed_start_alike(everything):
    """Before averaging starts, whatever averages SGD with momentum is SGD with momentum."""
    first = {r["method"]: r["test_loss"][0] for r in load(everything[0])["runs"]}
    for name in ("swa", "rswa", "ema", "rbwa", "rbwa-algorithm2", "rbwa-e"):
        assert first[name] == first["momentum"]
    for name in ("rbwa-control", "rbwa-e-control"):
        assert first[name] == pytest.approx(first["momentum"], rel=1e-5)


def test_rbwa_is_sgd_with_its_matched_learning_rate(everything):
    curves = {r["method"]: r["test_loss"] for r in load(everything[0])["runs"]}
    for method in ("rbwa", "rbwa-e"):
        assert curves[method] == pytest.approx(curves[f"{method}-control"], rel=1e-4)
        assert curves[method][-1] != pytest.approx(curves["momentum"][-1], rel=1e-2)


def test_the_same_seed_gives_the_same_numbers(everything, tmp_path, main):
    """Also in another process, with other methods left out and another seed before it."""
    chosen = ("rsgdm", "swa", "lookahead", "rbwa")
    options = (*QUICK, "--method", ",".join(chosen), "--seeds", "1,0", "--out", str(tmp_path))
    assert main(options) == 0
    other, again = ([r for r in load(tmp_path)["runs"] if r["seed"] == seed] for seed in (1, 0))
    assert again == [r for r in load(everything[0])["runs"] if r["method"] in chosen]
    assert other[0]["test_loss"] != again[0]["test_loss"]


def test_a_diverged_run_is_reported_and_not_a_crash(tmp_path, main, capsys):
    options = ("--model", "mlp", "--method", "sgd", "--lr", "1e20", "--epochs", "2", "--seeds", "1")
    assert main((*options, "--out", str(tmp_path))) == 0
    assert "nan" in capsys.readouterr().out
    assert load(tmp_path)["runs"][0]["test_loss"][-1] is None


def test_a_bad_option_ends_in_one_line(tmp_path):
    options = ("--method", "rbwa,adam", "--out", str(tmp_path / "new"))
    error = run("-m", "studies.digits", *options, code=2).stderr
    assert error.startswith("digits: error: argument --method: unknown method 'adam'")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--epochs", "-1"),
        ("--epochs", "many"),
        ("--batch-size", "1"),
        ("--batch-size", "1438"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--momentum", "1"),
        ("--weight-decay", "-0.1"),
        ("--start-epoch", "30"),
        ("--start-epoch", "-1"),
        ("--seeds", "0"),
        ("--seeds", "1,1"),
        ("--seeds", ","),
        ("--threads", "0"),
        ("--model", "resnet"),
        ("--dtype", "int8"),
        ("--out", ""),
        ("--out", "FILE"),
        ("--out", "FILE/below"),
        ("--unknown",),
    ],
    ids=" ".join,
)
def test_every_option_is_checked(options, tmp_path, main, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        main([option.replace("FILE", str(file)) for option in options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("digits: error: ")
    assert options[0] in error
    assert error.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="a process of Windows cannot be sent a Ctrl-C alone")
def test_ctrl_c_keeps_finished_runs(tmp_path):
    options = (
        "--model",
        "mlp",
        "--epochs",
        "1",
        "--method",
        "sgd",
        "--seeds",
        "1000",
        "--out",
        str(tmp_path),
    )
    with subprocess.Popen(
        (sys.executable, "-m", "studies.digits", *options),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/1000 sgd, seed 0: ")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    results = load(tmp_path)
    finished = len(results["runs"])
    assert process.returncode == 130
    assert out == ""
    assert error.splitlines()[-1] == (
        f"digits: interrupted: {finished} of 1000 runs finished, "
        f"kept in {tmp_path / 'results.json'}"
    )
    assert "Traceback" not in error
    assert 1 <= finished < 1000
    assert results["complete"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
