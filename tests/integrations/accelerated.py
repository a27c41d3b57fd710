"""A small model trained under accelerate, and the loop by hand that it must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rbwa_fused as rf

accelerate: Any = pytest.importorskip("accelerate", reason="needs accelerate")

EPOCHS = 4
BATCHES = 6  # an epoch
CLIP = 0.3

Make = Callable[[nn.Module], Any]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"accumulation": 1, "clip": False, "bf16": False},
    "accumulated and clipped": {"accumulation": 3, "clip": True, "bf16": False},
    "bf16": {"accumulation": 2, "clip": False, "bf16": True},
}


def forget() -> None:
    """accelerate keeps its settings in the class."""
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


def by_hand(
    make: Make,
    *,
    accumulation: int,
    clip: bool,
    bf16: bool,
    beside: Callable[[nn.Module], Any] | None = None,
) -> tuple[nn.Module, Any, Any]:
    """The model, its optimizer, and an averager beside it that is told of each step."""
    model, opt, loader, scheduler = build(make)
    averager = None if beside is None else beside(model)
    for _ in range(EPOCHS):
        for index, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(model, batch)
            (loss / accumulation).backward()
            if (index + 1) % accumulation == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                opt.step()
                if averager is not None:
                    averager.update()
                scheduler.step()
                opt.zero_grad()
    return model, opt, averager


class Run:
    """A run under accelerate, epoch by epoch.

    Args:
        scaler: as accelerate makes one for fp16 on a GPU.
    """

    def __init__(
        self,
        make: Make,
        *,
        accumulation: int,
        clip: bool,
        bf16: bool,
        scaler: Any = None,
        in_step: bool = False,
    ) -> None:
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulation,
            mixed_precision="bf16" if bf16 else "no",
        )
        self.accelerator.scaler = scaler
        prepared = self.accelerator.prepare(*build(make))
        self.model, self.opt, self.loader, self.scheduler = prepared
        self.clip, self.in_step = clip, in_step

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_of(self.model, batch))
                    if self.clip and self.accelerator.sync_gradients:
                        if self.accelerator.scaler is not None:  # as accelerate does for fp16
                            self.accelerator.scaler.unscale_(self.opt.optimizer)
                        if self.in_step:
                            rf.clip_grad_norm_(self.opt, CLIP)
                            assert self.opt.optimizer.pending_clip is not None
                        else:
                            self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                    self.opt.step()
                    self.scheduler.step()
                    self.opt.zero_grad()

    @property
    def unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)
