"""Lightning with averages beside optimizers of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside import as_bits
from fits import BATCHES, EPOCHS, QUIET, ModelCheckpoint, Net, ema, fit, loader, trainer
from networks import held

import rbwa_fused as rf
from rbwa_fused.integrations.lightning import AveragedEvaluation

pytestmark = QUIET

POLICY = rf.ema(0.8, start=BATCHES + 2)  # as the optimizer of `ema` has it


def plain(model: Any) -> Any:
    return rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def averager_of(run: Any) -> rf.Averager:
    (callback,) = [c for c in run.callbacks if isinstance(c, AveragedEvaluation)]
    found = callback._averager
    assert found is not None
    return found


def test_it_validates_what_an_optimizer_with_the_average_would(tmp_path: Path) -> None:
    expected, run = fit(tmp_path, AveragedEvaluation(), configure=ema)
    model, again = fit(tmp_path, AveragedEvaluation(average=POLICY), configure=plain)
    assert held(model) == held(expected) and model.seen == expected.seen
    averager = averager_of(again)
    opt = run.optimizers[0]
    assert averager.n_averaged == opt.n_averaged > 0
    assert as_bits(averager.averages()) == as_bits(opt.averages(expected))


def test_of_several_averages_it_validates_the_one_that_is_asked_for(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path, AveragedEvaluation(), configure=ema)
    several = {"other": rf.ema(0.3), "own": POLICY}
    model, _ = fit(tmp_path, AveragedEvaluation(average=several, which="own"), configure=plain)
    assert held(model) == held(expected) and model.seen == expected.seen
    model, _ = fit(tmp_path, AveragedEvaluation(average=several), configure=plain)
    assert held(model) == held(expected) and model.seen != expected.seen


@pytest.mark.parametrize("buffers", [False, True])
def test_a_fit_with_adamw_resumed_is_the_fit_that_never_stopped(
    buffers: bool, tmp_path: Path
) -> None:
    def callback() -> AveragedEvaluation:
        return AveragedEvaluation(average=POLICY, buffers=buffers)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    expected, run = fit(tmp_path, callback(), saving, configure=adamw)
    averages = as_bits(averager_of(run).averages())
    assert ("net.1.running_mean" in averages) == buffers
    for epoch in range(EPOCHS - 1):
        ckpt = tmp_path / f"epoch={epoch}.ckpt"
        model, again = fit(tmp_path, callback(), configure=adamw, ckpt=ckpt)
        assert held(model) == held(expected), epoch
        assert model.seen == expected.seen[(epoch + 1) * BATCHES :], epoch
        assert as_bits(averager_of(again).averages()) == averages
        assert averager_of(again).n_averaged == averager_of(run).n_averaged


def test_a_second_fit_averages_anew(tmp_path: Path) -> None:
    model = Net(adamw)
    run = trainer(tmp_path, AveragedEvaluation(average=rf.ema(0.5)), max_epochs=1)
    run.fit(model, loader(), loader())
    first = averager_of(run)
    assert first.n_averaged == BATCHES
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(), loader())
    assert averager_of(run) is not first and first.n_averaged == BATCHES


def two(model: Any) -> Any:
    first = torch.optim.SGD(model.net[:2].parameters(), 0.1, 0.9)
    return first, torch.optim.RMSprop(model.net[2:].parameters(), 0.01)


class Manual(Net):
    """Two optimizers in turn."""

    def __init__(self) -> None:
        super().__init__(two)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for opt in self.optimizers():
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()


def test_of_two_optimizers_each_pair_of_steps_is_sampled_once(tmp_path: Path) -> None:
    model = Manual()
    run = trainer(tmp_path, AveragedEvaluation(average=rf.ema(0.5)))
    run.fit(model, loader(), loader())
    assert averager_of(run).n_averaged == EPOCHS * BATCHES


def test_what_averages_nothing_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"\['AdamW'\] \(expected one of rbwa_fused's, or average="
    ):
        fit(tmp_path, AveragedEvaluation(), configure=adamw)
    with pytest.raises(ValueError, match="buffers=True needs an average"):
        AveragedEvaluation(buffers=True)
