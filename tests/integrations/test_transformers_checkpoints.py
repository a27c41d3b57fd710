"""The Trainer's checkpoints hold averages as the model, and all that training goes on with."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import digests, held
from safetensors.torch import load_file
from torch import nn
from trainers import (
    BATCHES,
    QUIET,
    STEPS,
    AveragedWeights,
    Noting,
    averager_of,
    ends,
    replayed,
    trainer,
    transformers,
)

import rbwa_fused as rf

pytestmark = QUIET

POLICY = rf.ema(0.75, start=4)
OFTEN: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def saved(folder: Path, step: int) -> Any:
    return digests(load_file(folder / f"checkpoint-{step}" / "model.safetensors"))


def own(model: nn.Module) -> Any:
    return rf.FusedSGD(model.parameters(), lr=0.05, momentum=0.9, average=POLICY)


def written_back(model: nn.Module) -> Any:
    return rf.FusedSGD(model.parameters(), lr=0.05, momentum=0.9, average=rf.rswa(3, 1))


def masters(model: nn.Module) -> Any:
    model.bfloat16()
    return rf.FusedSGD(model.parameters(), lr=0.05, momentum=0.9, master_weights=True)


def masters_and_averages(model: nn.Module) -> Any:
    model.bfloat16()
    return rf.FusedSGD(model.parameters(), lr=0.05, average=POLICY, master_weights=True)


RUNS: dict[str, tuple[Callable[[], AveragedWeights], dict[str, Any]]] = {
    "AdamW": (lambda: AveragedWeights(POLICY), {}),
    "buffers": (lambda: AveragedWeights(POLICY, buffers=True), {"lr_scheduler_type": "cosine"}),
    "accumulated": (lambda: AveragedWeights(rf.mean()), {"gradient_accumulation_steps": 2}),
    "evaluated": (
        lambda: AveragedWeights(rf.mean(start=2, every=3)),
        {"eval_strategy": "steps", "eval_steps": 2},
    ),
    "written back": (lambda: AveragedWeights(rf.lookahead(3, 0.5)), {"bf16": True}),
    "restored": (
        lambda: AveragedWeights(POLICY),
        {"restore_callback_states_from_checkpoint": True},
    ),
    "excluded": (lambda: AveragedWeights(POLICY, exclude=["net.0.*"]), {}),
    "an optimizer of ours": (AveragedWeights, {"optimizer": own}),
    "one that writes back": (AveragedWeights, {"optimizer": written_back}),
    "one with masters": (AveragedWeights, {"optimizer": masters_and_averages, "bf16": True}),
    "beside masters": (lambda: AveragedWeights(POLICY), {"optimizer": masters, "bf16": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumed_is_the_run_that_never_stopped(name: str, tmp_path: Path) -> None:
    callback, options = RUNS[name]
    averaging = callback()
    run = trainer(tmp_path / "whole", averaging, Noting(), **options, **OFTEN)
    run.train()
    expected, seen = ends(run, averaging), run.model.seen
    last = run.state.global_step
    for step in (3, BATCHES + 1, last - 1):  # before a sample, at an epoch's end, within one
        folder = tmp_path / f"killed-{step}"
        killed = trainer(folder, callback(), Noting(dies=step), **options, **OFTEN)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        assert transformers.trainer_utils.get_last_checkpoint(folder).endswith(f"-{step - 1}")
        again = callback()
        resumed = trainer(folder, again, Noting(), **options, **OFTEN)
        resumed.train(resume_from_checkpoint=True)
        assert ends(resumed, again) == expected, step
        assert resumed.model.seen == seen[len(seen) - len(resumed.model.seen) :]
        assert saved(folder, last) == saved(tmp_path / "whole", last)


def test_checkpoints_hold_the_averages_of_their_step_as_the_model(tmp_path: Path) -> None:
    averaging, noting, alone = AveragedWeights(POLICY), Noting(), Noting()
    run = trainer(tmp_path, averaging, noting, **OFTEN)
    run.train()
    trainer(tmp_path / "alone", alone, **OFTEN).train()
    assert [*map(digests, noting.weights)] == [*map(digests, alone.weights)]
    averaged = replayed(noting.weights, POLICY)
    for step in range(1, STEPS + 1):
        assert saved(tmp_path, step) == averaged[step - 1]
        kept = torch.load(tmp_path / f"checkpoint-{step}" / "averager.pt", weights_only=True)
        training = digests(kept["training_weights"])
        assert (training == {}) == (step <= 4)
        live = digests(noting.weights[step - 1])
        assert training.items() <= live.items()
    assert averaged[-1] != live


class Asking(transformers.TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint, perhaps with a control of its own."""

    def __init__(self, hook: str, copies: bool) -> None:
        self.copies = copies
        setattr(self, hook, self.asks)

    def asks(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        control = copy.copy(control) if self.copies else control
        control.should_save = state.global_step == BATCHES
        return control


@pytest.mark.parametrize("order", ["before", "behind", "a control of its own"])
@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end", "on_evaluate", "on_log"])
def test_a_checkpoint_that_another_callback_asks_for_holds_averages(
    hook: str, order: str, tmp_path: Path
) -> None:
    averaging, noting = AveragedWeights(POLICY), Noting()
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1000,
        "eval_strategy": "epoch" if hook == "on_evaluate" else "no",
        "logging_strategy": "steps" if hook == "on_log" else "no",
        "logging_steps": BATCHES,
        "num_train_epochs": 2,  # at whose end the Trainer asks for one
    }
    callbacks = [averaging, noting]
    callbacks.insert(order == "behind", Asking(hook, order == "a control of its own"))
    trainer(tmp_path, *callbacks, **options).train()
    averaged = replayed(noting.weights, POLICY)[BATCHES - 1]
    assert saved(tmp_path, BATCHES) == averaged != digests(noting.weights[BATCHES - 1])
    assert (tmp_path / f"checkpoint-{BATCHES}" / "averager.pt").exists()


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_model_is_the_best_average(strategy: str, tmp_path: Path) -> None:
    averaging, noting = AveragedWeights(rf.ema(0.75)), Noting()
    run = trainer(
        tmp_path,
        averaging,
        noting,
        **{**OFTEN, "save_steps": 3, "save_strategy": strategy},
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is not the last
    )
    run.train()
    best = run.state.best_global_step
    assert best < STEPS
    averaged = replayed(noting.weights, rf.ema(0.75))[best - 1]
    assert held(run.model) == averaged == saved(tmp_path, best) != digests(noting.weights[best - 1])
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)
    run.save_model(str(tmp_path / "best"))
    assert digests(load_file(tmp_path / "best" / "model.safetensors")) == averaged
    averaging.restore()
    assert held(run.model) == averaged


def test_the_same_trainer_goes_on_from_one_of_its_checkpoints(tmp_path: Path) -> None:
    averaging = AveragedWeights(POLICY, buffers=True)
    run = trainer(tmp_path, averaging, Noting(), **OFTEN)
    run.train()
    expected = held(run.model), averager_of(averaging).n_averaged
    for step in (2, 7, STEPS - 1):
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert (held(run.model), averager_of(averaging).n_averaged) == expected, step


def killed(folder: Path, **options: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, AveragedWeights(POLICY), Noting(dies=8), **OFTEN, **options).train()
    return folder / "checkpoint-7"


def test_a_checkpoint_is_found_where_it_was_saved_and_where_it_was_moved_to(
    tmp_path: Path,
) -> None:
    averaging = AveragedWeights(POLICY)
    run = trainer(tmp_path / "whole", averaging, **OFTEN)
    run.train()
    expected = ends(run, averaging)
    killed(tmp_path / "zeroth")
    shutil.move(tmp_path / "zeroth", tmp_path / "renamed")
    averaging = AveragedWeights(POLICY)
    renamed = trainer(tmp_path / "renamed", averaging)
    renamed.train(resume_from_checkpoint=True)
    assert ends(renamed, averaging) == expected

    folder = killed(tmp_path / "first")
    averaging = AveragedWeights(POLICY)
    elsewhere = trainer(tmp_path / "second", averaging)
    elsewhere.train(resume_from_checkpoint=str(folder))  # saved under another output_dir
    assert ends(elsewhere, averaging) == expected

    moved = shutil.move(folder, tmp_path / "moved")
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", folder)  # of another run
    again = trainer(tmp_path / "second", AveragedWeights(POLICY))
    with pytest.raises(ValueError, match=r"no averager\.pt with its training weights in .*first"):
        again.train(resume_from_checkpoint=str(moved))
    averaging = AveragedWeights(POLICY)
    named = trainer(tmp_path / "second", averaging, resume_from_checkpoint=str(moved))
    named.train(resume_from_checkpoint=str(moved))
    assert ends(named, averaging) == expected


def test_a_run_without_averages_goes_on_with_them(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Noting(dies=8), **OFTEN).train()
    averaging, noting, alone = AveragedWeights(rf.mean()), Noting(), Noting()
    trainer(tmp_path / "alone", alone).train()
    run = trainer(tmp_path, averaging, noting)
    run.train(resume_from_checkpoint=True)
    assert averager_of(averaging).n_averaged == STEPS - 7
    assert [*map(digests, noting.weights)] == [*map(digests, alone.weights)][7:]
    assert held(run.model) == replayed(noting.weights, rf.mean())[-1]


def test_a_checkpoint_of_the_model_alone_says_that_no_run_goes_on_from_it(tmp_path: Path) -> None:
    folder = killed(tmp_path, save_only_model=True)
    assert not (folder / "averager.pt").exists()
    run = trainer(tmp_path, AveragedWeights(POLICY))
    with pytest.raises(ValueError, match="not of save_only_model"):
        run.train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_of_another_policy_or_model_is_an_error(tmp_path: Path) -> None:
    folder = killed(tmp_path)
    run = trainer(tmp_path, AveragedWeights(rf.lookahead(3, 0.5)))
    with pytest.raises(ValueError, match="average"):
        run.train(resume_from_checkpoint=str(folder))
    file = folder / "averager.pt"
    kept = torch.load(file, weights_only=True)
    kept["training_weights"]["net.9.weight"] = torch.zeros(1)
    torch.save(kept, file)
    run = trainer(tmp_path, AveragedWeights(POLICY))
    with pytest.raises(ValueError, match=r"another model's: net\.9\.weight"):
        run.train(resume_from_checkpoint=str(folder))


class Own(transformers.Trainer):  # type: ignore[misc]
    """Saves, from step 2 on, what it has made of the weights itself."""

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        made = {name: p.detach() for name, p in self.model.named_parameters()}
        self._save(output_dir, state_dict=made if self.state.global_step > 1 else None)


def test_a_trainer_that_saves_the_training_weights_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, AveragedWeights(POLICY), kind=Own, **OFTEN)
    with pytest.raises(RuntimeError, match="checkpoint-2 holds the training weights"):
        run.train()
