"""Snapshots that the callbacks of Lightning and transformers write, and runs that are resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
import trainers
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.integrations.lightning import AveragedEvaluation
from rbwa_fused.integrations.transformers import AveragedWeights
from rbwa_fused.posthoc import Snapshots, synthesize
from rbwa_fused.posthoc.folder import snapshots_in

safetensors = pytest.importorskip("safetensors.torch")

pytestmark = [*fits.QUIET, *trainers.QUIET]

POLICY = rf.power_ema(0.1, start=2)


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {f.name: safetensors.load_file(f) for f in sorted(folder.iterdir())}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[f].keys() == b[f].keys() and all(a[f][n].equal(b[f][n]) for n in a[f]) for f in a
    )


def by_hand(folder: Path, configure: fits.Configure) -> dict[str, dict[str, Tensor]]:
    """The snapshots of the loop that Lightning's fit equals."""
    model = fits.Net(configure)
    opt = configure(model)
    owner = opt if isinstance(opt, rf.FusedSGD) else rf.Averager(model, POLICY, optimizer=opt)
    snapshots = Snapshots(folder, every=4)
    for _ in range(fits.EPOCHS):
        for batch in fits.loader():
            opt.zero_grad()
            model.loss(batch).backward()
            opt.step()
            snapshots.update(owner, model)
    return files(folder)


def ours(model: nn.Module) -> Any:
    return rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=POLICY)


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


@pytest.mark.parametrize("configure", [ours, adamw])
def test_a_fit_writes_what_the_loop_by_hand_would(
    configure: Callable[[Any], Any], tmp_path: Path
) -> None:
    expected = by_hand(tmp_path / "hand", configure)
    snapshots = Snapshots(tmp_path / "fit", every=4)
    average = None if configure is ours else POLICY
    callback = AveragedEvaluation(average=average, snapshots=snapshots)
    fits.fit(tmp_path, callback, configure=configure)
    assert len(expected) == 5 and same(files(tmp_path / "fit"), expected)
    assert synthesize(tmp_path / "fit", sigma_rel=0.11).residual < 0.1


def test_a_resumed_fit_ends_with_the_snapshots_of_the_one_that_never_stopped(
    tmp_path: Path,
) -> None:
    def callback(name: str) -> AveragedEvaluation:
        return AveragedEvaluation(
            average=POLICY, snapshots=Snapshots(tmp_path / name, every=3, keep=4)
        )

    saving = fits.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fits.fit(tmp_path, callback("whole"), saving, configure=adamw)
    expected = files(tmp_path / "whole")
    fits.fit(tmp_path, callback("killed"), configure=adamw, max_epochs=3)
    fits.fit(tmp_path, callback("killed"), configure=adamw, ckpt=tmp_path / "epoch=1.ckpt")
    assert same(files(tmp_path / "killed"), expected)
    assert len({s.about.run for s in snapshots_in(tmp_path / "killed")}) == 1


def test_a_trainer_writes_snapshots_and_resumes_them(tmp_path: Path) -> None:
    def callback(name: str) -> AveragedWeights:
        return AveragedWeights(POLICY, snapshots=Snapshots(tmp_path / name, every=4))

    often = {"save_strategy": "steps", "save_steps": 6}
    averaging = callback("whole")
    run = trainers.trainer(tmp_path / "a", averaging, **often)
    run.train()
    averages = trainers.averager_of(averaging).averages()
    expected = files(tmp_path / "whole")
    assert [s.about.step for s in snapshots_in(tmp_path / "whole")] == [4, 8, 12, 16]
    assert expected[min(expected)].keys() == averages.keys()
    first = trainers.trainer(tmp_path / "b", callback("killed"), trainers.Noting(dies=10), **often)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert [s.about.step for s in snapshots_in(tmp_path / "killed")] == [4, 8]
    second = trainers.trainer(tmp_path / "b", callback("killed"), **often)
    second.train(resume_from_checkpoint=True)
    assert same(files(tmp_path / "killed"), expected)


def test_a_trainer_with_an_average_without_a_profile_says_so(tmp_path: Path) -> None:
    averaging = AveragedWeights(rf.ema(0.9), snapshots=Snapshots(tmp_path / "s", every=4))
    with pytest.raises(ValueError, match="expected one with a profile"):
        trainers.trainer(tmp_path, averaging).train()
