"""accelerate with averages beside the optimizer that it prepares: bit for bit the loop by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerated import BATCHES, EPOCHS, OPTIONS, Run, accelerate, build, by_hand, forget
from beside import adamw, as_bits
from networks import digests, held
from torch import nn

import rbwa_fused as rf


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


POLICIES: dict[str, tuple[rf.Average, bool]] = {  # with buffers or not
    "ema": (rf.ema(0.8, start=4), False),
    "buffers": (rf.mean(start=2), True),
    "written back": (rf.lookahead(3, 0.5), False),
}


def beside(model: nn.Module, name: str, optimizer: Any = None) -> rf.Averager:
    policy, buffers = POLICIES[name]
    return rf.Averager(model, policy, buffers=buffers, optimizer=optimizer)


def averaged_run(name: str, options: dict[str, Any]) -> tuple[Run, rf.Averager]:
    run = Run(adamw, **options)
    averager = beside(run.unwrapped, name, run.opt)
    run.accelerator.register_for_checkpointing(averager)
    return run, averager


def ends(model: nn.Module, averager: rf.Averager) -> Any:
    return held(model), as_bits(averager.averages()), averager.n_averaged


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_each_step_that_is_taken_is_sampled_and_none_that_only_accumulates(
    name: str, options: str
) -> None:
    expected, _, told = by_hand(adamw, **OPTIONS[options], beside=lambda model: beside(model, name))
    run, averager = averaged_run(name, OPTIONS[options])
    run.train(EPOCHS)
    assert averager.engine.steps == EPOCHS * BATCHES // OPTIONS[options]["accumulation"]
    assert ends(run.unwrapped, averager) == ends(expected, told)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_run_loaded_from_its_state_is_the_run_that_never_stopped(
    name: str, options: str, tmp_path: Path
) -> None:
    run, averager = averaged_run(name, OPTIONS[options])
    run.train(2)
    run.accelerator.save_state(str(tmp_path))
    run.train(EPOCHS - 2)
    again, loaded = averaged_run(name, OPTIONS[options])
    again.accelerator.load_state(str(tmp_path))
    again.train(EPOCHS - 2)
    assert ends(again.unwrapped, loaded) == ends(run.unwrapped, averager)
    assert loaded.n_averaged > 0


def test_an_averager_may_come_before_the_optimizer_is_prepared() -> None:
    made: list[rf.Averager] = []

    def make(model: nn.Module) -> Any:
        opt = adamw(model)
        made.append(beside(model, "ema", opt))
        return opt

    run = Run(make, **OPTIONS["accumulated and clipped"])
    run.train(EPOCHS)
    behind, averager = averaged_run("ema", OPTIONS["accumulated and clipped"])
    behind.train(EPOCHS)
    assert ends(run.unwrapped, made[0]) == ends(behind.unwrapped, averager)


def test_a_step_that_the_scaler_skips_is_not_averaged() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    run = Run(adamw, **OPTIONS["plain"], scaler=scaler)
    averager = rf.Averager(run.unwrapped, rf.mean(), optimizer=run.opt)
    skipped = 0
    for _ in range(EPOCHS * BATCHES):
        before = held(run.unwrapped)["0.weight"], averager.n_averaged
        batch = next(iter(run.loader))
        run.accelerator.backward((run.model(batch[0]) - batch[1]).square().mean())
        run.opt.step()
        run.opt.zero_grad()
        after = held(run.unwrapped)["0.weight"], averager.n_averaged
        assert (after == before) == run.accelerator.optimizer_step_was_skipped
        skipped += run.accelerator.optimizer_step_was_skipped
    assert 0 < skipped < EPOCHS * BATCHES
    assert averager.n_averaged == EPOCHS * BATCHES - skipped


def test_what_is_saved_inside_averaged_is_the_averages(tmp_path: Path) -> None:
    run, averager = averaged_run("ema", OPTIONS["bf16"])
    run.train(EPOCHS)
    before, averaged = held(run.unwrapped), digests(averager.averaged_state_dict())
    with averager.averaged():
        run.accelerator.save_model(run.model, str(tmp_path))
        with pytest.raises(RuntimeError, match=r"averaged\(\)"):
            run.opt.step()
    assert held(run.unwrapped) == before != averaged
    fresh, _, _, _ = build(adamw)
    accelerate.load_checkpoint_in_model(fresh, str(tmp_path))
    assert held(fresh) == averaged


def test_batchnorm_is_estimated_with_the_prepared_model_and_loader() -> None:
    run, averager = averaged_run("ema", OPTIONS["plain"])
    run.train(EPOCHS)
    before = held(run.unwrapped)
    fresh, _, loader, _ = build(adamw)
    averager.copy_to(fresh)
    torch.optim.swa_utils.update_bn(loader, fresh)
    with rf.averaged_model(averager, run.model, run.loader):
        assert held(run.unwrapped) == held(fresh) != before
    assert held(run.unwrapped) == before
