"""Merges of checkpoints: what decay they imitate, which files they take, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.command import run
from rbwa_fused.posthoc import weighted
from rbwa_fused.posthoc.checkpoints import latest
from rbwa_fused.posthoc.merge_command import main
from rbwa_fused.posthoc.merging import DECAYS, decay_weights, merge_files

safetensors = pytest.importorskip("safetensors.torch")

Saved = dict[str, Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> Saved:
    """A count, a matrix, a turned one, one without elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "count": torch.tensor(seed),
        "matrix": torch.randn(3, 4, generator=generator).to(dtype),
        "none": torch.empty(0, 2, dtype=dtype),
        "turned": torch.randn(4, 3, generator=generator).to(dtype).t(),
    }


def save(file: Path, saved: Any) -> Path:
    if file.suffix == ".safetensors":
        safetensors.save_file({n: t.contiguous() for n, t in saved.items()}, file)
    else:
        torch.save(saved, file)
    return file


def read(file: Path) -> Saved:
    if file.suffix == ".safetensors":
        found: Saved = safetensors.load_file(file)
        return found
    loaded: Saved = torch.load(file, weights_only=True)
    return loaded


def three(folder: Path, end: str) -> list[Path]:
    return [save(folder / f"{name}{end}", state(seed)) for seed, name in enumerate("abc")]


def mean(weights: Sequence[float]) -> Saved:
    total = sum(weights)
    rows = [state(seed) for seed in range(len(weights))]
    found = {
        name: sum(w / total * row[name].double() for w, row in zip(weights, rows, strict=True))
        for name in ("matrix", "none", "turned")
    }
    return {n: torch.as_tensor(t).float() for n, t in found.items()} | {"count": rows[-1]["count"]}


def same(a: Saved, b: Saved) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].equal(b[n]) for n in a
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_a_merge_is_what_sgd_with_that_decay_would_have_come_to(decay: str, tmp_path: Path) -> None:
    """On a given sequence of gradients, checkpoints behind each of 12 steps."""
    count, lr = 12, 0.1
    factors = {
        "linear": lambda i: 1 - i / count,
        "sqrt": lambda i: 1 - math.sqrt(i / count),
        "cosine": lambda i: (1 + math.cos(math.pi * i / count)) / 2,
    }[decay]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(count)]
    constant = decayed = torch.ones(50, dtype=torch.float64)
    files = []
    for i, g in enumerate(grads):
        constant = constant - lr * g
        # the i-th update is in the checkpoints from the i-th on, whose weights sum to f_i
        decayed = decayed - lr * factors(i) * g
        files.append(save(tmp_path / f"{i}.safetensors", {"w": constant}))
    merge_files(files, tmp_path / "out.safetensors", decay=decay)
    found = read(tmp_path / "out.safetensors")["w"]
    assert (found - decayed).abs().max() < 1e-12
    assert math.fsum(decay_weights(decay, count)) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("out", [".safetensors", ".pt"])
@pytest.mark.parametrize("end", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [2.0, 0.0, -0.5]])
def test_files_of_both_formats_are_merged_in_float64(
    end: str, out: str, weights: list[float] | None, tmp_path: Path
) -> None:
    files, file = three(tmp_path, end), tmp_path / f"out{out}"
    used = merge_files(files, file, weights=weights)
    assert same(read(file), mean(weights or [1.0, 1.0, 1.0]))
    total = math.fsum(weights or [1.0] * 3)
    assert used == [pytest.approx(w / total) for w in (weights or [1.0] * 3)]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(
        [*(f.name for f in files), file.name]
    )


@pytest.mark.parametrize("end", [".safetensors", ".pt"])
def test_tensors_larger_than_a_piece_are_merged_piece_by_piece(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighted, "PIECE", 5)
    files, file = three(tmp_path, end), tmp_path / f"out{end}"
    merge_files(files, file)
    assert same(read(file), mean([1.0, 1.0, 1.0]))


def test_a_state_dict_inside_a_checkpoint_is_named_by_its_keys(tmp_path: Path) -> None:
    files = [
        save(tmp_path / f"{seed}.pt", {"step": seed, "model": {"ema": state(seed)}, "x": {}})
        for seed in range(2)
    ]
    merge_files(files, tmp_path / "out.pt", key="model.ema")
    assert same(read(tmp_path / "out.pt"), mean([1.0, 1.0]))
    torch.save({"a": 1, "model": state(0), "ema": state(0)}, files[0])
    with pytest.raises(ValueError, match=r"holds no state dict .* such as model or ema"):
        merge_files(files, tmp_path / "out2.pt")
    with pytest.raises(ValueError, match="Invalid key: 'nothing' of"):
        merge_files(files, tmp_path / "out2.pt", key="nothing")
    assert not (tmp_path / "out2.pt").exists()


def test_a_merged_optimizers_average_loads_into_the_model(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    files = []
    for step in range(3):
        model(torch.ones(3)).sum().backward()
        opt.step()
        files.append(save(tmp_path / f"{step}.pt", opt.averaged_state_dict(model)))
    merge_files(files, tmp_path / "out.pt")
    model.load_state_dict(read(tmp_path / "out.pt"))


def test_names_shapes_and_dtypes_that_differ_are_listed(tmp_path: Path) -> None:
    files = three(tmp_path, ".safetensors")
    save(files[1], {**state(1), "matrix": torch.ones(2, 2), "new": torch.ones(1)})
    save(files[2], {n: t for n, t in state(2, torch.float16).items() if n != "count"})
    with pytest.raises(ValueError, match="cannot be merged") as refused:
        merge_files(files, tmp_path / "out.safetensors")
    said = str(refused.value)
    assert "alone has new" in said and "lacks count" in said
    assert "matrix float32[3, 4] and float32[2, 2]" in said
    assert "turned float32[3, 4] and float16[3, 4]" in said
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, r"Invalid weights: 1 \(expected 3, one for each file\)"),
        ({"weights": [1.0, -1.0, 0.0]}, "a sum above 0"),
        ({"weights": [1.0, math.inf, 0.0]}, "expected finite ones"),
        ({"decay": "exponential"}, "Invalid decay: 'exponential'"),
        ({"key": "model"}, "Invalid key: 'model'"),
    ],
)
def test_bad_arguments_are_named(options: Any, said: str, tmp_path: Path) -> None:
    files = three(tmp_path, ".safetensors")
    with pytest.raises(ValueError, match=said):
        merge_files(files, tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("end", [".safetensors", ".pt"])
def test_a_torn_checkpoint_is_named(end: str, tmp_path: Path) -> None:
    files = three(tmp_path, end)
    files[1].write_bytes(files[1].read_bytes()[:-40])
    with pytest.raises(ValueError, match=re.escape(str(files[1]))):
        merge_files(files, tmp_path / f"out{end}")
    with pytest.raises(ValueError, match="at least one"):
        merge_files([], tmp_path / f"out{end}")


def test_the_latest_are_those_of_the_largest_numbers(tmp_path: Path) -> None:
    for step in (5, 100, 20, 3):
        save(tmp_path / f"step-{step}.pt", {})
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.pt").write_text("")
    assert [f.name for f in latest(tmp_path, 3)] == ["step-5.pt", "step-20.pt", "step-100.pt"]
    with pytest.raises(ValueError, match=r"Invalid count: 5 of .* \(expected at most 4\)"):
        latest(tmp_path, 5)


def test_the_latest_folders_of_a_trainer_are_found(tmp_path: Path) -> None:
    for step in (500, 1000, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save(folder / "model.safetensors", state(step))
        (folder / "optimizer.pt").write_bytes(b"")
    assert [f.parent.name for f in latest(tmp_path, 2)] == ["checkpoint-500", "checkpoint-1000"]


# ---- the command ---------------------------------------------------------------------------------


def told(*words: str | Path) -> int:
    """The exit status of the command."""
    try:
        return run("merge", lambda: main([str(word) for word in words]))
    except SystemExit as ended:
        return int(ended.code or 0)


def test_the_command_prints_each_files_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = three(tmp_path, ".pt"), tmp_path / "out" / "mean.safetensors"
    out.parent.mkdir()
    assert told(*files, "--weights", "1", "2", "5", "--out", out) == 0
    assert same(read(out), mean([1.0, 2.0, 5.0]))
    expected = [f"{w / 8:.6f}  {file}" for w, file in zip((1, 2, 5), files, strict=True)]
    assert capsys.readouterr().out.splitlines() == expected
    assert told("--latest", "2", tmp_path, "--decay", "sqrt", "--out", out) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{math.sqrt(0.5):.6f}  {files[1]}" and second.endswith(str(files[2]))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--out", "x.pt"], 2, "expected checkpoints or --latest"),
        (["a.pt"], 2, "no --out FILE"),
        (["a.pt", "--out", "x.pt", "--weights", "1", "--decay", "sqrt"], 2, "one of the two"),
        (["--latest", "0", ".", "--out", "x.pt"], 2, "Invalid --latest: '0'"),
        (["none.pt", "--out", "x.pt"], 1, "No such file or directory"),
        (["{a}", "{a}", "--weights", "1", "--out", "x.pt"], 2, "Invalid weights: 1"),
        (["{a}", "--out", "none/x.safetensors"], 1, "No such file or directory"),
        (["{a}", "--out", "none/x.pt"], 1, "none"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = save(tmp_path / "a.safetensors", state(0))
    assert told(*(word.format(a=a) for word in words)) == status
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "elements" not in line]
    assert said in line and not captured.out


def test_the_policy_of_the_same_name_stays_what_it_is() -> None:
    from rbwa_fused import merge

    assert rf.merge is merge and callable(rf.merge)
