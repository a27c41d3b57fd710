"""Checkpoints of Lightning hold the training weights: a resumed fit is one that never stopped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    BATCHES,
    EPOCHS,
    FITS,
    HOOKS,
    QUIET,
    ModelCheckpoint,
    Net,
    fit,
    loader,
    pl,
    trainer,
)
from networks import digests, held
from runs import result
from torch import nn

import rbwa_fused as rf
from rbwa_fused.integrations.lightning import AveragedEvaluation

pytestmark = QUIET

KEY = AveragedEvaluation.KEY


@pytest.mark.parametrize("name", ["ema", "rsgdm", "written back", "scheduler", "bf16-mixed"])
def test_a_fit_resumed_after_any_epoch_is_the_fit_that_never_stopped(
    name: str, tmp_path: Path
) -> None:
    configure, options, _ = FITS[name]
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    expected, run = fit(tmp_path, AveragedEvaluation(), saving, configure=configure, **options)
    for epoch in range(EPOCHS):
        ckpt = tmp_path / f"epoch={epoch}.ckpt"
        model, again = fit(
            tmp_path, AveragedEvaluation(), configure=configure, ckpt=ckpt, **options
        )
        assert result(again.optimizers[0]) == result(run.optimizers[0]), epoch
        assert held(model) == held(expected), epoch
        assert model.seen == expected.seen[(epoch + 1) * BATCHES :], epoch


def test_a_fit_resumed_after_any_batch_is_the_fit_that_never_stopped(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    options = {"val_check_interval": 3, "alike": True}  # in the midst of an epoch too
    expected, run = fit(tmp_path, AveragedEvaluation(), saving, **options)
    for step in range(4, EPOCHS * BATCHES, 4):
        ckpt = tmp_path / f"step={step}.ckpt"
        model, again = fit(tmp_path, AveragedEvaluation(), ckpt=ckpt, **options)
        assert result(again.optimizers[0]) == result(run.optimizers[0]), step
        assert held(model) == held(expected), step
        assert model.seen == expected.seen[len(expected.seen) - len(model.seen) :], step


class Tuned(Net):
    """Its first layers are frozen in the first epoch, and a param group from then on."""

    def __init__(self, average: rf.Average) -> None:
        super().__init__(self.trainable)
        self.save_hyperparameters()
        self.backbone = self.net[:2]

    def trainable(self, model: nn.Module) -> Any:
        params = [p for p in model.parameters() if p.requires_grad]
        return rf.FusedSGD(params, lr=0.1, momentum=0.9, average=self.hparams["average"])


POLICIES = [
    rf.ema(0.8, start=3),
    rf.rbwa(2, 1, "algorithm2"),
    rf.Average(rf.Mean(), dtype=torch.float32),
]


@pytest.mark.parametrize("average", POLICIES, ids=str)
def test_a_fit_with_a_policy_for_a_hyperparameter_and_a_group_added_later_can_be_resumed(
    average: rf.Average, tmp_path: Path
) -> None:
    def tuned(*callbacks: Any, ckpt: Path | None = None) -> tuple[Tuned, Any]:
        thaw = pl.callbacks.BackboneFinetuning(1, verbose=False)
        model, run = Tuned(average), trainer(tmp_path, AveragedEvaluation(), thaw, *callbacks)
        run.fit(model, loader(), loader(), ckpt_path=ckpt)
        return model, run

    expected, run = tuned(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert len(run.optimizers[0].param_groups) == 2
    for epoch in range(EPOCHS):
        ckpt = tmp_path / f"epoch={epoch}.ckpt"
        loaded = torch.load(ckpt, weights_only=True)["hyper_parameters"]["average"]
        assert loaded == average and repr(loaded) == repr(average)
        model, again = tuned(ckpt=ckpt)
        assert len(again.optimizers[0].param_groups) == 2
        assert again.optimizers[0].n_averaged == run.optimizers[0].n_averaged
        if epoch in (0, EPOCHS - 1):  # between them Lightning forgets to thaw the layers again
            assert result(again.optimizers[0]) == result(run.optimizers[0])
            assert held(model) == held(expected)


# ---- saved while averages are live ------------------------------------------------------------


class Saver(pl.Callback):  # type: ignore[misc]
    """Saves once in a hook of the third epoch; notes the training weights, and what is live."""

    def __init__(self, hook: str, folder: Path, weights_only: bool = False) -> None:
        self.path = folder / "saved.ckpt"
        self.weights_only = weights_only
        self.training: dict[str, str | None] = {}
        self.live: dict[str, str | None] = {}
        setattr(self, hook, self.save)

    def on_train_batch_end(self, trainer: Any, model: Any, *rest: Any) -> None:
        if not self.path.exists():
            self.training = held(model)

    def save(self, trainer: Any, model: Any, *rest: Any) -> None:
        if trainer.current_epoch == 2 and not self.path.exists():
            self.live = held(model)
            trainer.save_checkpoint(self.path, self.weights_only)


class Counted:
    """Batches for BatchNorm, and how often they were gone through."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(loader())


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_written_while_averages_are_live_holds_the_training_weights(
    hook: str, statistics: bool, tmp_path: Path
) -> None:
    batches = Counted()
    options: dict[str, Any] = {"loader": batches} if statistics else {}
    saver = Saver(hook, tmp_path)  # its hooks run before the callback's
    model, run = fit(tmp_path, saver, AveragedEvaluation(save_averaged=True, **options))
    assert batches.passes == (3 if statistics else 0)
    saved = torch.load(saver.path, weights_only=True)
    assert digests(saved["state_dict"]) == saver.training
    assert digests(saved[KEY]) == saver.live != saver.training
    unsaved, expected = fit(tmp_path, AveragedEvaluation(**options))
    resumed, again = fit(tmp_path, AveragedEvaluation(**options), ckpt=saver.path)
    assert held(model) == held(unsaved) == held(resumed)
    assert model.seen == unsaved.seen
    for either in (run, again):
        assert result(either.optimizers[0]) == result(expected.optimizers[0])


@pytest.mark.parametrize("hook", HOOKS)
def test_weights_alone_written_while_averages_are_live_are_the_training_weights(
    hook: str, tmp_path: Path
) -> None:
    saver = Saver(hook, tmp_path, weights_only=True)
    model, _ = fit(tmp_path, saver, AveragedEvaluation())
    saved = torch.load(saver.path, weights_only=True)
    assert digests(saved["state_dict"]) == saver.training != saver.live
    assert KEY not in saved and "callbacks" not in saved
    unsaved, _ = fit(tmp_path, AveragedEvaluation())
    assert held(model) == held(unsaved) and model.seen == unsaved.seen


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_averages_saved_beside_the_weights_are_what_a_test_evaluates(
    precision: str, weights_only: bool, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="last", save_weights_only=weights_only)
    ours = AveragedEvaluation(save_averaged=True)
    model, run = fit(tmp_path, ours, saving, precision=precision)
    averaged = digests(run.optimizers[0].averaged_state_dict(model))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert digests(saved[KEY]) == averaged
    assert digests(saved["state_dict"]) == held(model) != averaged
    assert ("optimizer_states" in saved) != weights_only
    fresh = Net()
    tested = trainer(tmp_path, AveragedEvaluation(), precision=precision)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tested.test(fresh, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert [weights for weights, _ in fresh.seen] == [averaged] * BATCHES
    assert not [w for w in seen if "averaged weights" in str(w.message)]


class WithExtraState(Net):
    def get_extra_state(self) -> Any:
        return {"head": self.net[3].weight}

    def set_extra_state(self, state: Any) -> None:
        pass

    def validation_step(self, batch: Any, index: int) -> None:
        self.loss(batch)


def test_weights_that_a_module_saves_as_extra_state_are_averages_there_too(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="last")
    ours = AveragedEvaluation(save_averaged=True)
    trainer(tmp_path, ours, saving).fit(WithExtraState(), loader(), loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key in (KEY, "state_dict"):
        head = saved[key]["_extra_state"]["head"]
        assert torch.equal(head, saved[key]["net.3.weight"]), key
    assert not torch.equal(saved[KEY]["net.3.weight"], saved["state_dict"]["net.3.weight"])


def test_a_checkpoint_before_the_first_sample_has_the_weights_for_averages(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="first")
    model, _ = fit(tmp_path, AveragedEvaluation(save_averaged=True), saving, max_epochs=1)
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert digests(saved[KEY]) == digests(saved["state_dict"]) == held(model)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_test_of_a_checkpoint_without_averages_says_so(
    weights_only: bool, tmp_path: Path
) -> None:
    model, run = fit(tmp_path, AveragedEvaluation())
    run.save_checkpoint(tmp_path / "plain.ckpt", weights_only=weights_only)
    saved = held(model)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.seen.clear()
    with pytest.warns(UserWarning, match=r"plain\.ckpt has no averaged weights"):
        run.test(model, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert [weights for weights, _ in model.seen] == [saved] * BATCHES
