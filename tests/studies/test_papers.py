"""The papers' tables: what a command leaves behind, and how it ends when something is wrong."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("tqdm")

import numpy as np
from scipy import stats
from torchvision.datasets import CIFAR10, CIFAR100

from studies.digits import durable
from studies.papers import datasets, flatness, jobs, published, store, sweep, training
from studies.papers.__main__ import main
from studies.papers.settings import TABLES
from studies.papers.systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--epochs", "2", "--start-epoch", "1", "--batch-size", "256")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Runs set PyTorch's threads; the other tests get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    datasets.load.cache_clear()


def load(folder: Path) -> dict[str, Any]:
    """results.json without the time that a run took."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for section in ("sweep", "runs", "flatness"):
        for record in results[section]:
            assert record.pop("seconds") >= 0.0
    return results


def cells(text: str) -> list[dict[str, str]]:
    """A markdown table's rows by their header; of equal headers a list's worth in turn."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = [f"{name} 2" if name in header[:k] else name for k, name in enumerate(header)]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(names, row, strict=True)) for row in rows]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that is not about progress."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not re.match(r"\d+/\d+ |.*epoch/s|\s*$", line)]
    assert len(errors) == 1, errors
    assert "Traceback" not in errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every system on digits, two seeds, at one learning rate."""
    folder = tmp_path_factory.mktemp("everything")
    assert main(["table5", *TINY, "--lr", "0.3", "--seeds", "2", "--out", str(folder)]) == 0
    return folder


def test_every_system_leaves_its_curves(everything):
    results = load(everything)
    assert [(r["system"], r["seed"]) for r in results["runs"]] == [
        (name, seed) for name in SYSTEMS for seed in (0, 1)
    ]
    for record in results["runs"]:
        for curve in ("train_loss", "test_loss", "test_accuracy"):
            assert len(record[curve]) == 2
            assert all(math.isfinite(value) for value in record[curve])
    assert {"torch", "rbwa_fused"} == results["versions"].keys()
    assert results["cpu"] and results["device"] == "cpu"
    pictures = (everything / "curves.png").read_bytes()
    assert pictures.startswith(b"\x89PNG\r\n\x1a\n") and len(pictures) < 150_000


def test_before_averages_start_the_systems_of_a_seed_are_alike(everything):
    first = {(r["system"], r["seed"]): r["test_loss"][0] for r in load(everything)["runs"]}
    for seed in (0, 1):
        for name in ("swa", "swa-cyclical", "fge", "ema", "rswa", "rbwa", "rbwa-algorithm2"):
            assert first[name, seed] == first["momentum", seed]
        assert first["nesterov", seed] != first["momentum", seed]
    assert first["momentum", 0] != first["momentum", 1]


def test_the_tables_numbers_are_those_of_results_json(everything):
    """Recomputed here from the runs, by scipy's own interval."""
    runs = {(r["system"], r["seed"]): r for r in load(everything)["runs"]}
    table = cells((everything / "table.md").read_text(encoding="utf-8"))
    assert [row["system"] for row in table] == list(SYSTEMS)

    def last(system: str, curve: str) -> np.ndarray:
        return np.array([runs[system, seed][curve][-1] for seed in (0, 1)])

    for row in table:
        for header, curve, digits in (
            ("accuracy %", "test_accuracy", 2),
            ("test loss", "test_loss", 4),
            ("training loss", "train_loss", 5),
        ):
            values = last(row["system"], curve)
            expected = f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            assert row[header] == expected
        assert row["seeds"] == "2"
        for header, p, curve, digits in (
            ("to momentum (95 %)", "p", "test_accuracy", 2),
            ("to momentum (95 %) 2", "p 2", "test_loss", 4),
        ):
            apart = last(row["system"], curve) - last("momentum", curve)
            if row["system"] == "momentum":
                assert row[header] == row[p] == "-"
            elif row[p] == "-":
                assert abs(apart[0] - apart[1]) < 1e-5 * last(row["system"], curve).max()
            else:
                interval = stats.ttest_1samp(apart, 0.0).confidence_interval(0.95)
                found = [float(number) for number in re.findall(r"[-+][\d.]+", row[header])]
                expected = [apart.mean(), interval.low, interval.high]
                assert found == pytest.approx(expected, abs=0.51 * 10.0**-digits)
                assert row[p] == f"{stats.ttest_1samp(apart, 0.0).pvalue:.3f}"


def test_how_far_a_control_is_from_its_system_is_told(everything):
    runs = {(r["system"], r["seed"]): r["test_loss"][-1] for r in load(everything)["runs"]}
    text = " ".join((everything / "table.md").read_text(encoding="utf-8").split())
    for name in ("rsgdm", "rbwa", "rbwa-algorithm2", "rbwa-e"):
        (told,) = re.findall(rf" {name}-control ([-\de.]+) %", text)
        gap = max(abs(runs[f"{name}-control", k] / runs[name, k] - 1.0) for k in (0, 1))
        assert float(told) == pytest.approx(100.0 * gap, rel=0.06, abs=1e-12)


def test_the_csv_holds_the_same_unrounded(everything):
    runs = load(everything)["runs"]
    rows = list(csv.DictReader((everything / "table.csv").open(encoding="utf-8")))
    assert [row["system"] for row in rows] == list(SYSTEMS)
    for row in rows:
        own = [r["test_accuracy"][-1] for r in runs if r["system"] == row["system"]]
        assert float(row["accuracy"]) == pytest.approx(np.mean(own), rel=1e-12)
    swa = next(row for row in rows if row["system"] == "swa")
    assert (swa["published_gain_low"], swa["published_gain_high"]) == ("0.75", "1.5")


@pytest.mark.parametrize("command", ["table1", "table2", "table3", "table4"])
def test_the_papers_figures_stand_beside_the_measured_ones(command, tmp_path, capsys):
    sizes = ("--batch-size", "16,256") if command == "table1" else ()
    options = ("--epochs", "1", "--lr", "0.3", "--seeds", "1", *sizes)
    assert main([command, *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table = cells(printed)
    assert cells((tmp_path / "table.md").read_text(encoding="utf-8")) == table
    assert {row["system"] for row in table} == set(TABLES[command].systems)
    for row in table:
        model, size = row["setting"].split()[1:]
        figure = published.find(command, row["system"], "digits", model, int(size))
        if figure is None:
            assert row["paper: accuracy %"] == "-"
            continue
        value, note = re.fullmatch(r"([\d.]+) \[(\d+)\]", row["paper: accuracy %"]).groups()
        assert value == f"{figure.accuracy:.2f}"
        assert f"[{note}] {figure}." in " ".join(printed.split())
    gains = [row for row in table if row[f"paper: to {TABLES[command].baseline}"] != "-"]
    first = {"table1": "+1.49", "table2": "+1.05", "table3": "+1.75", "table4": "+0.14"}[command]
    assert gains[0][f"paper: to {TABLES[command].baseline}"] == first


def test_with_momentum_the_rbwa_papers_sgd_is_sgd_with_momentum(tmp_path, capsys):
    options = (*TINY, "--lr", "0.3", "--seeds", "1", "--momentum", "0.9")
    assert main(["table1", *options, "--out", str(tmp_path)]) == 0
    table = cells(capsys.readouterr().out)
    assert [row["system"] for row in table[:2]] == ["momentum", "rbwa"]
    assert table[0]["paper: accuracy %"] == "80.56 [1]"
    assert table[1]["paper: to momentum"] == "+0.18"


def test_differences_are_taken_to_the_baseline_that_is_named(everything, capsys):
    base = ["table5", *TINY, "--lr", "0.3", "--seeds", "2", "--out", str(everything)]
    assert main([*base, "--baseline", "nesterov"]) == 0
    rows = {row["system"]: row for row in cells(capsys.readouterr().out)}
    assert rows["nesterov"]["to nesterov (95 %)"] == "-"
    accuracy = {
        name: [r["test_accuracy"][-1] for r in load(everything)["runs"] if r["system"] == name]
        for name in ("rsgdm", "nesterov")
    }
    expected = statistics.mean(accuracy["rsgdm"]) - statistics.mean(accuracy["nesterov"])
    told = float(rows["rsgdm"]["to nesterov (95 %)"].split(" ")[0])
    assert told == pytest.approx(expected, abs=0.005)
    assert main(base) == 0  # as other tests have it


def test_a_list_of_learning_rates_is_reported_in_full(tmp_path, capsys):
    options = (*TINY, "--seeds", "1", "--method", "momentum,swa", "--lr", "0.3,0.1")
    assert main(["table5", *options, "--out", str(tmp_path)]) == 0
    table = cells(capsys.readouterr().out)
    assert [(row["system"], row["lr"]) for row in table] == [
        ("momentum", "0.01"),
        ("momentum", "0.03"),
        ("swa", "0.01"),
        ("swa", "0.03"),
    ]
    assert load(tmp_path)["sweep"] == []


SWEEP = ("table5", *TINY, "--quick", "--method", "momentum,ema", "--seeds", "2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([*SWEEP, "--out", str(folder)]) == 0
    return folder


def test_the_reported_rate_is_the_best_of_the_sweep(uninterrupted):
    results = load(uninterrupted)
    assert {record["seed"] for record in results["sweep"]} == {1000}
    for name in ("momentum", "ema"):
        tried = [record for record in results["sweep"] if record["system"] == name]
        best = max(tried, key=lambda r: (r["validation_accuracy"], -r["validation_loss"]))
        assert {r["lr"] for r in results["runs"] if r["system"] == name} == {best["lr"]}
        assert best["lr"] not in (min(r["lr"] for r in tried), max(r["lr"] for r in tried))


@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_interrupted_sweep_goes_on_to_the_results_of_one_that_never_stopped(
    after, uninterrupted, tmp_path, monkeypatch, capsys
):
    def perform(*arguments: Any) -> Any:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(jobs.perform(*arguments))
        return done[-1]

    done: list[Any] = []
    monkeypatch.setattr(sweep, "perform", perform)
    assert main([*SWEEP, "--out", str(tmp_path)]) == 130
    message = error_of(capsys)
    assert f"interrupted: {after}/" in message
    assert ("kept in" in message) == (after > 0)
    assert (tmp_path / "results.json").exists() == (after > 0)
    monkeypatch.undo()
    assert main([*SWEEP, "--out", str(tmp_path)]) == 0
    assert load(tmp_path) == load(uninterrupted)
    for name in ("table.md", "table.csv", "curves.png"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_what_is_finished_is_not_run_again_and_seeds_can_be_added(
    uninterrupted, tmp_path, monkeypatch
):
    (tmp_path / "results.json").write_bytes((uninterrupted / "results.json").read_bytes())
    ran = []

    def perform(job: jobs.Job, *rest: Any) -> Any:
        ran.append(job)
        return jobs.perform(job, *rest)

    monkeypatch.setattr(sweep, "perform", perform)
    assert main([*SWEEP[:-1], "3", "--out", str(tmp_path)]) == 0
    assert [(job.section, job.system, job.seed) for job in ran] == [
        ("runs", "momentum", 2),
        ("runs", "ema", 2),
    ]
    kept = [record for record in load(tmp_path)["runs"] if record["seed"] < 2]
    assert kept == load(uninterrupted)["runs"]


def test_a_killed_process_is_told_in_one_line_and_what_was_finished_is_what_one_process_gives(
    tmp_path, monkeypatch, capsys
):
    """The system kills one that takes too much memory. Other children are none of its business."""
    add = store.Store.add
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    bystander.start()
    others = multiprocessing.active_children()

    def add_and_kill(self: store.Store, *record: Any) -> None:
        add(self, *record)
        if len(self.records) == 2:
            next(c for c in multiprocessing.active_children() if c not in others).kill()

    monkeypatch.setattr(store.Store, "add", add_and_kill)
    options = ("--model", "mlp", "--epochs", "1", "--lr", "0.3", "--method", "momentum")
    command = ["table5", *options, "--seeds", "500", "--jobs", "2", "--out", str(tmp_path)]
    assert main(command) == 1
    bystander.join(timeout=1)
    alive = all(child.is_alive() for child in others)
    bystander.kill()
    assert alive
    assert "a process was killed" in error_of(capsys)
    kept = load(tmp_path)["runs"]
    assert 2 <= len(kept) < 500
    monkeypatch.undo()
    seeds = ",".join(str(record["seed"]) for record in kept[:2])
    assert main(["table5", *options, "--seeds", seeds, "--out", str(tmp_path / "one")]) == 0
    assert load(tmp_path / "one")["runs"] == kept[:2]


def test_ctrl_c_while_a_finished_run_is_being_written_does_not_lose_it(
    tmp_path, monkeypatch, capsys
):
    calls = []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    write = durable.write
    monkeypatch.setattr(durable, "write", interrupted)
    options = (*TINY, "--lr", "0.3", "--seeds", "4", "--method", "momentum")
    assert main(["table5", *options, "--out", str(tmp_path)]) == 130
    assert "interrupted: 2/4 runs finished, kept in" in error_of(capsys)
    assert [record["seed"] for record in load(tmp_path)["runs"]] == [0, 1]


@pytest.mark.skipif(os.name == "nt", reason="a process of Windows cannot be sent a Ctrl-C alone")
def test_ctrl_c_ends_a_sweep_in_processes_and_keeps_what_is_finished(tmp_path):
    options = ("--model", "mlp", "--epochs", "1", "--method", "momentum", "--lr", "0.3")
    command = ("-m", "studies.papers", "table5", *options, "--seeds", "1000", "--jobs", "2")
    with subprocess.Popen(
        (sys.executable, *command, "--out", str(tmp_path)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("1/1000 digits mlp 32 momentum, lr 0.3, seed ")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finished = len(load(tmp_path)["runs"])
    assert process.returncode == 130, error
    assert out == ""
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(
        f"papers table5: interrupted: {finished}/1000 runs finished, kept in "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--epochs", "3"), "epochs: 2 there, 3 here"),
        (("--weight-decay", "0.1"), "weight_decay: 0.0005 there, 0.1 here"),
        (("--hard",), "settings: 'digits small 256' there, 'digits hard small 256' here"),
    ],
)
def test_results_of_another_setting_are_not_mixed_in(changed, named, everything, tmp_path, capsys):
    before = (everything / "results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(before)
    with pytest.raises(SystemExit) as stopped:
        main(["table5", *TINY, *changed, "--lr", "0.3", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    message = error_of(capsys)
    assert named in message and "choose another --out" in message
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"sweep": [{}]}'])
def test_a_file_that_is_no_results_file_is_left_alone(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["table5", *TINY, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is no results file of this command" in error_of(capsys)
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == content


def test_a_reader_of_a_file_that_is_written_anew_sees_a_whole_one(tmp_path):
    durable.write(tmp_path / "file", b"old")
    with (tmp_path / "file").open(encoding="utf-8") as reader:
        durable.write(tmp_path / "file", b"new and longer")
        assert reader.read() == "old"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new and longer"


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_whole_file(tmp_path, monkeypatch, capsys):
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:  # two for each file: contents and name
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    options = (*TINY, "--lr", "0.3", "--seeds", "4", "--method", "momentum")
    assert main(["table5", *options, "--out", str(tmp_path)]) == 1
    assert "No space left on device" in error_of(capsys)
    assert [record["seed"] for record in load(tmp_path)["runs"]] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_batch_size_and_a_smaller_one(error, tmp_path, monkeypatch, capsys):
    def train(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(training, "train", train)
    assert main(["table5", *TINY, "--lr", "0.3", "--out", str(tmp_path)]) == 1
    message = error_of(capsys)
    assert "out of memory on cpu with small at batch size 256: try --batch-size 128" in message


def test_a_defect_of_our_own_is_not_hidden(tmp_path, monkeypatch):
    def train(*arguments: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["table5", *TINY, "--lr", "0.3", "--out", str(tmp_path)])


def test_a_diverged_run_is_reported_and_not_a_crash(tmp_path, capsys):
    options = ("--model", "mlp", "--method", "momentum,swa", "--lr", "1e20", "--seeds", "2")
    assert main(["table5", *TINY, *options, "--out", str(tmp_path)]) == 0
    assert cells(capsys.readouterr().out)[0]["test loss"] == "nan"
    assert load(tmp_path)["runs"][0]["test_loss"][-1] is None


@pytest.mark.parametrize(
    "options",
    [
        ("table5", "--method", "rbwa,adam"),
        ("table5", "--method", "rbwa,rbwa"),
        ("table5", "--model", "resnet"),
        ("table5", "--model", "resnet18", "--stem", "large"),
        ("table5", "--data", "mnist"),
        ("table5", "--lr", "0"),
        ("table5", "--lr", "0.1,nan"),
        ("table5", "--lr", "best"),
        ("table5", "--seeds", "0"),
        ("table5", "--sweep-seeds", "0"),
        ("table5", "--baseline", "adam"),
        ("table5", "--baseline", "swa", "--method", "momentum"),
        ("table5", "--epochs", "0"),
        ("table5", "--start-epoch", "50"),
        ("table5", "--batch-size", "1"),
        ("table5", "--batch-size", "1151"),
        ("table5", "--batch-size", "1438", "--lr", "0.1"),
        ("table5", "--batch-size", "301", "--hard"),
        ("table5", "--momentum", "1"),
        ("table1", "--method", "nesterov"),
        ("table5", "--augment", "mixup"),
        ("table5", "--device", "tpu"),
        ("table5", "--threads", "0"),
        ("table5", "--jobs", "0"),
        ("table5", "--out", ""),
        ("table5", "--out", "FILE"),
        ("table5", "--out", "FILE/below"),
        ("table5", "--root", "FILE", "--data", "cifar10", "--hard"),
        ("table5", "--data", "cifar10"),
        ("table5", "--data", "cifar100", "--root", "FILE", "--model", "mlp"),
        ("table5", "--rays", "3"),
        ("flatness", "--rays", "0"),
        ("flatness", "--method", "swa"),
        ("flatness", "--method", "momentum,fge"),
        ("flatness", "--lr", "0.1,0.3"),
        ("table6",),
        (),
    ],
    ids=" ".join,
)
def test_every_option_is_checked(options, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    given = [option.replace("FILE", str(file)) for option in options]
    if "--out" not in given and given:
        given += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert error_of(capsys).startswith("papers")
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["table5", "--device", "cuda", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--device" in error_of(capsys)


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes a small archive in CIFAR's own format, with its checksums in torchvision's lists."""

    def make(name: str) -> Path:
        kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        folder = tmp_path / "archives" / kind.base_folder
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        classes = int(name.removeprefix("cifar"))
        labels = "labels" if name == "cifar10" else "fine_labels"

        def written(file: str, content: dict[str, Any]) -> list[str]:
            data = pickle.dumps(content)
            (folder / file).write_bytes(data)
            return [file, hashlib.md5(data).hexdigest()]

        def images(count: int) -> dict[str, Any]:
            numbers = random.integers(0, classes, count)
            pixels = random.integers(0, 256, (count, 3072)) // 2 + numbers[:, None] * 128 // classes
            return {"data": pixels.astype(np.uint8), labels: numbers.tolist()}

        for files, count in (("train_list", 100 // len(kind.train_list)), ("test_list", 30)):
            own = [written(file, images(count)) for file, _ in getattr(kind, files)]
            monkeypatch.setattr(kind, files, own)
        names = {kind.meta["key"]: [f"class {k}" for k in range(classes)]}
        file, checksum = written(kind.meta["filename"], names)
        monkeypatch.setattr(kind, "meta", kind.meta | {"filename": file, "md5": checksum})
        return folder

    return make


CIFAR_TINY = ("--epochs", "2", "--start-epoch", "1", "--batch-size", "20", "--seeds", "1")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_system_runs_on_an_archive_in_cifars_format(name, archive, tmp_path, capsys):
    """Augmented, as by default on CIFAR; here the small network of the demo."""
    root = archive(name).parent
    options = ("--data", name, "--root", str(root), "--model", "small", "--lr", "0.1")
    assert main(["table5", *options, *CIFAR_TINY, "--out", str(tmp_path / "out")]) == 0
    assert [row["system"] for row in cells(capsys.readouterr().out)] == list(SYSTEMS)
    (setting,) = load(tmp_path / "out")["settings"].values()
    assert setting["augment"] == "crop-flip"


def test_a_sweep_on_cifar_keeps_a_fifth_of_the_training_images_to_choose_by(archive, tmp_path):
    root = archive("cifar10").parent
    source = datasets.Source("cifar10", root=str(root))
    part = datasets.load(source, "sweep", "float32", 0, "cpu")
    assert (len(part.train.labels), len(part.test.labels)) == (80, 20)
    whole = datasets.load(source, "final", "float32", 0, "cpu")
    assert (len(whole.train.labels), len(whole.test.labels)) == (100, 30)
    assert whole.train.images.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert whole.train.images.std((0, 2, 3)).tolist() == pytest.approx([1.0] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: folder.rename(folder.parent / "away"), "no folder 'cifar-10-batches-py'"),
        (lambda folder: (folder / "data_batch_3").unlink(), "data_batch_3' is missing"),
        (lambda folder: (folder / "batches.meta").unlink(), "batches.meta' is missing"),
        (lambda folder: (folder / "test_batch").write_bytes(b"half"), "test_batch' is damaged"),
        (
            lambda folder: folder.rename(folder.parent / "cifar-10-python.tar.gz"),
            "is still packed: extract it",
        ),
    ],
    ids=["absent", "without a batch", "without names", "half downloaded", "packed"],
)
def test_an_archive_that_is_not_whole_is_told_in_one_line(damage, words, archive, tmp_path, capsys):
    folder = archive("cifar10")
    damage(folder)
    options = ("--data", "cifar10", "--root", str(folder.parent), "--model", "small", *CIFAR_TINY)
    assert main(["table5", *options, "--out", str(tmp_path / "out")]) == 1
    assert words in error_of(capsys)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_pickle_that_is_none_is_told_in_one_line(archive, tmp_path, monkeypatch, capsys):
    """Its checksum is right: somebody else's archive."""
    folder = archive("cifar10")
    (folder / "test_batch").write_bytes(b"not a pickle")
    checksum = hashlib.md5(b"not a pickle").hexdigest()
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksum]])
    options = ("--data", "cifar10", "--root", str(folder.parent), "--model", "small", *CIFAR_TINY)
    assert main(["table5", *options, "--out", str(tmp_path / "out")]) == 1
    assert "cannot be read" in error_of(capsys)


@pytest.mark.parametrize(("directions", "lr"), [("sphere", "0.3"), ("filter", "auto")])
def test_flatness_leaves_rays_a_segment_a_table_and_a_picture(
    directions, lr, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(flatness, "POINTS", 7)
    options = ("--lr", lr, "--seeds", "1", "--rays", "2", "--directions", directions, "--quick")
    assert main(["flatness", *TINY, *options, "--out", str(tmp_path)]) == 0
    table = cells(capsys.readouterr().out)
    assert [(row["solution"], row["loss"]) for row in table] == [
        (system, loss) for system in ("momentum", "swa") for loss in ("test loss", "training loss")
    ]
    (record,) = load(tmp_path)["flatness"]
    assert {r["system"] for r in load(tmp_path)["sweep"]} == (
        {"momentum"} if lr == "auto" else set()
    )
    assert record["distances"][0] == 0.0
    for place, system in enumerate(("momentum", "swa")):
        for loss in ("test_loss", "train_loss"):
            rays = record[loss][place]
            assert len(rays) == 2
            # All rays begin at the solution, and so do the ends of the segment.
            assert rays[0][0] == rays[1][0]
            end = record[f"segment_{loss}"][record["segment"].index(float(place))]
            assert end == pytest.approx(rays[0][0], rel=1e-4)
        row = next(r for r in table if r["solution"] == system and r["loss"] == "test loss")
        assert float(row["at the solution"]) == pytest.approx(
            record["test_loss"][place][0][0], rel=1e-3
        )
    # The average with BatchNorm estimated for it, which a table of the same setting tests too.
    options = ("--method", "swa", "--lr", str(record["lr"]), "--seeds", "1")
    assert main(["table5", *TINY, *options, "--out", str(tmp_path / "table")]) == 0
    (run,) = load(tmp_path / "table")["runs"]
    assert record["test_loss"][1][0][0] == pytest.approx(run["test_loss"][-1], rel=1e-5)
    picture = (tmp_path / "flatness.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) < 150_000
