"""Low precision done right: float32 averages and float32 masters of 16-bit parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import agree, compare
from rules import ALGORITHMS, RULES
from runs import AVERAGED, METHODS, STEPS, Model, build, feed, groups, result, train
from torch import Tensor, nn
from twin import Twin

import rbwa_fused as rf

NARROW = [torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def vector(dtype: torch.dtype, count: int = 300) -> nn.Parameter:
    return nn.Parameter(torch.linspace(1, 2, count, dtype=torch.float64).to(dtype))


def noise(p: Tensor, step: int) -> Tensor:
    """Gradients around 1 in the parameter's dtype: a step of lr 1e-4 is far below a unit."""
    generator = torch.Generator().manual_seed(step)
    return (1 + 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


# ---- as float64 says -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    "policy", [None, rf.ema(0.999), rf.mean(start=50), rf.rbwa(1, start_epoch=300)], ids=str
)
def test_small_steps_are_not_lost(policy: rf.Average | None, dtype: torch.dtype) -> None:
    """500 steps of 1e-4: a bfloat16 parameter alone would not move at all (its unit is 0.0078)."""
    p = vector(dtype)
    options: dict[str, Any] = {"lr": 1e-4, "momentum": 0.5, "weight_decay": 0.01}
    twin = Twin.of(RULES["master"], [p], policy, **options, nesterov=False)
    opt = rf.FusedSGD([p], **options, average=policy, master_weights=True)
    start = p.detach().double()
    for step in range(500):
        p.grad = noise(p, step)
        opt.step()
        twin.step([p.grad])
        agree(opt, [p], twin, backend="cpu")  # to half a unit of float32, and what is below that
    assert float((start - opt.state[p]["master_param"]).min()) > 0.05
    assert torch.equal(p, opt.state[p]["master_param"].to(dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_float32_average_moves_where_a_16_bit_one_stands_still(dtype: torch.dtype) -> None:
    """Parameters jump from 1 to 2 and stay; 3,000 samples with decay 0.999 follow to 5 %."""
    ends = {}
    for name, kind in (("wide", None), ("narrow", dtype)):
        p = nn.Parameter(torch.ones(50, dtype=dtype))
        opt = rf.FusedSGD([p], lr=1.0, average=rf.Average(rf.Ema(0.999), dtype=kind))
        for step in range(3001):
            p.grad = torch.full_like(p, -1.0 if step == 1 else 0.0)
            opt.step()
        ends[name] = opt.state[p]["average"]
    exact = 2.0 - 0.999**3000
    # Each sample rounds three times, relative to 2 at most, and forgets by 0.999 what it has lost:
    # at most 3 / (1 - 0.999) half units of float32.
    assert float((ends["wide"].double() - exact).abs().max()) <= 3 * 1000 * EPS
    assert float((ends["narrow"].double() - exact).abs().min()) > 0.3


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_a_rule_keeps_beside_a_master_is_float32_and_exact_to_it(
    dtype: torch.dtype, name: str
) -> None:
    """To the bounds of all 100 steps."""
    p, rule = vector(dtype), ALGORITHMS[name]
    options: dict[str, Any] = {"lr": 0.001, "weight_decay": 0.0}
    twin = Twin.of(rule, [p.detach().float()], None, **options)
    opt = rule.made([p], **options, master_weights=True)
    for step in range(100):
        p.grad = noise(p, step)
        twin.step([p.grad.float()])
        opt.step()
    kept = twin.members[0].rules_state
    assert kept.keys() == set(rule.keeps) == opt.state[p].keys() - {"master_param"}
    for stream, value in kept.items():
        # Three roundings a step, each of at most half a unit of a number that is as large as the
        # gradients' sum, forgotten by at most 0.9 a step; z forgets nothing.
        most = (100 if stream == "z" else 10) * EPS
        assert float(value.off.max()) <= most * max(1.0, float(value.v.abs().max())), stream
        compare(stream, opt.state[p][stream], value, torch.float32)


# ---- what others do to a parameter --------------------------------------------------------------


def test_a_parameter_that_somebody_writes_to_is_the_truth() -> None:
    p = vector(torch.bfloat16)
    opt = rf.FusedSGD([p], lr=1e-4, master_weights=True)
    for step in range(5):
        p.grad = noise(p, step)
        opt.step()
    kept = opt.state[p]["master_param"].clone()
    with torch.no_grad():
        p[:100] = 7.0
    p.grad = torch.zeros_like(p)
    opt.step()
    master = opt.state[p]["master_param"]
    assert master[:100].tolist() == [7.0] * 100 and p[:100].tolist() == [7.0] * 100
    assert torch.equal(master[100:], kept[100:])  # the bits that p cannot hold are still there


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_master_is_left_alone_by_a_step_that_leaves_its_parameter_alone(backend: str) -> None:
    still, other = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    opt = rf.FusedSGD([still, other], 0.001, backend=backend, master_weights=True)
    still.grad, other.grad = torch.ones_like(still), torch.ones_like(other)
    opt.step()
    before = opt.state[still]["master_param"].clone()
    still.data.fill_(3.0)
    still.grad = None
    opt.step()
    assert torch.equal(opt.state[still]["master_param"], before)


def test_a_model_loaded_behind_the_optimizers_back_is_trained_from_there() -> None:
    model, opt = build("momentum", torch.bfloat16, master_weights=True)
    train(model, opt, 1, 3)
    fresh = Model(torch.bfloat16)
    model.load_state_dict(fresh.state_dict())
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.zeros_like(p)
        opt.state[p].get("momentum_buffer", torch.zeros(())).zero_()
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    opt.step()
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_master_starts_as_its_parameter_to_the_sign_of_a_zero() -> None:
    p = nn.Parameter(torch.tensor([-0.0, 0.0], dtype=torch.bfloat16))
    opt = rf.FusedSGD([p], lr=0.1, master_weights=True)
    p.grad = torch.zeros_like(p)
    opt.step()
    for value in (p, opt.state[p]["master_param"]):
        assert value.signbit().tolist() == [True, False]


def test_masters_belong_to_16_bit_parameters_alone() -> None:
    wide, narrow = vector(torch.float32), vector(torch.bfloat16)
    opt = rf.FusedSGD([wide, narrow], lr=0.1, momentum=0.9, master_weights=True)
    for p in (wide, narrow):
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[wide].keys() == {"momentum_buffer"}
    assert opt.state[narrow].keys() == {"momentum_buffer", "master_param"}


@pytest.mark.parametrize("convert", [nn.Module.float, nn.Module.half], ids=["float", "half"])
@pytest.mark.parametrize("method", ["nesterov", "ema", "rbwa"])
def test_a_converted_model_trains_on(method: str, convert: Callable[..., Any]) -> None:
    model, opt = build(method, torch.bfloat16, master_weights=True)
    train(model, opt, 1, 8)
    momentum = {p: s["momentum_buffer"].clone() for p, s in opt.state.items()}
    numbers = {p: group for group in opt.param_groups for p in group["params"]}
    convert(model)
    feed(model, 9)
    before = {p: p.detach().clone() for p in model.parameters()}
    opt.step()
    for p in model.parameters():
        held = opt.state[p]
        assert ("master_param" in held) == (p.dtype == torch.float16 and p in momentum)
        if p in momentum and p.grad is not None:
            mu, decay = (numbers[p][name] for name in ("momentum", "weight_decay"))
            expected = mu * momentum[p] + p.grad.float() + decay * before[p].float()
            # a master may keep up to half a float16 unit that the parameter does not show
            assert torch.allclose(held["momentum_buffer"].float(), expected, rtol=1e-6, atol=1e-4)
    assert opt.n_averaged == {"nesterov": 0, "ema": 2, "rbwa": 5}[method]


# ---- the average ---------------------------------------------------------------------------------


def test_rbwa_of_a_master_needs_no_average() -> None:
    p = vector(torch.bfloat16)
    opt = rf.FusedSGD([p], lr=0.1, average=rf.rbwa(1, start_epoch=0), master_weights=True)
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[p].keys() == {"master_param"} and opt.n_averaged == 1


def test_a_16_bit_average_of_a_master_is_refused() -> None:
    policy = rf.Average(rf.Ema(0.5), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"Invalid dtype: torch\.bfloat16"):
        rf.FusedSGD([vector(torch.bfloat16)], average=policy, master_weights=True)


@pytest.mark.parametrize("method", AVERAGED)
def test_a_run_that_is_evaluated_is_the_run_that_is_not(method: str) -> None:
    ends = []
    for evaluated in (False, True):
        model, opt = build(method, torch.bfloat16, master_weights=True)
        for step in range(1, STEPS + 1):
            train(model, opt, step, step)
            if evaluated:
                with opt.averaged():
                    for p in model.parameters():
                        if "average" in opt.state[p] and opt.n_averaged > 0:
                            assert torch.equal(p, opt.state[p]["average"].to(p.dtype))
        ends.append(result(opt))
    assert ends[0] == ends[1]


def test_a_parameter_without_a_gradient_is_averaged_and_gets_its_master_later() -> None:
    p, q = vector(torch.bfloat16), vector(torch.bfloat16)
    policy = rf.mean(every=1, write_back_every=2)
    opt = rf.FusedSGD([p, q], lr=0.1, momentum=0.9, average=policy, master_weights=True)
    for step in range(1, 7):
        p.grad = noise(p, step)
        q.grad = noise(q, step) if step > 3 else None
        opt.step()
        assert ("master_param" in opt.state[q]) == (step > 3)
        if step <= 3:
            assert torch.equal(q, vector(torch.bfloat16))
            assert torch.equal(opt.state[q]["average"].to(q.dtype), q)
    assert opt.n_averaged == 6


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run_that_never_stopped(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, opt = build(method, dtype, master_weights=True)
    train(model, opt, 1, 7)
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(model, opt, 8, STEPS)
    again, opt_again = build(method, dtype, master_weights=True)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    opt_again.load_state_dict(saved["opt"])
    train(again, opt_again, 8, STEPS)
    assert result(opt_again) == result(opt)


@pytest.mark.parametrize("method", ["momentum", "rsgdm explicit lookahead", "rbwa"])
def test_a_copied_run_goes_on_with_its_masters(method: str) -> None:
    model, opt = build(method, torch.bfloat16, master_weights=True)
    train(model, opt, 1, 7)
    again, opt_again = copy.deepcopy((model, opt))
    train(model, opt, 8, STEPS)
    train(again, opt_again, 8, STEPS)
    assert result(opt_again) == result(opt)


def test_a_checkpoint_of_torch_in_16_bits_is_taken_and_gets_masters() -> None:
    """Also where a parameter with a momentum has no gradient in the first step."""
    model = Model(torch.bfloat16)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    theirs.step()
    opt = rf.FusedSGD(
        model.parameters(), lr=0.1, momentum=0.9, average=rf.ema(0.5), master_weights=True
    )
    opt.load_state_dict(theirs.state_dict())
    model.matrix.grad = None
    opt.step()
    for p in model.parameters():
        assert opt.state[p]["momentum_buffer"].dtype == torch.float32
        assert opt.state[p]["momentum_buffer"].flatten()[0] == (1.0 if p is model.matrix else 1.9)
        assert torch.equal(opt.state[p]["master_param"].to(p.dtype), p)


def test_a_checkpoint_with_masters_is_not_taken_without() -> None:
    model, opt = build("momentum", torch.bfloat16, master_weights=True)
    train(model, opt, 1, 3)
    other, plain = build("momentum", torch.bfloat16)
    before = result(plain)
    with pytest.raises(ValueError, match=r"has a master for parameter 0 .*master_weights=True"):
        plain.load_state_dict(opt.state_dict())
    assert result(plain) == before
    theirs = torch.optim.SGD(groups(other), lr=0.1, momentum=0.9)
    theirs.load_state_dict(opt.state_dict())  # torch drops what it does not know
    train(other, theirs, 4, 5)


def test_an_average_that_is_taken_away_starts_again_as_a_copy_of_the_master() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = rf.FusedSGD([p], lr=2**-12, average=rf.ema(0.5), master_weights=True)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p].pop("average")
    p.grad = torch.ones_like(p)
    opt.step()
    assert p.tolist() == [1.0] * 3  # in bfloat16 nothing has moved
    assert opt.state[p]["average"].tolist() == [1.0 - 3 * 2**-12] * 3
