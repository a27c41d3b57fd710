"""A small model, fitted by Lightning, and the loop by hand that the fit must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import held
from runs import bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rbwa_fused as rf

pl: Any = pytest.importorskip(
    "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning", reason="needs Lightning"
)
ModelCheckpoint: Any = pl.callbacks.ModelCheckpoint

EPOCHS = 4
BATCHES = 5  # an epoch

Configure = Callable[[Any], Any]

# Where averages are live, in callbacks that come before ours.
HOOKS = ["on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"]

QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:predict returned None"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist"),
]


def loader(alike: bool = False) -> DataLoader[Any]:
    """Five batches; if alike, Lightning may go on in the midst of an epoch with any of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 if alike else 2 * BATCHES, 4, generator=generator)
    x = x.repeat(BATCHES if alike else 1, 1)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=2)


def ema(model: nn.Module) -> Any:
    """Sampled from the middle of the second epoch on."""
    average = rf.ema(0.8, start=BATCHES + 2)
    return rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, average=average)


class Net(pl.LightningModule):  # type: ignore[misc]
    """Linear, BatchNorm, linear; notes the bits that it is evaluated with."""

    def __init__(self, configure: Configure = ema) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
        self.configure = configure
        self.seen: list[tuple[dict[str, str | None], str | None]] = []

    def configure_optimizers(self) -> Any:
        return self.configure(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x).float() - y.float()).square().mean()

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        with torch.no_grad():
            self.seen.append((held(self), bits(self.loss(batch))))

    test_step = predict_step = validation_step


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **{"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options},
    )


def fit(
    folder: Path,
    *callbacks: Any,
    configure: Configure = ema,
    alike: bool = False,
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[Net, Any]:
    model = Net(configure)
    run = trainer(folder, *callbacks, **options)
    run.fit(model, loader(alike), loader(), ckpt_path=ckpt)
    return model, run


def by_hand(
    configure: Configure,
    *,
    accumulate: int = 1,
    clip: Callable[[Any], Any] = lambda params: None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
) -> tuple[Net, Any]:
    """What Lightning is expected to do."""
    model = Net(configure).to(dtype)
    configured = configure(model)
    (opt,), schedulers = configured if isinstance(configured, tuple) else ([configured], [])

    scaler = torch.amp.GradScaler("cpu", enabled=scaled)

    def precision() -> Any:
        return nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)

    for _ in range(EPOCHS):
        model.train()
        for index, batch in enumerate(loader()):
            with precision():
                loss = model.loss([t.to(dtype) for t in batch])
            scaler.scale(loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == BATCHES:
                scaler.unscale_(opt)
                clip(model.parameters())
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
        with opt.averaged():
            model.eval()
            for index, batch in enumerate(loader()):
                with precision():
                    model.validation_step([t.to(dtype) for t in batch], index)
        for scheduler in schedulers:
            scheduler.step()
    return model, opt


def rsgdm(model: nn.Module) -> Any:
    return rf.RSGDM(model.parameters(), lr=0.1, average=rf.mean(start=2))


def rswa(model: nn.Module) -> Any:
    return rf.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rf.rswa(BATCHES, 1))


def scheduled(model: nn.Module) -> Any:
    opt = ema(model)
    return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS)]


def clip_norm(params: Any) -> None:
    torch.nn.utils.clip_grad_norm_(params, 0.2)


def clip_value(params: Any) -> None:
    torch.nn.utils.clip_grad_value_(params, 0.05)


# name: optimizers, options of the Trainer, options of `by_hand`
FITS: dict[str, tuple[Configure, dict[str, Any], dict[str, Any]]] = {
    "ema": (ema, {}, {}),
    "rsgdm": (rsgdm, {}, {}),
    "written back": (rswa, {}, {}),
    "scheduler": (scheduled, {}, {}),
    "accumulation": (ema, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipped by norm": (ema, {"gradient_clip_val": 0.2}, {"clip": clip_norm}),
    "clipped by value": (
        ema,
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"clip": clip_value},
    ),
    "bf16-mixed": (ema, {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    "bf16-true": (ema, {"precision": "bf16-true"}, {"dtype": torch.bfloat16}),
}
