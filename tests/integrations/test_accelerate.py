"""accelerate prepares, accumulates, clips, saves and resumes: bit for bit the loop by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import digests, held
from runs import result
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rbwa_fused as rf

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

EPOCHS = 4
BATCHES = 6  # an epoch
CLIP = 0.3

Make = Callable[[nn.Module], Any]

MAKES: dict[str, Make] = {
    "ema": lambda model: rf.FusedSGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, average=rf.ema(0.8, start=4)
    ),
    "rsgdm": lambda model: rf.RSGDM(model.parameters(), lr=0.1, average=rf.mean(start=2)),
    "rbwa": lambda model: rf.FusedSGD(
        model.parameters(), lr=0.1, momentum=0.9, average=rf.rbwa(BATCHES, 1)
    ),
}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """accelerate keeps its settings in the class."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def build(make: Make) -> tuple[nn.Module, Any, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    opt = make(model)
    x = torch.randn(2 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=2)
    return model, opt, loader, torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS * BATCHES)


def loss_of(model: nn.Module, batch: Any) -> Any:
    return (model(batch[0]).float() - batch[1]).square().mean()


def by_hand(make: Make, *, accumulation: int, clip: bool, bf16: bool) -> tuple[nn.Module, Any]:
    model, opt, loader, scheduler = build(make)
    for _ in range(EPOCHS):
        for index, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(model, batch)
            (loss / accumulation).backward()
            if (index + 1) % accumulation == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                opt.step()
                scheduler.step()
                opt.zero_grad()
    return model, opt


class Run:
    """A run under accelerate, epoch by epoch."""

    def __init__(self, make: Make, *, accumulation: int, clip: bool, bf16: bool) -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulation,
            mixed_precision="bf16" if bf16 else "no",
        )
        prepared = self.accelerator.prepare(*build(make))
        self.model, self.opt, self.loader, self.scheduler = prepared
        self.clip = clip

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, batch))
                    if self.clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                    self.opt.step()
                    self.scheduler.step()
                    self.opt.zero_grad()

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 1, "clip": False, "bf16": False},
    "accumulated and clipped": {"accumulation": 3, "clip": True, "bf16": False},
    "bf16": {"accumulation": 2, "clip": False, "bf16": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MAKES)
def test_a_prepared_run_is_the_loop_written_by_hand(name: str, options: str) -> None:
    expected, opt = by_hand(MAKES[name], **OPTIONS[options])
    run = Run(MAKES[name], **OPTIONS[options])
    run.train(EPOCHS)
    assert result(run.opt.optimizer) == result(opt)
    assert held(run.unwrapped) == held(expected)
    assert opt.n_averaged > 0


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MAKES)
def test_a_run_loaded_from_its_state_is_the_run_that_never_stopped(
    name: str, options: str, safe: bool, tmp_path: Path
) -> None:
    run = Run(MAKES[name], **OPTIONS[options])
    run.train(2)
    run.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    run.train(EPOCHS - 2)
    again = Run(MAKES[name], **OPTIONS[options])
    again.accelerator.load_state(str(tmp_path))
    again.train(EPOCHS - 2)
    assert result(again.opt.optimizer) == result(run.opt.optimizer)
    assert held(again.unwrapped) == held(run.unwrapped)


def test_averages_are_reached_through_the_optimizer_of_the_wrapper(tmp_path: Path) -> None:
    run = Run(MAKES["ema"], **OPTIONS["bf16"])
    assert isinstance(run.opt.optimizer, rf.FusedSGD)
    run.train(EPOCHS)
    opt, before = run.opt.optimizer, held(run.unwrapped)
    averaged = digests(opt.averaged_state_dict(run.unwrapped))
    batch = next(iter(run.loader))
    live = run.model.eval()(batch[0])
    with opt.averaged():
        assert held(run.unwrapped) == averaged != before
        assert not run.model(batch[0]).equal(live)
        run.accelerator.save_model(run.model, str(tmp_path))
        with pytest.raises(RuntimeError, match=r"averaged\(\)"):
            run.opt.step()
    assert held(run.unwrapped) == before
    fresh, _, _, _ = build(MAKES["ema"])
    accelerate.load_checkpoint_in_model(fresh, str(tmp_path))
    assert held(fresh) == averaged


def test_averaged_models_take_the_prepared_optimizer_model_and_loader() -> None:
    run = Run(MAKES["ema"], **OPTIONS["plain"])
    run.train(EPOCHS)
    before = held(run.unwrapped)
    fresh, _, loader, _ = build(MAKES["ema"])
    fresh.load_state_dict(run.opt.optimizer.averaged_state_dict(run.unwrapped))
    torch.optim.swa_utils.update_bn(loader, fresh)
    with rf.averaged_model(run.opt, run.model, run.loader):
        assert held(run.unwrapped) == held(fresh) != before
    assert held(run.unwrapped) == before
