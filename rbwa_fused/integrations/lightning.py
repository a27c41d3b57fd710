"""Lightning: validation, test and prediction with the averaged weights.

Lightning is no dependency of this package: either of its two names may be installed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rbwa_fused.average import Average
from rbwa_fused.averager import Averager
from rbwa_fused.averages import Averages
from rbwa_fused.estimate import averaged_estimated, has_statistics
from rbwa_fused.fused import FusedOptimizer
from rbwa_fused.model_state import copied
from rbwa_fused.posthoc.snapshots import Snapshots
from rbwa_fused.several import Averages as Several
from rbwa_fused.several import Which

NAMES = ("lightning.pytorch", "pytorch_lightning")


def _lightning() -> Any:
    """The installed one; of two the one that is in use, since importing the other takes seconds."""
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError(
        "rbwa_fused.integrations.lightning needs Lightning: pip install pytorch-lightning, or "
        "pip install lightning"
    )


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    Callback, LightningModule = _lightning().Callback, _lightning().LightningModule


class AveragedEvaluation(Callback):
    """Runs validation, test and prediction inside ``opt.averaged()``, for each optimizer of ours,
    or with ``average`` for an ``Averager`` behind whatever optimizers there are.

    The averaged weights are live from ``on_validation_start`` until ``on_validation_end`` (and the
    same of test and predict), the training weights everywhere else and exactly as they were, also
    after an exception or an interrupt. Before the first sample nothing moves, so the sanity check
    and the first epochs see the training weights. Several optimizers, manual optimization and
    resuming need nothing more.

    A checkpoint holds the training weights, whoever writes it and when, so that a resumed run is
    the run that never stopped.

    Outside ``fit`` the averages are those of the last ``fit`` of the same trainer, or, with
    ``ckpt_path``, those that ``save_averaged`` put into the checkpoint.

    Under ``precision="16-mixed"`` Lightning unscales the gradients, not the step, so that they can
    be clipped.

    Args:
        average (Average, optional): what to average beside optimizers that do not; of several
            optimizers the last one's steps are counted. Averages and counts are in the callback's
            state, so that ``ckpt_path`` resumes bit for bit. Several in a list or a dict of names
            are averaged at once (default: None).
        which (int or str, optional): which of several averages is evaluated, by number or by name;
            None is what ``averaged()`` has (default: None).
        buffers (bool): average floating buffers too, with ``average`` (default: False).
        loader: batches, on which BatchNorm statistics are estimated for the averaged weights before
            each evaluation (``rbwa_fused.averaged_model``); None leaves those of training, which
            fit an EMA that follows closely, but not the mean of a long run. The module's
            ``forward`` gets their inputs; what was frozen in eval mode in training keeps its own
            (default: None).
        save_averaged (bool): put the averaged weights into each checkpoint, under the key
            ``averaged_state_dict`` beside ``state_dict``, also with ``save_weights_only``; with a
            ``loader`` each costs a pass over it (default: False).
        snapshots (rbwa_fused.posthoc.Snapshots, optional): written behind the steps that are due,
            of all averages (default: None).

    Raises:
        ValueError: at the start of ``fit``, if no optimizer is one of ours and there is no
            ``average``, or if the module has no ``forward`` to estimate its statistics with.

    Example:
        >>> from rbwa_fused.integrations.lightning import AveragedEvaluation
        >>> trainer = Trainer(callbacks=[AveragedEvaluation(), ModelCheckpoint(monitor="val_loss")])
        >>> trainer.fit(model)  # configure_optimizers returns FusedSGD(…, average=ema(0.999))
    """

    KEY = "averaged_state_dict"

    def __init__(
        self,
        *,
        average: Average | Several | None = None,
        which: Which | None = None,
        buffers: bool = False,
        loader: Iterable[Any] | None = None,
        save_averaged: bool = False,
        snapshots: Snapshots | None = None,
    ) -> None:
        super().__init__()
        if buffers and average is None:
            raise ValueError("buffers=True needs an average (expected average=)")
        self._average, self._buffers_too = average, buffers
        self._which: dict[str, Any] = {} if which is None else {"which": which}
        self._averager: Averager | None = None
        self._resumed: dict[str, Any] | None = None  # the averager's state in a checkpoint
        self._loader = loader
        self._save_averaged = save_averaged
        self._snapshots = snapshots
        self._loaded = False  # the averaged weights out of a checkpoint, outside fit
        self._live: ExitStack | None = None  # brings the training weights back
        self._parts: list[nn.Module] = []
        self._frozen: list[nn.Module] = []  # in eval mode in training

    # ---- entered and left ----------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()  # where another callback's on_exception kept ours from being called
        self._loaded = False
        if not isinstance(trainer.strategy.save_checkpoint, _Saving):
            trainer.strategy.save_checkpoint = _Saving(self, trainer)  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._begin_averaging(trainer, pl_module)
        elif not _ours(trainer):
            kinds = [type(opt).__name__ for opt in trainer.optimizers]
            raise ValueError(
                f"Invalid optimizers for AveragedEvaluation: {kinds} (expected one of "
                "rbwa_fused's, or average=)"
            )
        for opt in _ours(trainer):
            opt._step_supports_amp_scaling = False
        if self._loader is None:
            return
        self._parts = list(pl_module.modules())
        self._note_frozen()
        forward = getattr(pl_module.forward, "__func__", None)
        if forward is LightningModule.forward and any(map(has_statistics, self._parts)):
            raise ValueError(
                f"Invalid loader for AveragedEvaluation: {type(pl_module).__name__} has no forward "
                "to estimate its BatchNorm statistics with"
            )

    def _begin_averaging(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._averager is not None:
            self._averager.remove()  # the last fit's
        self._averager = Averager(
            pl_module, self._average, optimizer=trainer.optimizers, buffers=self._buffers_too
        )
        if self._resumed is not None:
            self._averager.load_state_dict(self._resumed)
            self._resumed = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._averager is None else {"averager": self._averager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("averager")

    def _averaging(self, trainer: Trainer) -> list[Averages]:
        found: list[Averages] = [*_ours(trainer)]
        return found if self._averager is None else [*found, self._averager]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note_frozen()  # before an evaluation Lightning puts all modules in eval mode
        if self._snapshots is not None:
            self._snapshots.update(self._averaging(trainer), pl_module)

    def _note_frozen(self) -> None:
        self._frozen = [module for module in self._parts if not module.training]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" and trainer.ckpt_path:  # the optimizers have other averages
            if not self._loaded:
                warnings.warn(
                    f"{trainer.ckpt_path} has no averaged weights, its training weights are "
                    "evaluated (AveragedEvaluation(save_averaged=True) puts them there)",
                    stacklevel=2,
                )
        else:
            self._enter(trainer, pl_module)

    def _enter(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Puts the averaged weights in place; `buffers` are those that go with them, if known."""
        opts = [opt for opt in self._averaging(trainer) if opt.n_averaged > 0]
        with ExitStack() as stack:
            for opt in opts:
                stack.enter_context(opt.averaged(pl_module, **self._which))
            if buffers is not None:
                stack.enter_context(_with_buffers(pl_module, buffers))
            elif opts and self._loader is not None:
                with trainer.precision_plugin.forward_context():
                    told = pl_module, self._loader, pl_module.device, self._frozen
                    stack.enter_context(averaged_estimated(opts[0], *told, **self._which))
            self._live = stack.pop_all()

    def _leave(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.close()

    # ---- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._live is not None:
            averaged = checkpoint["state_dict"]
            buffers = copied(dict(pl_module.named_buffers()))
            self._leave()
            try:
                checkpoint["state_dict"] = copied(trainer.strategy.lightning_module_state_dict())
            finally:
                self._enter(trainer, pl_module, buffers)
        elif self._save_averaged:
            self._enter(trainer, pl_module)
            try:
                averaged = copied(trainer.strategy.lightning_module_state_dict())
            finally:
                self._leave()
        if self._save_averaged:
            checkpoint[self.KEY] = averaged

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" and self.KEY in checkpoint:
            pl_module.load_state_dict(checkpoint[self.KEY], strict=pl_module.strict_loading)
            self._loaded = True


class _Saving:
    """A strategy's ``save_checkpoint``, which also asks the callback about a checkpoint of weights
    alone, as Lightning does not."""

    def __init__(self, callback: AveragedEvaluation, trainer: Trainer) -> None:
        self._callback, self._trainer = callback, trainer
        self._save = trainer.strategy.save_checkpoint

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "callbacks" not in checkpoint:
            module = self._trainer.lightning_module
            self._callback.on_save_checkpoint(self._trainer, module, checkpoint)
            if self._callback.KEY in checkpoint:
                checkpoint["callbacks"] = {}  # or Lightning asks none when it loads them
        self._save(checkpoint, *args, **kwargs)


def _ours(trainer: Trainer) -> list[FusedOptimizer]:
    return [opt for opt in trainer.optimizers if isinstance(opt, FusedOptimizer)]


@contextmanager
def _with_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model's buffers have these values inside, and their own again after it."""
    own = copied(dict(model.named_buffers()))
    _assign(model, values)
    try:
        yield
    finally:
        _assign(model, own)


@torch.no_grad()
def _assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(values[name])
