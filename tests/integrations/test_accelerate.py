"""accelerate prepares, accumulates, clips, saves and resumes: bit for bit the loop by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerated import BATCHES, EPOCHS, OPTIONS, Make, Run, accelerate, build, by_hand, forget
from networks import digests, held
from runs import result

import rbwa_fused as rf

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
    yield
    forget()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MAKES)
def test_a_prepared_run_is_the_loop_written_by_hand(name: str, options: str) -> None:
    expected, opt, _ = by_hand(MAKES[name], **OPTIONS[options])
    run = Run(MAKES[name], **OPTIONS[options])
    run.train(EPOCHS)
    assert result(run.opt.optimizer) == result(opt)
    assert held(run.unwrapped) == held(expected)
    assert opt.n_averaged > 0


@pytest.mark.parametrize("scaled", [False, True])
def test_a_prepared_optimizer_clips_in_its_step(scaled: bool) -> None:
    ends = []
    for in_step in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
        options = OPTIONS["accumulated and clipped"]
        run = Run(MAKES["ema"], **options, scaler=scaler, in_step=in_step)
        run.train(EPOCHS)
        ends.append([p.detach() for p in run.unwrapped.parameters()])
    for clipped, in_the_step in zip(*ends, strict=True):
        assert torch.allclose(clipped, in_the_step, rtol=1e-5, atol=1e-6)


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
