"""torch.distributed.checkpoint, nested or flattened: the run goes on bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import METHODS, STEPS, Model, bits, build, groups, result, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import rbwa_fused as rf

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]

STOP = 8  # by then every parameter has taken a step
LAYOUTS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}


def through_files(model: nn.Module, opts: Any, folder: Path, options: StateDictOptions) -> None:
    names = ("model", "optim")
    dcp.save(
        dict(zip(names, get_state_dict(model, opts, options=options), strict=True)),
        checkpoint_id=folder,
    )


def from_files(model: nn.Module, opts: Any, folder: Path, options: StateDictOptions) -> None:
    """As the documentation has it: what a fresh run has is the template of what is loaded."""
    weights, state = get_state_dict(model, opts, options=options)
    saved = {"model": weights, "optim": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        model,
        opts,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optim"],
        options=options,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_files_bit_for_bit(method: str, layout: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model, opt = build(method, dtype)
        train(model, opt, 1, STOP)
        through_files(model, opt, folder, LAYOUTS[layout])
        fresh, loaded = build(method, dtype)
        from_files(fresh, loaded, folder, LAYOUTS[layout])
        assert result(loaded) == result(opt), dtype
        assert loaded.param_groups[0]["average"] == opt.param_groups[0]["average"]
        train(model, opt, STOP + 1, STEPS)
        train(fresh, loaded, STOP + 1, STEPS)
        assert result(loaded) == result(opt), dtype


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["rsgdm implicit", "ema", "rbwa", "lookahead"])
def test_a_run_goes_on_from_what_was_got_and_set(method: str, layout: str, offload: bool) -> None:
    options = copy.copy(LAYOUTS[layout])
    options.cpu_offload = offload
    model, opt = build(method)
    train(model, opt, 1, STOP)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    fresh, loaded = build(method)
    set_model_state_dict(fresh, get_model_state_dict(model))
    set_optimizer_state_dict(fresh, loaded, saved, options=options)
    train(model, opt, STOP + 1, STEPS)
    train(fresh, loaded, STOP + 1, STEPS)
    assert result(loaded) == result(opt)


@pytest.mark.parametrize("method", ["momentum", "rsgdm explicit", "ema"])
def test_a_flattened_parameter_without_a_step_takes_its_first_one_after_loading(
    method: str,
) -> None:
    options = LAYOUTS["flattened"]
    model, opt = build(method)
    train(model, opt, 1, 2)  # one of its parameters waits for step 7
    saved = get_optimizer_state_dict(model, opt, options=options)
    fresh, loaded = build(method)
    fresh.load_state_dict(model.state_dict())
    set_optimizer_state_dict(fresh, loaded, saved, options=options)
    assert "momentum_buffer" not in loaded.state[fresh.late]
    train(model, opt, 3, STEPS)
    train(fresh, loaded, 3, STEPS)
    assert result(loaded) == result(opt)


def halves(model: Model) -> list[Any]:
    first, second = groups(model)
    params = first["params"]
    return [
        rf.FusedSGD(params[:2], lr=0.05, momentum=0.9, average=rf.ema(0.8, start=2)),
        rf.RSGDM([*params[2:], *second["params"]], lr=0.1, average=rf.swa(1, 3)),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_optimizers_share_one_checkpoint(layout: str, tmp_path: Path) -> None:
    runs = []
    for load in (False, True):
        model = Model()
        opts = halves(model)
        if load:
            from_files(model, opts, tmp_path, LAYOUTS[layout])
        for step in range(STOP + 1 if load else 1, STEPS + 1):
            if step == STOP + 1 and not load:
                through_files(model, opts, tmp_path, LAYOUTS[layout])
            train(model, opts[0], step, step)
            opts[1].step()
        runs.append(list(map(result, opts)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_got_holds_tensors_and_primitives_and_live_groups_no_stale_counters(
    layout: str,
) -> None:
    model, opt = build("ema")
    train(model, opt, 1, STOP)
    expected = opt.state_dict()["param_groups"][0]
    saved = get_optimizer_state_dict(model, opt, options=LAYOUTS[layout])
    if layout == "nested":
        (got, _), keys = saved["param_groups"], expected.keys() - {"params"}
        assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    else:
        keys = expected.keys() - {"params"}
        got = {key: saved[f"param_groups.matrix.{key}"] for key in keys}
        assert all(isinstance(v, Tensor | int | float | str | type(None)) for v in saved.values())
    assert {key: got[key] for key in keys} == {key: expected[key] for key in keys}
    assert (expected["step"], expected["n_averaged"]) == (STOP, 2)
    assert opt.param_groups[0]["n_averaged"] is None and opt.param_groups[0]["step"] is None


def test_averaged_weights_are_saved_and_loaded_as_a_model(tmp_path: Path) -> None:
    model, opt = build("ema")
    train(model, opt, 1, STOP)
    averaged = opt.averaged_state_dict(model)
    dcp.save({"model": averaged}, checkpoint_id=tmp_path)
    fresh = Model()
    saved = {"model": get_model_state_dict(fresh)}
    dcp.load(saved, checkpoint_id=tmp_path)
    set_model_state_dict(fresh, saved["model"])
    with opt.averaged():
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            assert bits(p) == bits(q)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_users_keys_named_like_ours_come_back_from_files(layout: str, tmp_path: Path) -> None:
    model, opt = build("ema")
    opt.param_groups[0].update(step=7, rule="mine")
    train(model, opt, 1, STOP)
    through_files(model, opt, tmp_path, LAYOUTS[layout])
    fresh, loaded = build("ema")
    loaded.param_groups[0].update(step=0, rule="?")
    from_files(fresh, loaded, tmp_path, LAYOUTS[layout])
    assert result(loaded) == result(opt)
    assert (loaded.param_groups[0]["step"], loaded.param_groups[0]["rule"]) == (7, "mine")
