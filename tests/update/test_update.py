"""The update itself: every rule, average, dtype and layout against the literal algorithms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import agree
from bounds import ulps
from cases import AVERAGES, DTYPES, STEPS, gradients, moved, params, policy_for, products
from rules import ALGORITHMS, RULES, Rule
from torch import Tensor, nn
from twin import Twin

import rbwa_fused as rf
from rbwa_fused.engine import backends

# The reference gives the kernel's bits (below), so it takes part here for one dtype only.
CASES = [(*case, "cpu") for case in products(DTYPES, RULES, AVERAGES)]
CASES += [(*case, "reference") for case in products([torch.float32], RULES, AVERAGES)]


def state_of(opt: Any, p: Tensor) -> dict[str, Tensor]:
    """By names, in whichever order they were given."""
    return {k: v for k, v in sorted(opt.state.get(p, {}).items()) if isinstance(v, Tensor)}


@pytest.mark.parametrize(("dtype", "rule", "average", "backend"), CASES, ids=str)
def test_every_case_is_the_literal_algorithm(
    dtype: torch.dtype, rule: str, average: str, backend: str
) -> None:
    """After every step, to the bounds of bounds.py, which are those of one step."""
    policy = policy_for(average, rule, dtype)
    ps = params(dtype)
    twin = Twin.of(RULES[rule], ps, policy)
    opt = RULES[rule].made(ps, average=policy, backend=backend)
    for step in range(STEPS):
        grads: list[Tensor | None] = list(gradients(ps, step))
        if step > 0:
            grads[step % len(ps)] = None  # takes no step, but is sampled
        for p, g in zip(ps, grads, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()
        twin.step(grads)
        agree(opt, ps, twin, backend=backend)
    assert opt.state_dict()["param_groups"][0]["step"] == STEPS
    assert policy is None or opt.n_averaged > 0


GRID = [
    pytest.param(rule, options, id="-".join(map(str, [name, *options.values()])))
    for name, rule in ALGORITHMS.items()
    if rule.torchs is not None
    for options in rule.grid()
]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rule", "options"), GRID)
def test_replacing_torchs_optimizer_changes_nothing_but_the_time(
    rule: Rule, options: dict[str, Any], dtype: torch.dtype, flatten: bool
) -> None:
    assert rule.torchs is not None
    ours, theirs = params(dtype), params(dtype)
    halves = [ours[::2], ours[1::2]], [theirs[::2], theirs[1::2]]

    def groups(two: list[list[nn.Parameter]]) -> list[dict[str, Any]]:
        second = {"lr": 0.05, "weight_decay": 0.2, "maximize": not options["maximize"]}
        return [{"params": two[0]}, {"params": two[1], **second}]

    opt = rule.cls(groups(halves[0]), **options, flatten=flatten)
    torch_opt = rule.torchs(groups(halves[1]), **options, foreach=False)
    for step in range(STEPS):
        for p, q, g in zip(ours, theirs, gradients(ours, step), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        if step == 2:  # a layer frozen for a step
            ours[4].grad = theirs[4].grad = None
        if step == 5:
            for groups_ in (opt.param_groups, torch_opt.param_groups):
                groups_[0]["lr"] *= 0.5
        opt.step()
        torch_opt.step()
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        # torch fuses multiply and add, we round both: about two units a step
        assert ulps(p.detach(), q.detach()) <= 16, i
        assert state_of(opt, p).keys() == state_of(torch_opt, q).keys()
        for name, value in state_of(opt, p).items():
            assert ulps(value, state_of(torch_opt, q)[name]) <= 16, (i, name)


def run(
    dtype: torch.dtype, rule: str, average: str, device: str = "cpu", **options: Any
) -> list[Tensor]:
    """Everything that STEPS steps write: parameters and state, brought to the CPU."""
    ps = params(dtype)
    ps.append(nn.Parameter(torch.linspace(-1, 1, 70_000, dtype=torch.float64).to(dtype)))
    if device != "cpu":
        ps = [nn.Parameter(moved(p, device)) for p in ps]
    opt = RULES[rule].made(ps, average=policy_for(average, rule, dtype), **options)
    for step in range(STEPS):
        for p, g in zip(ps, gradients(ps, step), strict=True):
            p.grad = g if device == "cpu" else moved(g, device)
        if step == 3:  # somebody else writes, which a master follows
            for p in ps[::2]:
                p.detach().mul_(0.7)
        opt.step()
    return [t.cpu() for p in ps for t in (p.detach(), *state_of(opt, p).values())]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), (i, a.dtype, tuple(a.shape))


BITS = products(DTYPES, RULES, ["none", "rbwa", "mean-write-back", "same-dtype"])


@pytest.mark.parametrize(("dtype", "rule", "average"), BITS, ids=str)
def test_flat_threads_instruction_set_and_backend_do_not_change_a_bit(
    dtype: torch.dtype, rule: str, average: str
) -> None:
    from rbwa_fused import _C

    expected = run(dtype, rule, average)
    assert_same_bits(run(dtype, rule, average, flatten=False), expected)
    assert_same_bits(run(dtype, rule, average, backend="reference"), expected)
    threads, capability = torch.get_num_threads(), _C.cpu_capability()
    try:
        torch.set_num_threads(1)
        assert_same_bits(run(dtype, rule, average), expected)
        torch.set_num_threads(3)
        assert_same_bits(run(dtype, rule, average), expected)
        for name in ("baseline", "avx2", "avx512"):
            if _C.set_cpu_capability(name):
                assert _C.cpu_capability() == name
                assert_same_bits(run(dtype, rule, average), expected)
    finally:
        torch.set_num_threads(threads)
        assert _C.set_cpu_capability(capability)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_momentum_too_small_for_float32_keeps_its_buffer(backend: str) -> None:
    p, q = (nn.Parameter(torch.ones(5)) for _ in range(2))
    options = {"lr": 0.5, "momentum": 1e-60, "dampening": 0.5}
    ours = rf.FusedSGD([p], **options, backend=backend)
    theirs = torch.optim.SGD([q], **options, foreach=False)
    for _ in range(2):
        for x, opt in ((p, ours), (q, theirs)):
            x.grad = torch.full_like(x, 2.0)
            opt.step()
    assert torch.equal(p, q)
    assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


def test_layerwise_learning_rates_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = params(torch.float32)
    opt = rf.FusedSGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(ps)], momentum=0.9)
    launches = []
    backend = backends.CPU
    counting = backend._replace(call=lambda *a, **k: launches.append(a) or backend.call(*a, **k))
    launched = [(table, counting) for table, _ in opt.engine.tables.launches]
    monkeypatch.setattr(opt.engine.tables, "launches", launched)
    for p in ps:
        p.grad = torch.randn_like(p)
    opt.step()
    assert len(launches) == 1
    opt.step()
    assert len(launches) == 2


def test_mixed_dtypes_and_averages_per_group_keep_apart() -> None:
    a, b, c, d = (nn.Parameter(torch.ones(9, dtype=t)) for t in [*DTYPES[:3], torch.float32])
    opt = rf.FusedSGD(
        [
            {"params": [a, b, c]},
            {"params": [d], "average": False},
        ],
        lr=0.5,
        average=rf.rbwa(steps_per_epoch=1, start_epoch=0),
    )
    for _ in range(3):
        for p in (a, b, c, d):
            p.grad = torch.ones_like(p)
        opt.step()
    # RBWA from the first step on is SGD with learning rate eta, eta/2, eta/3
    for p in (a, b, c):
        assert p.tolist() == pytest.approx([1 - 0.5 * (1 + 1 / 2 + 1 / 3)] * 9, rel=1e-2)
    assert d.tolist() == [-0.5] * 9
    assert "average" not in opt.state.get(a, {}) and "average" not in opt.state.get(d, {})
    assert opt.state[c]["average"].dtype == torch.float32


def test_parameters_that_share_memory_are_stepped_in_turn_as_in_torch() -> None:
    def overlapping() -> list[nn.Parameter]:
        memory = torch.arange(20, dtype=torch.float32)
        return [nn.Parameter(memory[a:b]) for a, b in ((0, 10), (5, 15), (12, 20), (0, 20))]

    ours, theirs = overlapping(), overlapping()
    opt = rf.FusedSGD(ours, lr=0.1, momentum=0.9, weight_decay=0.1)
    torch_opt = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
    for step in range(4):
        for p, q, g in zip(ours, theirs, gradients(ours, step), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        torch_opt.step()
    assert ulps(ours[3].detach(), theirs[3].detach()) <= 16


def test_a_step_without_any_gradient_counts_nothing() -> None:
    p = nn.Parameter(torch.ones(4))
    opt = rf.FusedSGD([p], lr=0.1, average=rf.ema(0.5))
    opt.step()
    assert opt.n_averaged == 0 and not opt.state
    p.grad = torch.ones(4)
    opt.step()
    assert opt.n_averaged == 1 and torch.equal(opt.state[p]["average"], p)
