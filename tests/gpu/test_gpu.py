"""What only a GPU can show: the kernels' own bits, streams, AMP and graphs. `pytest -m gpu`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import AVERAGES, DTYPES, SCHEDULES, gradients, moved, params, policy_for, products
from rules import ALGORITHMS, RULES
from test_update import assert_same_bits, run, state_of
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda", 0)
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(backends.unavailable(name, GPU) is not None, reason="not there"),
    )
    for name in ("cuda", "triton")
]
NAMED = [name for name, policy in AVERAGES.items() if policy is None or not policy.custom]
CASES = products(DTYPES, RULES, AVERAGES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rule", "average"), CASES, ids=str)
def test_every_case_has_the_bits_of_the_cpu(
    dtype: torch.dtype, rule: str, average: str, backend: str
) -> None:
    on_gpu = run(dtype, rule, average, device="cuda", backend=backend)
    assert_same_bits(on_gpu, run(dtype, rule, average))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_has_the_same_bits(backend: str) -> None:
    runs = [
        run(torch.bfloat16, "rsgdm explicit", "ema", device="cuda", backend=backend, flatten=flat)
        for flat in (True, False, True)
    ]
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replicas_have_the_bits_of_the_cpu(dtype: torch.dtype, count: int) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        models = [[moved(p, device) for p in params(dtype, seed=k)] for k in range(count)]
        rf.pull_(models, 0.3)
        ends.append([p.cpu() for model in models for p in model])
    assert_same_bits(*ends)


def small(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5)).to(device)


def overflowing(opt: Any, scale: float, skip: bool, device: str, watched: bool) -> None:
    """A step as torch.amp.GradScaler takes it; `watched`, it must not wait for the device."""
    opt.grad_scale = torch.tensor([scale], device=device)
    opt.found_inf = torch.tensor([2.0 if skip else 0.0], device=device)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        del opt.grad_scale, opt.found_inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "average"), [case[1:] for case in products([torch.float32], ALGORITHMS, NAMED)]
)
def test_a_skipped_step_skips_everything_without_a_synchronisation(
    rule: str, average: str, backend: str
) -> None:
    ends = []
    counts = []
    for device, name in (("cpu", "cpu"), ("cuda", backend)):
        policy = policy_for(average, rule, torch.float32)
        ps = [nn.Parameter(moved(p, device)) for p in params(torch.float32)]
        opt = RULES[rule].made(ps, average=policy, backend=name)
        for step in range(1, 11):
            skip = step in (1, 4, 5)
            for p, g in zip(ps, gradients(ps, step), strict=True):
                p.grad = moved(g * (torch.inf if skip else 8.0), device)
            # by step 7 nothing is made anew
            overflowing(opt, 8.0, skip, device, watched=step >= 7 and device == "cuda")
        ends.append([t.cpu() for p in ps for t in (p.detach(), *state_of(opt, p).values())])
        counts.append((opt.n_averaged, opt.state_dict()["param_groups"][0]["step"]))
    assert counts[0] == counts[1] and counts[0][1] == 7
    assert_same_bits(*ends)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_trains_through_an_overflow(backend: str) -> None:
    model = small("cuda")
    opt = rf.FusedSGD(model.parameters(), 0.05, 0.9, average=rf.ema(0.9), backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1000)
    x, y = torch.randn(64, 20, device="cuda"), torch.randn(64, 5, device="cuda")
    losses = []
    for _ in range(120):
        opt.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    taken = opt.state_dict()["param_groups"][0]["step"]
    assert 0 < taken < 120 and opt.n_averaged == taken
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "average"),
    [
        *(("momentum", average) for average in (*NAMED, *SCHEDULES)),
        *[("free sgd", "ema"), ("free adamw", "none")],
    ],
)
def test_a_captured_step_replays_under_a_schedule(rule: str, average: str, backend: str) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        captured = device == "cuda"
        ps = [nn.Parameter(moved(p, device)) for p in params(torch.float32)]
        lr = torch.tensor(0.1, device=device)
        options = {"backend": backend if captured else "cpu", "capturable": captured}
        policy = policy_for(average, rule, torch.float32)
        opt = RULES[rule].made(ps, lr=lr, average=policy, **options)
        for p in ps:
            p.grad = torch.empty_like(p)
        graph = torch.cuda.CUDAGraph()
        for step in range(12):
            lr.fill_(0.1 / (1 + step))
            for p in ps:
                p.grad.fill_(step - 3.0)
            if captured and step == 3:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                torch.cuda.current_stream().synchronize()
                with torch.cuda.graph(graph, stream=side):
                    opt.step()
            if captured and step >= 3:
                graph.replay()
            else:
                opt.step()
        ends.append([t.cpu() for p in ps for t in (p.detach(), *state_of(opt, p).values())])
        group = opt.state_dict()["param_groups"][0]
        assert group["step"] == 12 and group.get("k", 12) == 12
    assert_same_bits(*ends)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_kernel_on_the_current_stream(backend: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    ps = [nn.Parameter(torch.randn(1000 + i, device="cuda")) for i in range(50)]
    groups = [{"params": [p], "lr": 0.01 * i} for i, p in enumerate(ps)]
    opt = rf.FusedSGD(groups, momentum=0.9, average=rf.ema(0.9), backend=backend)
    for p in ps:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        opt.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with profile(activities=[ProfilerActivity.CUDA]) as found, torch.cuda.stream(stream):
        opt.step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [e.name for e in found.events() if e.device_type == on_device]
    assert sum("step_kernel" in name for name in kernels) == 1, kernels


@pytest.mark.parametrize("backend", BACKENDS)
def test_averaged_weights_are_live_inside_and_the_weights_come_back(backend: str) -> None:
    model = small("cuda").to(memory_format=torch.preserve_format)
    opt = rf.FusedSGD(model.parameters(), 0.1, average=rf.ema(0.5), backend=backend)
    for _ in range(3):
        model(torch.randn(4, 20, device="cuda")).sum().backward()
        opt.step()
    weights = [p.detach().clone() for p in model.parameters()]
    averages = [opt.state[p]["average"].clone() for p in model.parameters()]
    with opt.averaged():
        inside: list[Tensor] = [p.detach().clone() for p in model.parameters()]
    assert_same_bits(inside, averages)
    assert_same_bits([p.detach() for p in model.parameters()], weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_more_than_2_to_the_31_elements(backend: str) -> None:
    count = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * count * 2 + 2**30:
        pytest.skip("needs 14 GB")
    p = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda"))
    opt = rf.FusedSGD([p], lr=1.0, backend=backend)
    p.grad = torch.ones_like(p)
    opt.step()
    assert bool((p == -1.0).all())


def test_averages_are_evaluated_where_a_model_was_moved_after_training() -> None:
    model = small("cuda")
    opt = rf.FusedSGD(model.parameters(), lr=0.1, average=rf.ema(0.5))
    for _ in range(3):
        model(torch.ones(2, 20, device="cuda")).square().sum().backward()
        opt.step()
    expected = {name: t.cpu() for name, t in opt.averaged_state_dict(model).items()}
    model.cpu()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(2):
        with opt.averaged():
            assert all(t.equal(expected[name]) for name, t in model.state_dict().items())
        assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert not before["0.weight"].equal(expected["0.weight"])


def test_the_command_checks_the_gpu_backends() -> None:
    command = [sys.executable, "-m", "rbwa_fused"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check cuda           ok" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_second_gpu_is_stepped_from_the_first(scaled: bool, backend: str) -> None:
    ends = []
    for device, name in (("cpu", "cpu"), ("cuda:1", backend)):
        ps = [nn.Parameter(moved(p, device)) for p in params(torch.bfloat16)]
        options = {"average": rf.ema(0.5), "master_weights": True, "backend": name}
        with torch.cuda.device(0):
            opt = rf.FusedSGD(ps, 0.5, 0.9, **options)
            for step in range(3):
                for p, g in zip(ps, gradients(ps, step), strict=True):
                    p.grad = moved(g, device)
                if scaled:
                    overflowing(opt, 2.0, step == 1, device, watched=False)
                else:
                    opt.step()
            with opt.averaged():
                inside = [p.detach().cpu() for p in ps]
        ends.append([*inside, *(t.cpu() for p in ps for t in (p.detach(), *opt.state[p].values()))])
    assert_same_bits(*ends)


def test_averages_on_the_cpu_and_on_a_gpu_are_live_together() -> None:
    ps = [nn.Parameter(torch.ones(5, device=device)) for device in ("cuda", "cpu")]
    opt = rf.FusedSGD(ps, lr=0.5, average=rf.ema(0.5))
    for _ in range(2):
        for p in ps:
            p.grad = torch.ones_like(p)
        opt.step()
    weights, averages = [0.0] * 5, [0.25] * 5
    with opt.averaged():
        assert [p.tolist() for p in ps] == [averages] * 2
    assert [p.tolist() for p in ps] == [weights] * 2
