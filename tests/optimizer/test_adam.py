"""What Adam has and SGD has not: ages, state in float32, decay that float32 would lose."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf

WEIGHTS = torch.linspace(-2.0, 2.0, 257, dtype=torch.float64)


def vector(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(WEIGHTS.to(dtype, copy=True))


def gradient(step: int, dtype: torch.dtype) -> Tensor:
    """The same for every dtype, and no function of the weights."""
    return torch.sin(torch.arange(257, dtype=torch.float64) * (1 + step % 7) + step).to(dtype)


def trained(cls: Any, dtype: torch.dtype, steps: int, **options: Any) -> Tensor:
    p = vector(dtype)
    opt = cls([p], **options)
    for step in range(steps):
        p.grad = gradient(step, torch.float32).to(dtype)
        opt.step()
    return p.detach()


def mean_ulps(actual: Tensor, exact: Tensor) -> float:
    unit = torch.finfo(actual.dtype).eps * exact.abs().clamp(min=2.0**-8)
    return float(((actual.double() - exact).abs() / unit).mean())


@pytest.mark.parametrize("decay", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_float32_is_no_farther_from_float64_than_torchs(decay: float, amsgrad: bool) -> None:
    """After 3,000 steps. Both are compared with torch's float64: it is the exact result."""
    options = {"lr": 1e-3, "weight_decay": decay, "amsgrad": amsgrad}
    exact = trained(torch.optim.AdamW, torch.float64, 3000, **options)
    theirs = mean_ulps(trained(torch.optim.AdamW, torch.float32, 3000, **options), exact)
    assert mean_ulps(trained(rf.FusedAdamW, torch.float32, 3000, **options), exact) <= theirs + 2
    own = trained(rf.FusedAdamW, torch.float64, 3000, **options)
    assert float((own - exact).abs().max()) <= 1e-10


def test_decay_that_float32_loses_beside_a_weight_is_not_lost_beside_a_step() -> None:
    """lr weight_decay = 1e-8: torch multiplies a weight by 1 - 1e-8, which is 1."""

    def end(cls: Any, decay: float) -> float:
        p = nn.Parameter(torch.full((8,), 1.0))
        opt = cls([p], lr=1e-5, weight_decay=decay)
        for step in range(2000):
            p.grad = torch.full_like(p, 1.0 if step % 2 else -1.0)
            opt.step()
        return float(p.detach()[0])

    assert end(torch.optim.AdamW, 1e-3) == end(torch.optim.AdamW, 0.0)
    assert end(rf.FusedAdamW, 1e-3) < end(rf.FusedAdamW, 0.0)


# ---- the age -----------------------------------------------------------------------------------


def test_a_parameter_without_a_gradient_does_not_age() -> None:
    early, late = vector(), vector()
    opt = rf.FusedAdamW([early, late], lr=0.1)
    for step in range(10):
        early.grad = gradient(step, torch.float32)
        late.grad = gradient(step, torch.float32) if step >= 7 else None
        opt.step()
    assert [float(opt.state[p]["step"]) for p in (early, late)] == [10.0, 3.0]
    alone = vector()
    other = rf.FusedAdamW([alone], lr=0.1)
    for step in range(7, 10):
        alone.grad = gradient(step, torch.float32)
        other.step()
    assert torch.equal(late, alone)


def assigned(opt: Any, p: Tensor, step: int) -> None:
    opt.state[p]["step"] = torch.tensor(float(step))


def written(opt: Any, p: Tensor, step: int) -> None:
    opt.state[p]["step"].fill_(step)


def loaded(opt: Any, p: Tensor, step: int) -> None:
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = step  # a number, as older versions of torch saved it
    opt.load_state_dict(saved)


def on_another_device(opt: Any, p: Tensor, step: int) -> None:
    opt.state[p]["step"] = torch.tensor([step], dtype=torch.int64)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("how", [assigned, written, loaded, on_another_device])
def test_the_step_in_the_state_is_the_age_of_the_next_step(how: Any, backend: str) -> None:
    ours, theirs = vector(torch.float64), vector(torch.float64)
    opt = rf.FusedAdam([ours], lr=0.1, backend=backend)
    torchs = torch.optim.Adam([theirs], lr=0.1)
    for step in range(6):
        ours.grad = gradient(step, torch.float64)
        theirs.grad = gradient(step, torch.float64)
        if step == 3:
            how(opt, ours, 100)
            torchs.state[theirs]["step"] = torch.tensor(100.0)
        opt.step()
        torchs.step()
        assert float(opt.state[ours]["step"]) == float(torchs.state[theirs]["step"])
    assert float((ours - theirs).detach().abs().max()) <= 1e-12


def test_a_step_that_two_parameters_share_counts_for_each() -> None:
    p, q = vector(), vector()
    opt = rf.FusedAdamW([p, q], lr=0.1)
    for t in (p, q):
        t.grad = gradient(0, torch.float32)
    opt.step()
    opt.state[q]["step"] = opt.state[p]["step"]
    opt.step()
    assert float(opt.state[p]["step"]) == float(opt.state[q]["step"]) == 2.0
    assert torch.equal(p, q)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [-3.0, math.nan, math.inf])
def test_an_age_that_is_no_count_is_refused_and_nothing_is_changed(
    value: float, backend: str
) -> None:
    p = vector()
    opt = rf.FusedAdamW([p], lr=0.1, backend=backend)
    p.grad = gradient(0, torch.float32)
    opt.step()
    before = p.detach().clone()
    opt.state[p]["step"].fill_(value)
    with pytest.raises(RuntimeError, match="age of segment 0 is no count"):
        opt.step()
    assert torch.equal(p, before)


# ---- v -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_whose_square_float32_has_not_moves_the_weights(backend: str) -> None:
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    opt, torchs = rf.FusedAdam([p], lr=0.1, backend=backend), torch.optim.Adam([q], lr=0.1)
    for t in (p, q):
        t.grad = torch.tensor([2e19, 1e20, 5e20])
    opt.step()
    torchs.step()
    assert opt.state[p]["exp_avg_sq"].isfinite().all()
    assert torch.allclose(p, q, rtol=1e-6, atol=0)


@pytest.mark.parametrize("state_dtype", ["float32", "param"])
def test_a_bfloat16_v_never_decays_and_a_float32_one_does(state_dtype: Any) -> None:
    p = vector(torch.bfloat16)
    opt = rf.FusedAdamW([p], lr=0.0, state_dtype=state_dtype)
    for step in range(3010):
        p.grad = torch.full_like(p, 1.0 if step < 10 else 1e-2)
        opt.step()
    v = opt.state[p]["exp_avg_sq"]
    assert v.dtype == (torch.float32 if state_dtype == "float32" else torch.bfloat16)
    assert (float(v[0]) < 1e-3) == (state_dtype == "float32")


def test_amsgrad_that_is_switched_on_late_starts_at_zero() -> None:
    p = vector(torch.float64)
    opt = rf.FusedAdam([p], lr=0.1)
    largest = torch.zeros_like(p)
    for step in range(6):
        p.grad = gradient(step, torch.float64) * (10.0 if step < 3 else 0.1)
        opt.param_groups[0]["amsgrad"] = step >= 3
        opt.step()
        held = opt.state[p]
        assert ("max_exp_avg_sq" in held) == (step >= 3)
        if step >= 3:
            largest = torch.maximum(largest, held["exp_avg_sq"])
            assert torch.equal(held["max_exp_avg_sq"], largest)


# ---- Adam and AdamW ----------------------------------------------------------------------------


def saved_by(cls: Any) -> dict[str, Any]:
    p = vector()
    opt = cls([p], lr=0.1, weight_decay=0.1)
    p.grad = gradient(0, torch.float32)
    opt.step()
    state: dict[str, Any] = opt.state_dict()
    return state


@pytest.mark.parametrize("of_torch", [True, False])
def test_a_checkpoint_of_adamw_makes_adam_adamw_and_not_the_other_way_round(
    of_torch: bool,
) -> None:
    adam, adamw = rf.FusedAdam([vector()]), rf.FusedAdamW([vector()])
    adam.load_state_dict(saved_by(torch.optim.AdamW if of_torch else rf.FusedAdamW))
    adamw.load_state_dict(saved_by(torch.optim.Adam if of_torch else rf.FusedAdam))
    for opt in (adam, adamw):
        assert opt.param_groups[0]["decoupled_weight_decay"] is True
    torch.optim.Optimizer.load_state_dict(adamw, saved_by(torch.optim.Adam))
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True


def test_adam_and_sgd_refuse_each_others_checkpoints() -> None:
    sgd = rf.FusedSGD([vector()], momentum=0.9)
    with pytest.raises(ValueError, match="rule is 'adam', the optimizer's 'sgd'"):
        sgd.load_state_dict(saved_by(rf.FusedAdamW))
    with pytest.raises(ValueError, match=r"another optimizer's, with .*betas"):
        sgd.load_state_dict(saved_by(torch.optim.AdamW))
    with pytest.raises(ValueError, match="rule is 'sgd', the optimizer's 'adam'"):
        rf.FusedAdam([vector()]).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize("value", ["float16", None, torch.float32])
def test_another_state_dtype_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        rf.FusedAdamW([vector()], state_dtype=value)


@pytest.mark.parametrize(
    ("betas", "error", "words"),
    [
        (0.9, TypeError, "Invalid betas"),
        ((0.9,), TypeError, "Invalid betas"),
        ((0.9, 0.99, 0.999), TypeError, "Invalid betas"),
        ({0.9, 0.999}, TypeError, "Invalid betas"),
        ({0.9: 0, 0.999: 1}, TypeError, "Invalid betas"),
        (iter((0.9, 0.999)), TypeError, "Invalid betas"),
        ((0.9, 1), ValueError, "Invalid beta parameter at index 1: 1"),
        ((0, 0.999), ValueError, "both floats or both Tensors"),
        (("a", 0.9), TypeError, r"Invalid betas\[0\]"),
        ((torch.ones(2), torch.ones(1)), ValueError, r"Tensor betas\[0\] must be 1-element"),
    ],
)
def test_betas_that_are_none_are_refused(betas: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        rf.FusedAdam([vector()], betas=betas)
    opt = rf.FusedAdam([vector()])
    opt.param_groups[0]["betas"] = betas
    opt.param_groups[0]["params"][0].grad = gradient(0, torch.float32)
    with pytest.raises(error, match=words):
        opt.step()


def test_hyperparameters_that_are_changed_in_place_are_read_at_every_step() -> None:
    ends = []
    for cls in (rf.FusedAdam, torch.optim.Adam):
        p, lr = vector(torch.float64), np.array(0.1)
        opt = cls([{"params": [p], "betas": [0.5, 0.75]}], lr=lr)
        (group,) = opt.param_groups
        for step in range(8):
            p.grad = gradient(step, torch.float64)
            opt.step()
            if step == 1:
                lr[...] = 0.2
            elif step in (2, 4):
                group["lr"] = 0.05 * step
            elif step in (3, 5):
                group["betas"][step % 4 // 2] = 0.875
        ends.append(p.detach())
    assert float((ends[0] - ends[1]).abs().max()) <= 1e-14


def test_a_list_of_betas_is_a_tuple_in_groups_as_in_torch() -> None:
    for cls in (rf.FusedAdam, rf.FusedAdamW, torch.optim.Adam):
        opt = cls([vector()], betas=[0.5, 0.75])
        assert opt.defaults["betas"] == opt.param_groups[0]["betas"] == (0.5, 0.75)


def test_betas_in_tensors_are_read_at_every_step() -> None:
    p, q = vector(torch.float64), vector(torch.float64)
    betas = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64)
    opt, plain = rf.FusedAdam([p], betas=betas), rf.FusedAdam([q], betas=(0.5, 0.75))
    for step in range(4):
        p.grad = q.grad = gradient(step, torch.float64)
        opt.step()
        plain.step()
        betas[0].fill_(0.875)
        plain.param_groups[0]["betas"] = (0.875, 0.75)
    assert torch.equal(p, q)


def test_a_parameter_without_a_gradient_so_far_is_still_that_behind_a_checkpoint() -> None:
    """Its zeros in the checkpoint are for torch, and no moments that a master would go on with."""
    ends = []
    for saves in (False, True):
        ps = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
        opt = rf.FusedAdamW(ps, master_weights=True, average=rf.ema(0.5))
        for step in range(3):
            ps[0].grad = torch.ones_like(ps[0])
            opt.step()
            if saves and step == 1:
                saved = opt.state_dict()
                assert float(saved["state"][1]["step"]) == 0 and "exp_avg" in saved["state"][1]
                opt = rf.FusedAdamW(ps, master_weights=True, average=rf.ema(0.5))
                opt.load_state_dict(saved)
        ends.append([{k: v.tolist() for k, v in opt.state[p].items()} for p in ps])
    assert ends[0] == ends[1] and ends[1][1].keys() == {"average"}
