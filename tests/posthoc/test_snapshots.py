"""Snapshots of a run: which files there are, what they hold, and that training goes on."""

from __future__ import annotations

import copy
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import walks
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.posthoc import Snapshots
from rbwa_fused.posthoc.folder import Snapshot, snapshots_in
from rbwa_fused.posthoc.tensors import Reader
from rbwa_fused.power import gamma_of

safetensors = pytest.importorskip("safetensors.torch")


def steps(folder: Path) -> list[int]:
    """Of the snapshots, one for each average."""
    return [snapshot.about.step for snapshot in snapshots_in(folder)]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def held(snapshot: Snapshot) -> dict[str, Tensor]:
    found: dict[str, Tensor] = safetensors.load_file(snapshot.reader.file)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def trained(folder: Path, average: Any, last: int = 30, **options: Any) -> tuple[Any, Any]:
    """A run with one average, snapshots every 10 steps."""
    model = walks.Small()
    owner = rf.Averager(model, average)
    walks.walked(model, [owner], Snapshots(folder, **{"every": 10, **options}), last=last)
    return model, owner


@contextmanager
def full_disk(size: int = 200) -> Iterator[None]:
    """No file may be larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_each_file_holds_an_average_as_it_was_and_says_what_it_is(tmp_path: Path) -> None:
    model = walks.Small()
    owners = walks.averagers(model, start=15)
    seen: dict[tuple[int, float], tuple[dict[str, Tensor], float]] = {}

    def look(step: int) -> None:
        weights = dict(model.named_parameters())
        for owner, sigma_rel in zip(owners, walks.PAIR, strict=True):
            a = {n: t.clone() for n, t in owner.averages().items()}
            if a:
                seen[step, rf.power_ema(sigma_rel).weight.gamma] = (a, walks.distance(a, weights))

    walks.walked(model, owners, Snapshots(tmp_path, every=10), last=35, behind=look)
    found = snapshots_in(tmp_path)
    assert steps(tmp_path) == [20, 20, 30, 30]  # at 10 there was no average
    for snapshot in found:
        about = snapshot.about
        average, distance = seen[about.step, about.gamma]
        assert same(held(snapshot), average)
        assert (about.origin, about.rank, about.world) == (15, 0, 1)
        assert about.profile == (about.step - 15, about.gamma)
        assert about.distance == pytest.approx(distance, rel=1e-6)
        norm = walks.distance(average, {n: torch.zeros(()) for n in average})
        assert about.norm == pytest.approx(norm, rel=1e-6)
        assert snapshot.reader.file.name == about.name
    assert len({snapshot.about.run for snapshot in found}) == 1
    assert len({snapshot.about.model for snapshot in found}) == 1


def test_a_fused_optimizer_with_a_mean_has_snapshots_of_power_0(tmp_path: Path) -> None:
    model = walks.Small()
    opt = rf.FusedAdamW(model.parameters(), average=rf.mean(every=3))
    snapshots = Snapshots(tmp_path, every=10)
    written = []
    for _ in range(20):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        written.append(snapshots.update(opt, model))
    assert [bool(files) for files in written] == ([False] * 9 + [True]) * 2
    assert [(s.about.step, s.about.gamma) for s in snapshots_in(tmp_path)] == [(9, 0), (18, 0)]
    assert same(held(snapshots_in(tmp_path)[-1]), opt.averages(model))


def test_two_optimizers_with_one_policy_have_parts_of_one_average(tmp_path: Path) -> None:
    model = walks.Small()
    average = rf.power_ema(0.1)
    opts = [
        rf.FusedSGD([model.matrix, model.none], lr=0.1, average=average),
        rf.FusedAdamW([model.conv, model.scalar], average=average),
    ]
    snapshots = Snapshots(tmp_path, every=10)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for opt in opts:
            opt.step()
        snapshots.update(opts, model)
    (snapshot,) = snapshots_in(tmp_path)
    assert same(held(snapshot), {**opts[0].averages(model), **opts[1].averages(model)})
    assert held(snapshot).keys() == {name for name, _ in model.named_parameters()}


def test_several_averages_of_one_optimizer_are_each_a_snapshot(tmp_path: Path) -> None:
    pytest.importorskip("rbwa_fused.several")
    model = walks.Small()
    averages = {"short": rf.power_ema(0.05), "ema": rf.ema(0.9), "long": rf.power_ema(0.1)}
    opt: Any = rf.FusedSGD(model.parameters(), lr=0.1, average=averages)  # type: ignore[arg-type]
    snapshots = Snapshots(tmp_path, every=10)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        snapshots.update(opt, model)
    long, short = snapshots_in(tmp_path)
    assert same(held(short), opt.averages(model, which="short"))
    assert same(held(long), opt.averages(model, which="long"))


def test_what_has_no_new_sample_is_not_written_again(tmp_path: Path) -> None:
    model = walks.Small()
    owner = rf.Averager(model, rf.power_ema(0.1, every=25))
    snapshots = Snapshots(tmp_path, every=10)
    written = {}
    for step in range(1, 61):
        walks.walk(model, step)
        owner.update()
        written[step] = len(snapshots.update(owner))
    assert steps(tmp_path) == [25, 50]
    assert [step for step, files in written.items() if files] == [30, 50]


def test_what_an_average_holds_before_its_start_is_no_snapshot(tmp_path: Path) -> None:
    trained(tmp_path, rf.power_ema(0.1, start=15, initial="now"))
    assert steps(tmp_path) == [20, 30]


def test_a_call_that_comes_seldom_misses_no_snapshot(tmp_path: Path) -> None:
    model = walks.Small()
    owner = rf.Averager(model, rf.power_ema(0.1))
    snapshots = Snapshots(tmp_path, every=10)
    for step in range(1, 31):
        walks.walk(model, step)
        owner.update()
        if step % 7 == 1:
            snapshots.update(owner)
    assert steps(tmp_path) == [15, 22]  # behind 10 and 20, at the next call


def test_a_device_that_counts_is_read_only_when_a_snapshot_may_be_due(
    tmp_path: Path, emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read waits for a GPU. Every third step is skipped, as by a scaler: calls are no steps."""
    model = nn.Linear(3, 2)
    options: Any = {"backend": "cuda", "capturable": True}
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.power_ema(0.1), **options)
    snapshots, reads = Snapshots(tmp_path, every=10), []
    real = type(opt.engine).read_back
    monkeypatch.setattr(type(opt.engine), "read_back", lambda self: (reads.append(1), real(self)))
    read_by_call = []
    for call in range(1, 46):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.found_inf = torch.tensor(float(call % 3 == 0))  # type: ignore[attr-defined]
        opt.step()
        del reads[:]
        snapshots.update(opt, model)
        read_by_call.append(bool(reads))
    assert opt.engine.device_counters is not None
    assert steps(tmp_path) == [10, 20, 30]
    assert sum(read_by_call) < 20


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_held_and_windows_in_any_case(keep: int, tmp_path: Path) -> None:
    model = walks.Small()
    owners = [*walks.averagers(model), rf.Averager(model, rf.merge(2, 7))]
    walks.walked(model, owners, Snapshots(tmp_path, every=10, keep=keep), last=50)
    windows = [s for s in snapshots_in(tmp_path) if s.about.gamma is None]
    assert [s.about.step for s in windows] == [7]
    expected = [step for step in range(10, 60, 10) for _ in walks.PAIR][-2 * keep :]
    assert steps(tmp_path)[1:] == expected


@pytest.mark.parametrize("every", [5, 1000])
def test_a_window_is_written_once_it_is_over_whatever_every_says(
    every: int, tmp_path: Path
) -> None:
    model = walks.Small()
    owner = rf.Averager(model, rf.merge(3, 18, "sqrt", every=4))
    at: list[dict[str, Tensor]] = []
    snapshots = Snapshots(tmp_path, every=every)

    def look(step: int) -> None:
        assert bool(names(tmp_path)) == (step >= 18)
        at.append({n: t.clone() for n, t in owner.averages().items()})

    walks.walked(model, [owner], snapshots, last=40, behind=look)
    (snapshot,) = snapshots_in(tmp_path)
    assert (snapshot.about.step, snapshot.about.gamma) == (15, None)
    assert same(held(snapshot), at[-1])


def test_a_parameter_that_is_unfrozen_late_is_in_all_snapshots(tmp_path: Path) -> None:
    model = walks.Small()
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.power_ema(0.1))
    snapshots = Snapshots(tmp_path, every=10)
    for step in range(1, 31):
        for name, p in model.named_parameters():
            p.grad = torch.ones_like(p) if name != "conv" or step > 15 else None
        opt.step()
        snapshots.update(opt, model)
    first, *_, last = snapshots_in(tmp_path)
    assert first.about.model == last.about.model
    assert held(first)["conv"].equal(walks.Small().conv)
    assert held(last)["conv"].equal(opt.averages(model)["conv"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_that_was_asked_for_is_that_of_the_files(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    _, owner = trained(tmp_path, rf.power_ema(0.1), dtype=dtype)
    last = held(snapshots_in(tmp_path)[-1])
    assert same(last, {n: t.to(dtype) for n, t in owner.averages().items()})


def test_what_it_will_cost_is_said_before_the_first_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = walks.Small()
    owners = walks.averagers(model)
    snapshots = Snapshots(tmp_path, every=10, keep=3, dtype=torch.float16)
    elements = sum(p.numel() for p in model.parameters())
    assert snapshots.bytes_of(owners) == 2 * 2 * elements
    with caplog.at_level("INFO", "rbwa_fused.posthoc"):
        walks.walked(model, owners, snapshots, last=1)
    (said,) = caplog.messages
    assert "0.0 MB a snapshot every 10 steps, at most 0.0 MB" in said and "MB are free" in said
    assert names(tmp_path) == []


def test_a_disk_that_is_too_small_is_said_before_the_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    model = walks.Small()
    with pytest.warns(UserWarning, match="the disk is too small for snapshots: .* 0.0 MB are free"):
        walks.walked(model, walks.averagers(model), Snapshots(tmp_path, every=10), last=1)


def test_on_a_full_disk_training_goes_on_the_old_ones_stay_and_one_warning_says_so(
    tmp_path: Path,
) -> None:
    model = walks.Small()
    owners, snapshots = walks.averagers(model), Snapshots(tmp_path, every=10, keep=1)
    walks.walked(model, owners, snapshots, last=10)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(), pytest.warns(UserWarning, match="no snapshot was written") as warned:
        walks.walked(model, owners, snapshots, 11, 39)
    assert len(warned) == 1 and "File too large" in str(warned[0].message)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walks.walked(model, owners, snapshots, 40, 40)  # there is room again
    assert steps(tmp_path) == [40, 40]


# ---- resumed runs --------------------------------------------------------------------------------


def resumed(owners: list[Any]) -> tuple[nn.Module, list[Any]]:
    """A new process's model and averages, which go on with these."""
    model = walks.Small()
    new = walks.averagers(model)
    for old, own in zip(owners, new, strict=True):
        own.load_state_dict(old.state_dict())
    return model, new


def test_a_resumed_run_replaces_what_it_comes_by_again_and_removes_later_steps(
    tmp_path: Path,
) -> None:
    model = walks.Small()
    owners = walks.averagers(model)
    snapshots = Snapshots(tmp_path, every=10)
    walks.walked(model, owners, snapshots, last=25)
    later, own = resumed(owners)
    walks.walked(model, owners, snapshots, 26, 50)  # its checkpoints of these steps are lost
    (tmp_path / f"{names(tmp_path)[0]}.part").write_bytes(b"half")  # killed in a write
    before = {s.about.name: s for s in snapshots_in(tmp_path)}
    again = Snapshots(tmp_path, every=10)
    walks.walked(later, own, again, 26, 29)
    assert steps(tmp_path) == sorted([10, 20, 30, 40, 50] * 2)
    walks.walked(later, own, again, 30, 35)
    assert steps(tmp_path) == [10, 10, 20, 20, 30, 30]
    assert all(name.endswith(".safetensors") for name in names(tmp_path))
    last = snapshots_in(tmp_path)[-1]
    assert last.about.run == before[last.about.name].about.run
    walks.walked(later, own, again, 36, 40)
    found = {s.about.gamma: s for s in snapshots_in(tmp_path)[-2:]}
    for owner, sigma_rel in zip(own, walks.PAIR, strict=True):
        assert same(held(found[gamma_of(sigma_rel)]), owner.averages())


def test_a_new_run_does_not_mix_with_the_snapshots_of_another(tmp_path: Path) -> None:
    trained(tmp_path, rf.power_ema(0.1))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="has snapshots, and this run has only begun"):
        trained(tmp_path, rf.power_ema(0.1))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_earlier_checkpoint_may_be_loaded_under_the_same_snapshots(tmp_path: Path) -> None:
    model = walks.Small()
    (owner,) = owners = [rf.Averager(model, rf.power_ema(0.1))]
    snapshots = Snapshots(tmp_path, every=10)
    walks.walked(model, owners, snapshots, last=15)
    saved = copy.deepcopy((model.state_dict(), owner.state_dict()))
    walks.walked(model, owners, snapshots, 16, 39)
    expected = {s.about.name: held(s) for s in snapshots_in(tmp_path)}
    model.load_state_dict(saved[0])
    owner.load_state_dict(saved[1])
    walks.walked(model, owners, snapshots, 16, 25)
    assert steps(tmp_path) == [10, 20]
    assert all(same(held(s), expected[s.about.name]) for s in snapshots_in(tmp_path))
    other = walks.Small()
    with pytest.raises(ValueError, match="this run has only begun"):
        walks.walked(other, [rf.Averager(other, rf.power_ema(0.1))], snapshots)


def test_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    trained(tmp_path, rf.power_ema(0.1))
    before = names(tmp_path)
    model = nn.Linear(3, 2)
    owner = rf.Averager(model, rf.power_ema(0.1))
    for _ in range(12):
        owner.update()
    with pytest.raises(ValueError, match="is of another model "):
        Snapshots(tmp_path, every=10).update(owner)
    assert names(tmp_path) == before


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "Invalid every: 0"),
        ({"every": 1, "keep": 0}, "Invalid keep: 0"),
        ({"every": 1, "dtype": torch.int8}, "Invalid dtype: torch.int8"),
    ],
)
def test_bad_arguments_are_named(options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        Snapshots(tmp_path, **options)


@pytest.mark.parametrize(
    ("averages", "said"),
    [
        ([rf.ema(0.9)], r"Invalid averages: \[ema\(0.9\)\] \(expected one with a profile"),
        ([rf.power_ema(gamma=-0.5)], "expected one with a profile"),
        ([rf.power_ema(0.1), rf.power_ema(0.05, start=5)], "expected all to start at one step"),
        ([rf.power_ema(0.1), rf.power_ema(0.1, every=2)], "expected one for each profile"),
    ],
)
def test_averages_without_a_use_are_refused_at_the_first_step(
    averages: Any, said: str, tmp_path: Path
) -> None:
    model = walks.Small()
    owners = [rf.Averager(model, average) for average in averages]
    with pytest.raises(ValueError, match=said):
        Snapshots(tmp_path, every=10).update(owners, model)


def test_what_has_no_averages_or_no_names_is_refused(tmp_path: Path) -> None:
    model = walks.Small()
    with pytest.raises(TypeError, match=r"Invalid opt: SGD \(expected"):
        Snapshots(tmp_path, every=1).update(torch.optim.SGD(model.parameters()), model)  # type: ignore[arg-type]
    opt = rf.FusedSGD(model.parameters(), average=rf.power_ema(0.1))
    with pytest.raises(TypeError, match="Invalid model: None"):
        Snapshots(tmp_path, every=1).update(opt)
    with pytest.raises(ValueError, match=r"Invalid opt: \[\]"):
        Snapshots(tmp_path, every=1).update([], model)


def test_param_groups_with_different_policies_are_refused(tmp_path: Path) -> None:
    model = walks.Small()
    groups = [
        {"params": [model.matrix], "average": rf.power_ema(0.1)},
        {"params": [model.conv], "average": rf.power_ema(0.05)},
    ]
    opt = rf.FusedSGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"the param groups have power_ema.* and power_ema"):
        Snapshots(tmp_path, every=1).update(opt, model)


def test_a_file_of_others_in_the_folder_is_no_snapshot(tmp_path: Path) -> None:
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("")
    trained(tmp_path, rf.power_ema(0.1))
    assert steps(tmp_path) == [10, 20, 30]
    assert Reader(tmp_path / "model.safetensors").kinds.keys() == {"a"}


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "posthoc.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model = walks.Small()

    def train(model: nn.Module, opt: Any, batch: int) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()

    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "model": model, "loader": range(20), "train": train}
    exec(block.replace("every=1000", "every=2"), names)
    assert len(list((tmp_path / "averages").iterdir())) == 20
    assert rf.posthoc.synthesize("averages", sigma_rel=0.075).residual < 0.02
