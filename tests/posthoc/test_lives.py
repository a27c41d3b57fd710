"""Lives of a run: what one that was resumed or rolled back, and another run, find in a folder."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import walks
from torch import nn

import rbwa_fused as rf
from rbwa_fused.posthoc import Snapshots, synthesize
from rbwa_fused.posthoc.folder import snapshots_in

Saved = tuple[Any, Any]


def fused(**options: Any) -> tuple[nn.Module, Any]:
    model = nn.Linear(4, 4)
    return model, rf.FusedSGD(
        model.parameters(), lr=0.1, average=options.pop("average", rf.power_ema(0.1)), **options
    )


def stepped(model: nn.Module, opt: Any, snapshots: Snapshots | None, count: int = 1) -> None:
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
        if snapshots is not None:
            snapshots.update(opt, model)


def saved(model: nn.Module, opt: Any) -> Saved:
    return copy.deepcopy((model.state_dict(), opt.state_dict()))


def load(model: nn.Module, opt: Any, checkpoint: Saved) -> None:
    model.load_state_dict(checkpoint[0])
    opt.load_state_dict(checkpoint[1])


def steps(folder: Path) -> list[int]:
    return [s.about.step for s in snapshots_in(folder)]


def last_is(folder: Path, model: nn.Module, opt: Any) -> bool:
    made = synthesize(folder, sigma_rel=0.1).state_dict
    return made is not None and all(
        torch.allclose(made[n], a, atol=1e-5) for n, a in opt.averages(model).items()
    )


def test_a_resumed_run_that_writes_seldomer_holds_none_of_the_life_that_was_given_up(
    tmp_path: Path,
) -> None:
    model, opt = fused()
    stepped(model, opt, Snapshots(tmp_path, every=10), 45)
    checkpoint = saved(model, opt)
    stepped(model, opt, Snapshots(tmp_path / "x", every=1000), 1)  # nothing of it is written here
    model, opt = fused()
    load(model, opt, checkpoint)
    stepped(model, opt, Snapshots(tmp_path, every=10), 50)
    assert steps(tmp_path) == [*range(10, 100, 10)]
    model, opt = fused()
    load(model, opt, checkpoint)
    snapshots = Snapshots(tmp_path, every=30)
    stepped(model, opt, snapshots, 14)
    assert steps(tmp_path) == [*range(10, 100, 10)]  # until there is something better
    stepped(model, opt, snapshots)
    assert steps(tmp_path) == [10, 20, 30, 40, 60]
    assert last_is(tmp_path, model, opt)


@pytest.mark.parametrize("back", [1, 3])
def test_a_step_that_is_taken_again_replaces_its_snapshot(back: int, tmp_path: Path) -> None:
    model, opt = fused()
    snapshots = Snapshots(tmp_path, every=10)
    stepped(model, opt, snapshots, 10 - back)
    checkpoint = saved(model, opt)
    stepped(model, opt, snapshots, back)
    load(model, opt, checkpoint)
    stepped(model, opt, snapshots, back)
    assert steps(tmp_path) == [10] and last_is(tmp_path, model, opt)


def test_a_rollback_to_the_first_step_stays_the_same_run(tmp_path: Path) -> None:
    model, opt = fused()
    snapshots, checkpoint = Snapshots(tmp_path, every=5), saved(model, opt)
    stepped(model, opt, snapshots, 12)
    (run,) = {s.about.run for s in snapshots_in(tmp_path)}
    load(model, opt, checkpoint)
    stepped(model, opt, snapshots, 5)
    assert [(s.about.step, s.about.run) for s in snapshots_in(tmp_path)] == [(5, run)]


def test_a_new_run_whose_first_call_comes_late_takes_nothing_away(tmp_path: Path) -> None:
    model, opt = fused()
    stepped(model, opt, Snapshots(tmp_path, every=10), 60)
    model, opt = fused()
    stepped(model, opt, None, 30)
    with pytest.raises(ValueError, match="has snapshots, and this run has only begun"):
        Snapshots(tmp_path, every=30).update(opt, model)
    assert steps(tmp_path) == [10, 20, 30, 40, 50, 60]


def test_a_second_snapshots_of_one_life_goes_on_with_the_first_ones(tmp_path: Path) -> None:
    model, opt = fused()
    stepped(model, opt, Snapshots(tmp_path, every=10), 30)
    stepped(model, opt, Snapshots(tmp_path, every=15), 30)
    assert steps(tmp_path) == [10, 20, 30, 45, 60]


def test_where_only_later_snapshots_are_there_a_warning_names_them_first(tmp_path: Path) -> None:
    model, opt = fused()
    snapshots = Snapshots(tmp_path, every=5)
    stepped(model, opt, snapshots, 3)
    checkpoint = saved(model, opt)
    stepped(model, opt, snapshots, 4)
    model, opt = fused()
    load(model, opt, checkpoint)
    with pytest.warns(UserWarning, match=r"of steps behind 3 alone.*step-000000005\.gamma"):
        stepped(model, opt, Snapshots(tmp_path, every=4))
    assert steps(tmp_path) == [4]


def test_a_window_whose_life_ended_before_it_was_written_is_written_by_the_next(
    tmp_path: Path,
) -> None:
    model, opt = fused(average=rf.merge(0, 12))
    stepped(model, opt, Snapshots(tmp_path, every=1000), 11)
    stepped(model, opt, None)
    checkpoint = saved(model, opt)
    for _ in range(2):  # the second finds it
        model, opt = fused(average=rf.merge(0, 12))
        load(model, opt, checkpoint)
        stepped(model, opt, Snapshots(tmp_path, every=1000))
        assert steps(tmp_path) == [12]


def test_windows_that_end_together_have_files_of_their_own(tmp_path: Path) -> None:
    model = walks.Small()
    owners = [rf.Averager(model, rf.merge(0, 10, decay)) for decay in ("linear", "sqrt")]
    walks.walked(model, owners, Snapshots(tmp_path, every=5), last=12)
    assert steps(tmp_path) == [10, 10]
    read = [s.reader.read("matrix") for s in snapshots_in(tmp_path)]
    own = [owner.averages()["matrix"].reshape(-1) for owner in owners]
    assert any(read[0].equal(a) for a in own) and any(read[1].equal(a) for a in own)
    assert not read[0].equal(read[1])


def test_equal_policies_in_other_words_are_one(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    groups = [
        {"params": [model.weight], "average": rf.power_ema(0.1)},
        {"params": [model.bias], "average": rf.power_ema(gamma=rf.power_ema(0.1).weight.gamma)},  # type: ignore[union-attr]
    ]
    assert repr(groups[0]["average"]) != repr(groups[1]["average"])
    opt = rf.FusedSGD(groups, lr=0.1)
    stepped(model, opt, Snapshots(tmp_path, every=2), 2)
    (snapshot,) = snapshots_in(tmp_path)
    assert snapshot.reader.kinds.keys() == {"weight", "bias"}


def test_owners_that_have_counted_different_steps_are_refused(tmp_path: Path) -> None:
    model = walks.Small()
    first, second = walks.averagers(model)
    walks.walked(model, [first], None, last=5)
    with pytest.raises(ValueError, match=r"Averager at place 1 has counted 0 steps and .* 0 5 "):
        Snapshots(tmp_path, every=10).update([first, second])


def test_a_second_snapshots_in_the_folder_is_refused_at_its_first_write(tmp_path: Path) -> None:
    model = walks.Small()
    pairs = [(owner, Snapshots(tmp_path, every=10)) for owner in walks.averagers(model)]
    for step in range(1, 10):
        walks.walk(model, step)
        for owner, snapshots in pairs:
            owner.update()
            snapshots.update(owner)
    for owner, _ in pairs:
        owner.update()
    pairs[0][1].update(pairs[0][0])
    with pytest.raises(ValueError, match="of another Snapshots"):
        pairs[1][1].update(pairs[1][0])
    assert steps(tmp_path) == [10]


def test_averages_in_the_place_of_the_weights_are_no_snapshot(tmp_path: Path) -> None:
    model, opt = fused()
    snapshots = Snapshots(tmp_path, every=5)
    stepped(model, opt, snapshots, 4)
    stepped(model, opt, None)
    with opt.averaged(model), pytest.raises(RuntimeError, match="inside averaged"):
        snapshots.update(opt, model)
    snapshots.update(opt, model)
    assert steps(tmp_path) == [5] and snapshots_in(tmp_path)[0].about.distance > 0


def test_parameters_that_come_or_go_on_the_way_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = rf.FusedSGD(model[0].parameters(), lr=0.1, average=rf.power_ema(0.1))
    snapshots = Snapshots(tmp_path, every=10)
    stepped(model, opt, snapshots, 15)
    opt.add_param_group({"params": list(model[1].parameters())})
    with pytest.warns(UserWarning, match="are averaged are others than before step 20"):
        stepped(model, opt, snapshots, 15)
    with pytest.raises(ValueError, match=r"is of another model .*: it alone has 1\.bias, 1\.weig"):
        synthesize(tmp_path, sigma_rel=0.1)


def test_what_others_do_in_the_folder_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    model, opt = fused()
    snapshots = Snapshots(tmp_path, every=5)
    stepped(model, opt, snapshots, 3)
    checkpoint = saved(model, opt)
    (tmp_path / "other.safetensors").write_bytes(b"")
    stepped(model, opt, snapshots, 9)
    load(model, opt, checkpoint)
    stepped(model, opt, snapshots, 2)
    assert steps(tmp_path) == [5] and last_is(tmp_path, model, opt)
    for file in [*tmp_path.glob("*.safetensors")]:
        file.rmdir() if file.is_dir() else file.unlink()
    tmp_path.rmdir()
    load(model, opt, checkpoint)
    with pytest.warns(UserWarning, match="no snapshot was written"):
        stepped(model, opt, snapshots, 7)


# ---- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_what_float16_loses_of_small_weights_is_measured(size: float, tmp_path: Path) -> None:
    model = nn.Linear(50, 50, bias=False)
    nn.init.normal_(model.weight, std=size)
    opt = rf.FusedSGD(model.parameters(), lr=size / 10, average=rf.power_ema(0.1))
    stepped(model, opt, Snapshots(tmp_path, every=10, dtype=torch.float16), 40)
    made = synthesize(tmp_path, sigma_rel=0.1, most=1e9)
    average = opt.averages(model)["weight"]
    assert made.state_dict is not None
    measured = (made.state_dict["weight"] - average).norm() / (average - model.weight).norm()
    assert made.rounding == pytest.approx(measured.item(), rel=0.05)


def test_what_float16_does_not_hold_is_one_warning_and_no_file(tmp_path: Path) -> None:
    model, opt = fused()
    with torch.no_grad():
        dict(model.named_parameters())["bias"].fill_(1e5)
    snapshots = Snapshots(tmp_path, every=1, dtype=torch.float16)
    with pytest.warns(UserWarning, match=r"float16 does not hold 1e\+05 of bias"):
        stepped(model, opt, snapshots)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(model, opt, snapshots, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_with_another_dtype_says_what_rounding_costs(tmp_path: Path) -> None:
    model, opt = fused()
    stepped(model, opt, Snapshots(tmp_path, every=10), 20)
    checkpoint = saved(model, opt)
    model, opt = fused()
    load(model, opt, checkpoint)
    stepped(model, opt, Snapshots(tmp_path, every=10, dtype=torch.bfloat16), 20)
    made = synthesize(tmp_path, sigma_rel=0.1, most=10.0)
    assert made.rounding > 0.0 and made.state_dict is not None
    assert made.state_dict["weight"].dtype == torch.float32
