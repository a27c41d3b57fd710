"""transformers' Trainer: evaluation, prediction and saving with the averaged weights.

transformers is no dependency of this package.

The Trainer tells a callback what has happened, never what is about to happen. What comes before is
learnt from what it calls on the way: ``optimizer.eval()`` before each evaluation loop,
``optimizer.train()`` before each forward pass of training (its contract with schedule-free
optimizers), and ``model.state_dict()`` while it saves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rbwa_fused.average import Average
from rbwa_fused.averager import Averager
from rbwa_fused.averages import Averages
from rbwa_fused.engine.sharded import kind_of_shard
from rbwa_fused.fused import FusedOptimizer
from rbwa_fused.posthoc.snapshots import Snapshots
from rbwa_fused.several import Averages as Several
from rbwa_fused.several import Which, averaging

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "rbwa_fused.integrations.transformers needs transformers' Trainer: pip install "
        "transformers accelerate"
    ) from error


class AveragedWeights(TrainerCallback):
    """Evaluates, predicts and saves with averages of the weights, which an ``Averager`` keeps
    behind whatever optimizer the Trainer builds, or an optimizer of ours by itself.

    In ``train()`` the averaged weights are live during each evaluation and prediction loop, and
    once a checkpoint is due from the first ``model.state_dict()`` until ``on_save``; the training
    weights everywhere else and exactly as they were. An evaluation that has raised leaves the
    averages until the next forward pass of training. Before the first sample nothing moves.

    When ``train()`` has returned, the model has the averaged weights, or with
    ``load_best_model_at_end`` those of the best checkpoint, which are averages, too: ``evaluate``,
    ``predict``, ``save_model`` and ``push_to_hub`` use them. ``restore()`` brings the training
    weights back. So does another ``train()`` of the model, unless somebody has written other
    weights meanwhile; it averages anew. Where it is of another model, this one keeps its averages.

    A checkpoint folder holds the averages as the model (``model.safetensors``, what
    ``from_pretrained`` loads) and in ``averager.pt`` the training weights, the averages in their
    own dtype and their counts. ``train(resume_from_checkpoint=...)`` goes on from there as the run
    that never stopped, bit for bit. The folder is looked for in ``args.output_dir`` and where it
    was saved; one that was moved elsewhere must be ``args.resume_from_checkpoint``, too, since the
    Trainer tells no callback what it resumes from. A checkpoint without averages starts them.

    Args:
        average (Average, optional): what to average beside the optimizer; None for the averages of
            an optimizer of rbwa_fused, given as ``Trainer(optimizers=...)``; several in a list or a
            dict of names are averaged at once (default: None).
        which (int or str, optional): which of several is evaluated and saved as the model, by
            number or by name; None is what ``averaged()`` has (default: None).
        buffers (bool): average floating buffers too, with ``average`` (default: False).
        exclude (sequence of str): patterns of names that are left out, as ``Averager`` has them;
            for frozen weights their own names do (default: ()).
        snapshots (rbwa_fused.posthoc.Snapshots, optional): written behind the steps that are due;
            a ``train()`` that resumes from a checkpoint goes on with its folder (default: None).

    Attributes:
        averager (Averager or None): of the last ``train()``.

    Raises:
        ValueError: at the start of ``train()``, without an average, under DeepSpeed, for sharded
            parameters, and with ``enable_jit_checkpoint``, or ``hyperparameter_search`` that saves,
            whose checkpoints a callback does not see; for a checkpoint whose ``averager.pt`` is not
            found.
        RuntimeError: for a Trainer whose evaluation loop does not call ``optimizer.eval()``, or
            that saves something else than the state dict of its model.

    Example:
        >>> from rbwa_fused.integrations.transformers import AveragedWeights
        >>> averaging = AveragedWeights(rbwa_fused.ema(0.999))
        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[averaging])
        >>> trainer.train()
    """

    FILE = "averager.pt"
    KEY = "rbwa_fused.AveragedWeights"  # in TrainerState.stateful_callbacks

    def __init__(
        self,
        average: Average | Several | None = None,
        *,
        which: Which | None = None,
        buffers: bool = False,
        exclude: Sequence[str] = (),
        snapshots: Snapshots | None = None,
    ) -> None:
        for name, value in (("buffers", buffers), ("exclude", exclude)):
            if value and average is None:
                raise ValueError(f"{name}={value!r} needs an average (expected average=)")
        self._snapshots = snapshots
        self._average, self._buffers_too, self._exclude = averaging(average), buffers, exclude
        self._which: dict[str, Any] = {} if which is None else {"which": which}
        self.averager: Averager | None = None
        self._averages: Averages | None = None  # the averager, or an optimizer of ours
        self._model = nn.Module()
        self._live: AbstractContextManager[None] | None = None  # brings the training weights back
        self._control: Any = None
        self._evaluated = False  # optimizer.eval() was called
        self._asked = False  # the model for its state dict, while a checkpoint is due
        self._wrapped: Any = None  # the optimizer whose eval() and train() call here
        self._hook: RemovableHandle | None = None

    # ---- entered and left ----------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        model, optimizer = others["model"], others["optimizer"]
        _check(args, state, model)
        ours = None if self._average is not None else _ours(optimizer)
        saved = self._saved(args, state)
        self._detach()
        self._bring_back(keep=state.global_step > 0 or model is not self._model)
        self._control, self._model = control, model
        if saved is not None:
            _write(model, saved["training_weights"])
        if ours is None:
            self._begin_averaging(optimizer, saved)
        else:
            self._averages = ours
        self._attach(optimizer)
        state.stateful_callbacks[self.KEY] = {
            "run": uuid4().hex,
            "output_dir": os.path.abspath(args.output_dir),
        }

    def _begin_averaging(self, optimizer: Any, saved: Mapping[str, Any] | None) -> None:
        if self.averager is not None:
            self.averager.remove()  # the last train()'s
        self._averages = self.averager = Averager(
            self._model,
            self._average,
            optimizer=optimizer,
            buffers=self._buffers_too,
            exclude=self._exclude,
        )
        if saved is not None and saved["averager"] is not None:
            self.averager.load_state_dict(saved["averager"])

    def _attach(self, optimizer: Any) -> None:
        """Has the Trainer's calls of the optimizer and the model come here."""
        evaluating, training = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)

        def before_evaluation() -> None:
            _call(evaluating)
            self._evaluated = True
            self._enter()

        def before_training() -> None:
            self._leave()
            _call(training)

        optimizer.eval, optimizer.train = before_evaluation, before_training
        self._wrapped = optimizer
        self._hook = self._model.register_state_dict_pre_hook(self._before_state_dict)

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            for name in ("eval", "train"):
                vars(self._wrapped).pop(name, None)
        self._hook = self._wrapped = None

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self._control.should_save:
            self._asked = True
            self._enter()

    def _enter(self) -> None:
        if self._live is None and self._averages is not None:
            live = self._averages.averaged(self._model, **self._which)
            live.__enter__()
            self._live = live

    def _leave(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.__exit__(None, None, None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._after_evaluation(control)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **others: Any) -> None:
        self._after_evaluation(control)

    def _after_evaluation(self, control: Any) -> None:
        if self._hook is None:  # outside train()
            return
        self._control = control
        self._leave()
        if not self._evaluated:
            raise RuntimeError(
                "AveragedWeights: the Trainer has evaluated the training weights, since its loop "
                "does not call optimizer.eval() (expected one that does, as transformers' own)"
            )
        self._evaluated = False

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._control = control  # another callback may have exchanged it
        if self._snapshots is not None and self._averages is not None:
            self._snapshots.update(self._averages, self._model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._control = control

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._control = control

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._hook is None:
            return
        self._detach()
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._enter()

    def restore(self) -> None:
        """Brings the training weights back for good, where averages have taken their place: those
        of the last step of ``train()``, not with ``load_best_model_at_end``, which loads others."""
        self._leave()

    def _bring_back(self, keep: bool) -> None:
        """Leaves the averages of the last ``train()``. Weights that are no longer those stay."""
        if self._live is None or self._averages is None:
            return
        named = _tensors(self._model)
        found = self._averages.averages(self._model, **self._which)
        here = {name: named[name].detach().clone() for name in found}
        keep = keep or any(not found[n].to(t.dtype).equal(t) for n, t in here.items())
        self._leave()
        if keep:
            _write(self._model, here)

    # ---- checkpoints ---------------------------------------------------------------------------

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._averages is None or not args.should_save:  # another rank does
            return self._leave()
        asked, self._asked = self._asked, False
        self._leave()
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if not asked:
            raise RuntimeError(
                f"AveragedWeights: {folder} holds the training weights, since the Trainer did not "
                "ask its model for the state dict"
            )
        if not args.save_only_model:
            named = _tensors(self._model)
            saved = {
                "run": state.stateful_callbacks[self.KEY]["run"],
                "step": state.global_step,
                "training_weights": {
                    name: named[name].detach()
                    for name in self._averages.averages(self._model, **self._which)
                },
                "averager": None if self.averager is None else self.averager.state_dict(),
            }
            file = os.path.join(folder, self.FILE)
            torch.save(saved, f"{file}.part")
            os.replace(f"{file}.part", file)

    def _saved(self, args: Any, state: Any) -> dict[str, Any] | None:
        """What the file of the checkpoint that the Trainer has resumed holds; None without one."""
        marked = state.stateful_callbacks.get(self.KEY)
        if state.global_step == 0 or marked is None:
            return None
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        folders = [os.path.join(where, name) for where in (args.output_dir, marked["output_dir"])]
        if args.resume_from_checkpoint:
            folders.insert(0, str(args.resume_from_checkpoint))
        for folder in dict.fromkeys(map(os.path.abspath, folders)):
            file = os.path.join(folder, self.FILE)
            if os.path.isfile(file):
                saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                if (saved["run"], saved["step"]) == (marked["run"], state.global_step):
                    return saved
        raise ValueError(
            f"the checkpoint of step {state.global_step} holds averages, and no {self.FILE} with "
            f"its training weights in {' or '.join(dict.fromkeys(folders))} (expected its folder "
            "there, or as args.resume_from_checkpoint, and not of save_only_model)"
        )


def _check(args: Any, state: Any, model: nn.Module) -> None:
    sharded = kind_of_shard(model.parameters())
    wrong = {
        "under DeepSpeed, which has the weights": getattr(args, "deepspeed_plugin", None),
        f"with {sharded} parameters": sharded,
        "with enable_jit_checkpoint, whose checkpoints no callback is told of": getattr(
            args, "enable_jit_checkpoint", False
        ),
        "with the checkpoints of hyperparameter_search, whose folders no callback is told of "
        "(expected save_strategy='no')": state.is_hyper_param_search and args.save_strategy != "no",
    }
    for why, is_so in wrong.items():
        if is_so:
            raise ValueError(f"AveragedWeights does not work {why}")


def _ours(optimizer: Any) -> FusedOptimizer:
    inner = optimizer
    while not isinstance(inner, FusedOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, FusedOptimizer):
        raise ValueError(
            f"Invalid optimizer for AveragedWeights: {type(inner).__name__} (expected one of "
            "rbwa_fused's, or average=)"
        )
    return inner


def _call(function: Callable[[], Any] | None) -> None:
    if function is not None:
        function()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    named = _tensors(model)
    missing = values.keys() - named.keys()
    if missing:
        raise ValueError(f"the checkpoint's training weights are another model's: {min(missing)}")
    for name, value in values.items():
        named[name].copy_(value)
