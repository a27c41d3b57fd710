"""Lightning's callback: averages while it evaluates, the training weights in all else."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fits import (
    BATCHES,
    HOOKS,
    QUIET,
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
from rbwa_fused.integrations import lightning
from rbwa_fused.integrations.lightning import AveragedEvaluation

pytestmark = QUIET


def test_the_sanity_check_and_early_epochs_see_the_training_weights(tmp_path: Path) -> None:
    averaged, _ = fit(tmp_path, AveragedEvaluation(), num_sanity_val_steps=2)
    live, _ = fit(tmp_path, num_sanity_val_steps=2)
    early = 2 + BATCHES  # the sanity check and the first epoch
    assert averaged.seen[:early] == live.seen[:early]
    differ = [a != b for a, b in zip(averaged.seen[early:], live.seen[early:], strict=True)]
    assert all(differ) and len(differ) == 3 * BATCHES
    assert held(averaged) == held(live)


@pytest.mark.parametrize(
    ("stage", "end"),
    [
        ("validate", "on_validation_end"),
        ("test", "on_test_end"),
        ("predict", "on_predict_end"),
    ],
)
def test_after_a_fit_its_trainer_evaluates_the_averages(
    stage: str, end: str, tmp_path: Path
) -> None:
    model, run = fit(tmp_path, AveragedEvaluation())
    before, state = held(model), result(run.optimizers[0])
    averaged = digests(run.optimizers[0].averaged_state_dict(model))
    model.seen.clear()
    ended = []
    setattr(
        model,
        f"on_{stage.replace('validate', 'validation')}_end",
        lambda: ended.append(held(model)),
    )
    options: dict[str, Any] = {} if stage == "predict" else {"verbose": False}
    getattr(run, stage)(model, loader(), **options)
    assert [weights for weights, _ in model.seen] == [averaged] * BATCHES
    assert ended == [before]
    assert averaged != before == held(model)
    assert result(run.optimizers[0]) == state


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_statistics_are_estimated_for_each_evaluation_and_leave_training_alone(
    precision: str, tmp_path: Path
) -> None:
    model, run = fit(tmp_path, AveragedEvaluation(loader=loader()), precision=precision)
    plain, _ = fit(tmp_path, AveragedEvaluation(), precision=precision)
    assert held(model) == held(plain)
    assert model.seen[:BATCHES] == plain.seen[:BATCHES]  # before the first sample
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        estimate = rf.averaged_model(run.optimizers[0], model, loader())
        with estimate:
            expected = held(model)
    assert model.seen[-1][0] == expected != plain.seen[-1][0]


class FrozenByTrain(Net):
    """BatchNorm stays in eval mode, as fine-tuning has it."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.net[1].eval()
        return self


class FrozenByEpoch(Net):
    def on_train_epoch_start(self) -> None:
        self.net[1].eval()


@pytest.mark.parametrize("make", [FrozenByTrain, FrozenByEpoch])
def test_frozen_statistics_are_evaluated_as_they_are(make: type[Net], tmp_path: Path) -> None:
    model, plain = make().train(), make().train()
    for m, options in ((model, {"loader": loader()}), (plain, {})):
        m.net[1].running_mean.fill_(0.25)
        trainer(tmp_path, AveragedEvaluation(**options)).fit(m, loader(), loader())
    assert model.seen == plain.seen
    assert held(model) == held(plain)
    assert (model.net[1].running_mean == 0.25).all()


# ---- exceptions --------------------------------------------------------------------------------


class Raise(pl.Callback):  # type: ignore[misc]
    """Raises in a hook of the third epoch, where averages are live."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.training: tuple[Any, ...] = ()
        self.error = error
        setattr(self, hook, self.fail)

    def on_train_batch_end(self, trainer: Any, model: Any, *rest: Any) -> None:
        self.training = held(model), result(trainer.optimizers[0])

    def fail(self, trainer: Any, model: Any, *rest: Any) -> None:
        if trainer.current_epoch == 2:
            assert held(model) != self.training[0]
            raise self.error


class RaiseAgain(Raise):
    """Keeps the callbacks behind it from hearing of the exception."""

    def on_exception(self, *args: Any) -> None:
        raise RuntimeError("again")


@pytest.fixture
def _sigint() -> Iterator[None]:
    """After an interrupt Lightning ignores the next ones for good."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("hook", HOOKS)
def test_training_weights_come_back_when_validation_raises_or_is_interrupted(
    hook: str, error: BaseException, tmp_path: Path
) -> None:
    failing = Raise(hook, error)
    model = Net()
    run = trainer(tmp_path, failing, AveragedEvaluation(loader=loader()))
    left = SystemExit if isinstance(error, KeyboardInterrupt) else KeyError
    with pytest.raises(left):
        run.fit(model, loader(), loader())
    assert (held(model), result(run.optimizers[0])) == failing.training
    model.loss(next(iter(loader()))).backward()
    run.optimizers[0].step()


def test_training_weights_come_back_when_the_next_fit_begins_at_the_latest(tmp_path: Path) -> None:
    failing = RaiseAgain("on_validation_batch_end", KeyError("mine"))
    ours = AveragedEvaluation()
    model = Net()
    with pytest.raises(RuntimeError, match="again"):
        trainer(tmp_path, failing, ours).fit(model, loader(), loader())
    assert held(model) != failing.training[0]
    seen = []
    model.on_fit_start = lambda: seen.append(held(model))
    trainer(tmp_path, ours, max_epochs=0).fit(model, loader(), loader())
    assert seen == [failing.training[0]]


def test_training_weights_come_back_when_a_tuner_breaks_off(tmp_path: Path) -> None:
    model = Net()
    failing = Raise("on_validation_batch_end", pl.utilities.exceptions._TunerExitException())
    run = trainer(tmp_path, failing, AveragedEvaluation())
    run.fit(model, loader(), loader())
    assert (held(model), result(run.optimizers[0])) == failing.training


def test_statistics_that_cannot_be_estimated_leave_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[Any]:
        yield next(iter(loader()))
        raise KeyError("mine")

    class Remember(Raise):
        def on_validation_start(self, trainer: Any, model: Any) -> None:
            self.training = held(model), result(trainer.optimizers[0])

    before = Remember("on_fit_end", KeyError())
    model = Net()
    run = trainer(tmp_path, before, AveragedEvaluation(loader=broken()))
    with pytest.raises(KeyError, match="mine"):
        run.fit(model, loader(), loader())
    assert (held(model), result(run.optimizers[0])) == before.training


# ---- what is missing ---------------------------------------------------------------------------


def test_an_optimizer_of_somebody_else_is_no_silent_success(tmp_path: Path) -> None:
    def sgd(model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"\['SGD'\].*rbwa_fused"):
        fit(tmp_path, AveragedEvaluation(), configure=sgd)


class Forwardless(pl.LightningModule):  # type: ignore[misc]
    """All of it is in its training step."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), *layers)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.layers(batch[0])

    def configure_optimizers(self) -> Any:
        return rf.FusedSGD(self.parameters(), lr=0.1, average=rf.ema(0.9))


def test_statistics_of_a_module_without_forward_are_refused_before_the_fit(tmp_path: Path) -> None:
    ours = AveragedEvaluation(loader=loader())
    with pytest.raises(ValueError, match="Forwardless has no forward to estimate its BatchNorm"):
        trainer(tmp_path, ours).fit(Forwardless(nn.BatchNorm1d(3)), loader(), loader())
    for fine in (Forwardless(), Forwardless(nn.BatchNorm1d(3, track_running_stats=False))):
        trainer(tmp_path, ours).fit(fine, loader(), loader())


def imported_anew() -> ModuleType:
    spec = importlib.util.spec_from_file_location("anew", lightning.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_lightning_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", *lightning.NAMES):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install pytorch-lightning, or"):
        imported_anew()


@pytest.mark.parametrize("name", lightning.NAMES)
def test_either_lightning_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(n for n in lightning.NAMES if n != name)
    if name.startswith("lightning"):
        monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    else:
        monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, name, pl)
    assert imported_anew().AveragedEvaluation.__mro__[1] is pl.Callback


def test_the_lightning_in_use_is_taken_and_the_other_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").touch()
    (tmp_path / "lightning" / "pytorch.py").write_text("raise AssertionError('imported')")
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", pl)
    assert imported_anew().AveragedEvaluation.__mro__[1] is pl.Callback
