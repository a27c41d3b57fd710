"""The CUDA backend's code, thread by thread on the CPU: packing, addressing, every case."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import beside
import pytest
import torch
from cases import (
    AVERAGES,
    DTYPES,
    SCHEDULES,
    SEVERAL,
    STEPS,
    gradients,
    params,
    policy_for,
    products,
)
from rules import KERNELS, RULES
from test_update import assert_same_bits, run, state_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rbwa_fused as rf
from rbwa_fused.average import Average
from rbwa_fused.engine import memory
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("emulated_cuda")

BITS = products(DTYPES, RULES, [*AVERAGES, *SEVERAL])


@pytest.mark.parametrize(("dtype", "rule", "average"), BITS, ids=str)
def test_every_case_has_the_bits_of_the_cpu(dtype: torch.dtype, rule: str, average: str) -> None:
    assert_same_bits(
        run(dtype, rule, average, backend="cuda"), run(dtype, rule, average, backend="cpu")
    )


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_number_spreads_as_far_as_on_the_cpu(rule: str) -> None:
    dtype = torch.bfloat16 if RULES[rule].master else torch.float32
    ends = []
    for backend in ("cuda", "cpu"):
        p = nn.Parameter(torch.ones(6, dtype=dtype))
        opt = RULES[rule].made([p], backend=backend)
        for step in range(4):
            p.grad = torch.ones_like(p)
            if step == 1:
                p.grad[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
            opt.step()
        state = state_of(opt, p)
        ends.append({key: t.isfinite().tolist() for key, t in {"": p, **state}.items()})
    assert ends[0] == ends[1] and not all(ends[0][""])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_flattened_it_has_the_same_bits(dtype: torch.dtype) -> None:
    for rule, average in (("momentum", "ema"), ("rsgdm explicit", "same-dtype")):
        assert_same_bits(
            run(dtype, rule, average, backend="cuda", flatten=False),
            run(dtype, rule, average, backend="cpu"),
        )


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_off_the_alignment_are_read_as_they_lie(dtype: torch.dtype, offset: int) -> None:
    ends = []
    for backend in ("cuda", "cpu"):
        p = nn.Parameter(torch.linspace(-1, 1, 5000, dtype=torch.float64).to(dtype))
        opt = rf.FusedSGD([p], 0.1, 0.9, weight_decay=0.1, backend=backend)
        for step in range(3):
            gradient = torch.linspace(-2, 3, 5000 + offset, dtype=torch.float64).to(dtype)
            p.grad = (gradient * (step + 1))[offset:]
            Scaler(opt, 2.0).step(skip=False)
        ends.append([p.detach(), opt.state[p]["momentum_buffer"], p.grad])
    assert_same_bits(*ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["momentum", "rsgdm explicit", "adamw amsgrad"])
def test_state_off_the_alignment_is_stepped_where_it_lies(rule: str, dtype: torch.dtype) -> None:
    """A user may assign it; parameter, average and gradient are on it."""
    ends = []
    for backend in ("cuda", "cpu"):
        p = nn.Parameter(torch.linspace(-1, 1, 4096, dtype=torch.float64).to(dtype))
        opt = RULES[rule].made([p], average=rf.ema(0.5), backend=backend)
        for step in range(4):
            p.grad = torch.linspace(-2, 3, 4096, dtype=torch.float64).to(dtype) * (step + 1)
            opt.step()
            if step == 1:
                for key in opt.engine.rule.streams:
                    whole = torch.empty(4097, dtype=opt.state[p][key].dtype)
                    opt.state[p][key] = whole[1:].copy_(opt.state[p][key])
        ends.append([p.detach(), *state_of(opt, p).values()])
    assert_same_bits(*ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_further_average_off_the_alignment_is_sampled_where_it_lies(dtype: torch.dtype) -> None:
    ends = []
    for backend in ("cuda", "cpu"):
        p = nn.Parameter(torch.linspace(-1, 1, 4096, dtype=torch.float64).to(dtype))
        opt = rf.FusedSGD([p], 0.1, average=[rf.ema(0.5), rf.ema(0.25)], backend=backend)
        for step in range(4):
            p.grad = torch.linspace(-2, 3, 4096, dtype=torch.float64).to(dtype) * (step + 1)
            opt.step()
            if step == 1:
                whole = torch.empty(4097, dtype=opt.state[p]["average_1"].dtype)
                opt.state[p]["average_1"] = whole[1:].copy_(opt.state[p]["average_1"])
        ends.append([p.detach(), *state_of(opt, p).values()])
    assert_same_bits(*ends)


def test_all_param_groups_are_one_launch(emulated_cuda: Any) -> None:
    ps = params(torch.float32)
    opt = rf.FusedSGD(
        [{"params": [p], "lr": 0.01 * i, "momentum": 0.9 * (i % 2)} for i, p in enumerate(ps)],
        average=rf.ema(0.9),
        backend="cuda",
    )
    emulated_cuda.launches()
    for p in ps:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        opt.step()
        assert emulated_cuda.launches() == 1


def test_as_few_launches_as_fit_and_the_same_bits(emulated_cuda: Any) -> None:
    ends = []
    for backend in ("cuda", "cpu"):
        ps = [nn.Parameter(torch.linspace(-1, 1, 5 + i % 7)) for i in range(1000)]
        groups = [{"params": [p], "lr": 0.001 * i} for i, p in enumerate(ps)]
        opt = rf.FusedSGD(groups, momentum=0.9, average=rf.ema(0.9), backend=backend)
        emulated_cuda.launches()
        for _ in range(3):
            for p in ps:
                p.grad = torch.ones_like(p)
            opt.step()
        launches = emulated_cuda.launches()
        assert launches == (3 * 9 if backend == "cuda" else 0)  # 96 + 168 bytes each, 32,672 fit
        ends.append([t for p in ps for t in (p.detach(), *state_of(opt, p).values())])
    assert_same_bits(*ends)


def test_dtypes_are_a_launch_each(emulated_cuda: Any) -> None:
    ps = [nn.Parameter(torch.ones(9, dtype=dtype)) for dtype in DTYPES * 2]
    opt = rf.FusedSGD(ps, lr=0.1, average=rf.ema(0.9), backend="cuda")
    for p in ps:
        p.grad = torch.ones_like(p)
    opt.step()
    assert emulated_cuda.launches() == len(DTYPES)


def test_a_large_model_takes_larger_chunks(emulated_cuda: Any) -> None:
    count = 100_000_003
    p = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    opt = rf.FusedSGD([p], lr=0.5, backend="cuda", flatten=False)
    p.grad = torch.ones_like(p)
    emulated_cuda.threads_run()
    opt.step()
    assert emulated_cuda.threads_run() == -(-count // 16384) * 256
    assert bool((p == -0.5).all())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_of_which_a_launch_failed_raises_and_is_not_taken_again(
    scaled: bool, emulated_cuda: Any
) -> None:
    """Two launches, one a dtype. The first has moved its parameters when the second fails."""
    ps = [nn.Parameter(torch.ones(9, dtype=dtype)) for dtype in DTYPES[:2]]
    opt = rf.FusedSGD(ps, lr=0.5, average=rf.ema(0.5), backend="cuda")
    for turn in range(2):  # a first step, with everything checked, and a usual one
        for p in ps:
            p.detach().fill_(1.0)
            p.grad = torch.ones_like(p)
        emulated_cuda.launches()
        emulated_cuda.fail(2)
        with pytest.raises(RuntimeError, match="out of luck"):
            Scaler(opt, 1.0).step(skip=False) if scaled else opt.step()
        assert emulated_cuda.launches() == 2, turn
        assert [p.tolist() for p in ps] == [[0.5] * 9, [1.0] * 9], turn


def test_a_failed_launch_in_the_backward_pass_raises_and_is_not_taken_again(
    emulated_cuda: Any,
) -> None:
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=0.5, backend="cuda", in_backward=True)
    emulated_cuda.launches()
    emulated_cuda.fail(1)
    with pytest.raises(RuntimeError, match="out of luck"):
        p.sum().backward()
    assert emulated_cuda.launches() == 1 and p.tolist() == [1.0] * 3
    del opt


def test_a_gradient_of_another_layout_is_still_copied_and_stepped_once(
    emulated_cuda: Any,
) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    opt = rf.FusedSGD([p], lr=0.5, backend="cuda")
    emulated_cuda.launches()
    for step in range(1, 3):
        p.grad = torch.ones(3, 2) if step == 1 else torch.ones(2, 3).t()
        opt.step()
    assert emulated_cuda.launches() == 2 and p.tolist() == [[0.0] * 2] * 3


def test_what_the_device_reads_of_a_step_is_brought_to_it() -> None:
    """A learning rate, or a scaler, on the first of two GPUs. Fake tensors need none."""
    with FakeTensorMode():
        there, here = torch.device("cuda", 0), torch.device("cuda", 1)
        counters = DeviceCounters.of([], torch.empty(0, 5, dtype=torch.float64), 0, [True], here)
        value = torch.ones(1, device=there)
        own = counters.for_step([value, None], value, value)
        read = [own.lrs[0], own.grad_scale, own.found_inf]
        assert [None if t is None else t.device for t in read] == [here] * 3
        assert own.lrs[1] is None


class Scaler:
    """What torch.amp.GradScaler does around a step."""

    def __init__(self, opt: Any, scale: float) -> None:
        self.opt = opt
        self.scale = torch.tensor([scale])

    def step(self, skip: bool) -> None:
        self.opt.grad_scale = self.scale
        self.opt.found_inf = torch.tensor([2.0 if skip else 0.0])  # a sum over devices
        try:
            self.opt.step()
        finally:
            del self.opt.grad_scale, self.opt.found_inf


SKIPPED = (1, 4, 5, 9)  # the very first step among them


def scaled_run(
    dtype: torch.dtype, rule: str, policy: Average | None, backend: str
) -> tuple[list[Tensor], Any]:
    ps = params(dtype)
    opt = RULES[rule].made(ps, average=policy, backend=backend)
    scaler = Scaler(opt, 8.0)
    everything = []
    for step in range(1, STEPS + 5):
        grads = gradients(ps, step)
        for i, (p, g) in enumerate(zip(ps, grads, strict=True)):
            p.grad = None if i == step else (g * 8.0 if step not in SKIPPED else g * torch.inf)
        scaler.step(skip=step in SKIPPED)
        if step not in SKIPPED:
            everything += [p.grad for p in ps if p.grad is not None]
    opt.state_dict()  # a device's count comes back to every `step`
    everything += [t for p in ps for t in (p.detach(), *state_of(opt, p).values())]
    return everything, opt


NAMED = [name for name, policy in AVERAGES.items() if policy is None or not policy.custom]
NAMED += SCHEDULES
NAMED += [name for name in SEVERAL if name != "custom-behind"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", NAMED)
def test_a_skipped_step_skips_everything_and_costs_no_look(
    average: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _, rule, _ in products([dtype], [*KERNELS, "rsgdm implicit"], [average]):
        policy = policy_for(average, rule, dtype)
        theirs, on_host = scaled_run(dtype, rule, policy, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "item", None)  # nothing is read back
            ours, on_device = scaled_run(dtype, rule, policy, "cuda")
        assert on_device.engine.device_counters is not None
        assert_same_bits(ours, theirs)
        assert on_device.n_averaged == on_host.n_averaged
        mine, other = on_device.state_dict(), on_host.state_dict()
        assert mine["param_groups"] == other["param_groups"]
        assert mine["state"].keys() == other["state"].keys()
        for key, held in mine["state"].items():
            assert held.keys() == other["state"][key].keys()


def test_counters_do_not_follow_the_default_device() -> None:
    ends = []
    for default in ("cpu", "meta"):
        p = nn.Parameter(torch.ones(5))
        one, none, g = torch.ones(1), torch.zeros(1), torch.ones(5)
        with torch.device(default):
            opt = rf.FusedSGD([p], 0.1, 0.5, average=rf.ema(0.5), backend="cuda")
            for found_inf in (one, none, none):
                p.grad = g.clone()
                opt.grad_scale, opt.found_inf = one, found_inf
                opt.step()
        assert opt.n_averaged == 2
        ends.append([p.detach(), *state_of(opt, p).values()])
    assert_same_bits(*ends)


def test_a_custom_weight_is_counted_by_the_host() -> None:
    policy = Average(lambda n, step: 1 / (n + 1))
    ours, opt = scaled_run(torch.float32, "momentum", policy, "cuda")
    theirs, _ = scaled_run(torch.float32, "momentum", policy, "cpu")
    assert opt.engine.device_counters is None
    assert_same_bits(ours, theirs)


def test_before_the_first_step_an_empty_shard_is_saved_with_the_keys_of_the_others() -> None:
    """Ranks that save other keys than the others would wait for each other."""
    for skips in ([True, True], [True, False]):
        saved = []
        for backend in ("cuda", "cpu"):
            ps = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(0, 3))]
            opt = rf.FusedSGD(ps, lr=0.1, momentum=0.5, average=rf.ema(0.5), backend=backend)
            for skip in skips:
                for p in ps:
                    p.grad = torch.ones_like(p)
                Scaler(opt, 1.0).step(skip)
            held = opt.state_dict()["state"]
            saved.append([held.get(i, {}).keys() - {"average"} for i in range(2)])
        assert saved[0] == saved[1] == [set() if all(skips) else {"momentum_buffer"}] * 2


def test_a_first_step_that_was_skipped_is_first_again_after_a_checkpoint() -> None:
    ends = []
    for interrupted in (False, True):
        ps = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))]
        opt = rf.RSGDM(ps, lr=0.1, momentum=0.5, backend="cuda")
        for step in range(1, 5):
            for p in ps:
                p.grad = torch.full_like(p, float(step))
            Scaler(opt, 1.0).step(skip=step == 1)
            if step == 1:
                state = opt.state_dict()
                assert all("momentum_buffer" not in held for held in state["state"].values())
                assert state["param_groups"][0]["step"] == 0
                if interrupted:
                    opt = rf.RSGDM(ps, lr=0.1, momentum=0.5, backend="cuda")
                    opt.load_state_dict(state)
        ends.append([p.detach() for p in ps])
    assert_same_bits(*ends)


def scaled(skips: list[bool]) -> rf.FusedSGD:
    """Whose device has counted these steps."""
    p = nn.Parameter(torch.ones(5))
    opt = rf.FusedSGD([p], lr=0.1, momentum=0.5, average=rf.ema(0.5), backend="cuda")
    for skip in skips:
        p.grad = torch.ones_like(p)
        Scaler(opt, 1.0).step(skip)
    return opt


@pytest.mark.parametrize("before", [[False] * 5, [True]], ids=["further", "all skipped"])
def test_what_a_device_has_counted_is_forgotten_where_a_checkpoint_is_loaded(
    before: list[bool],
) -> None:
    saved = scaled([False] * 2).state_dict()
    opt = scaled(before)
    opt.load_state_dict(saved)
    loaded = opt.state_dict()
    assert loaded["param_groups"] == saved["param_groups"]
    assert loaded["state"][0].keys() == saved["state"][0].keys()


def test_a_first_step_that_was_skipped_is_first_again_in_a_copy() -> None:
    ends = []
    for copied in (False, True):
        p = nn.Parameter(torch.ones(5))
        opt = rf.RSGDM([p], lr=0.1, momentum=0.5, backend="cuda")
        for step in range(1, 5):
            p.grad = torch.full_like(p, float(step))
            Scaler(opt, 1.0).step(skip=step == 1)
            if copied and step == 1:
                p, opt = copy.deepcopy((p, opt))
                assert opt.state_dict()["state"].get(0, {}) == {}
        ends.append([p.detach()])
    assert_same_bits(*ends)


def test_state_that_is_cleared_while_the_device_counts_starts_again() -> None:
    ends = []
    for backend in ("cuda", "cpu"):
        p, late = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(7))
        opt = rf.RSGDM([p, late], lr=0.1, momentum=0.5, average=rf.mean(), backend=backend)
        for step in range(1, 6):
            if step == 4:
                opt.state.clear()
            p.grad = torch.full_like(p, float(step))
            late.grad = torch.ones_like(late) if step == 5 else None
            Scaler(opt, 1.0).step(skip=False)
        assert opt.n_averaged == 2
        ends.append([t for q in (p, late) for t in (q.detach(), *state_of(opt, q).values())])
    assert_same_bits(*ends)


def test_an_average_taken_away_while_the_device_counts_is_a_copy_at_its_next_sample() -> None:
    """The host counts until then: a device knows no average that is missing."""
    p = nn.Parameter(torch.arange(-3.0, 4.0) / 8)
    opt = rf.FusedSGD(
        [p], 0.125, momentum=0.75, average=rf.ema(0.5, every=2), backend="cuda", capturable=True
    )
    copied = torch.zeros(7)
    for step in range(1, 9):
        p.grad = torch.full_like(p, 0.5 + step)
        opt.step()
        if step == 4:
            del opt.state[p]["average"]
        if step == 5:
            assert "average" not in opt.state[p] and opt.n_averaged == 2
        if step == 6:
            copied = p.detach().clone()
            assert torch.equal(opt.state[p]["average"], copied)
    assert opt.n_averaged == 4 and opt.engine.device_counters is not None
    assert torch.equal(opt.state[p]["average"], copied + 0.5 * (p.detach() - copied))


def test_a_group_added_while_the_device_counts_is_counted_with_the_others() -> None:
    ends = []
    for backend in ("cuda", "cpu"):
        first, second = (nn.Parameter(torch.ones(n)) for n in (5, 7))
        opt = rf.FusedSGD([first], 0.1, 0.5, average=rf.mean(), backend=backend)
        for step in range(1, 8):
            if step == 4:
                opt.add_param_group({"params": [second], "lr": 0.3})
            for p in (first, second):
                p.grad = torch.full_like(p, float(step))
            Scaler(opt, 1.0).step(skip=step in (1, 3, 4))
        counts = [group["n_averaged"] for group in opt.state_dict()["param_groups"]]
        assert counts == [4, 3]
        ends.append([t for p in (first, second) for t in (p.detach(), *state_of(opt, p).values())])
    assert_same_bits(*ends)


@pytest.mark.parametrize("average", NAMED)
def test_captured_steps_count_and_read_their_learning_rate_on_the_device(
    average: str,
    emulated_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay runs the launches of one step again, with nothing from the host."""
    ends = []
    for captured in (False, True):
        ps = [p for p in params(torch.float32) if memory.is_dense(p)]  # others cost copies
        lr = torch.tensor(0.1)
        policy = policy_for(average, "momentum", torch.float32)
        backend = "cuda" if captured else "cpu"
        opt = rf.FusedSGD(
            ps, lr, momentum=0.5, average=policy, backend=backend, capturable=captured
        )
        recorded: list[Any] = []
        for step in range(12):
            lr.fill_(0.1 / (1 + step))
            for p in ps:
                p.grad = torch.empty_like(p) if p.grad is None else p.grad
                p.grad.fill_(step - 3.0)
            if captured and step >= 2:
                if not recorded:
                    record(opt, recorded)
                    opt.step()
                else:
                    for call, args in recorded:
                        call(*args)
            else:
                opt.step()
        ends.append([t for p in ps for t in (p.detach(), *state_of(opt, p).values())])
        assert opt.state_dict()["param_groups"][0]["step"] == 12
        samples = opt.n_averaged
        assert policy is None or samples > 0
    assert_same_bits(*ends)


def record(opt: Any, calls: list[Any]) -> None:
    """Keeps what the next step launches. Tables of the host are copied, as a capture does."""

    def recording(function: Any) -> Any:
        def call(*args: Any) -> None:
            calls.append((function, args))
            function(*args)

        return call

    def prepare(backend: Any) -> Any:
        def recorded(params: Any, grads: Any, table: Any, counters: Any = None) -> Any:
            rows, samplings = table.rows.clone(), table.samplings.clone()
            copied = replace(table, rows=rows, samplings=samplings, views=None)
            function, *args = backend.call(params, grads, copied, counters)
            return recording(function), *args

        return recorded

    opt.engine.tables.launches = [
        (table, b._replace(call=prepare(b), advance=recording(b.advance)))
        for table, b in opt.engine.tables.launches
    ]


@pytest.mark.parametrize("policy", beside.POLICIES)
def test_beside_another_optimizer_the_device_counts_the_steps_that_no_scaler_skipped(
    policy: str,
) -> None:
    average, _ = beside.POLICIES[policy]
    results = []
    for backend in ("cpu", "cuda"):
        net = beside.Net()
        opt = beside.adamw(net, fused=True)
        averager = rf.Averager(net, average, optimizer=opt, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(1, beside.STEPS + 1):
            opt.zero_grad()
            scaler.scale(beside.loss(net, step)).backward()
            if step in (1, 4, 9):
                net.last.weight.grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.step(opt)
            scaler.update()
        counting = averager.engine.device_counters is not None
        assert counting == (backend == "cuda" and not average.custom)
        results.append(beside.ends(net, averager))
    assert results[0] == results[1]


@pytest.mark.parametrize("policy", beside.POLICIES)
def test_the_host_counts_again_once_an_averager_has_left_its_optimizer(policy: str) -> None:
    """By hand no scaler skips a step, and averages may begin with the weights before the next."""
    average, _ = beside.POLICIES[policy]
    average = replace(average, start=average.start + 4 * (average.initial == "current"))
    results = []
    for backend in ("cpu", "cuda"):
        net = beside.Net()
        opt = beside.adamw(net, fused=True)
        averager = rf.Averager(net, average, optimizer=opt, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(1, beside.STEPS + 1):
            opt.zero_grad()
            scaler.scale(beside.loss(net, step)).backward()
            if step in (1, 3):
                net.last.weight.grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.step(opt)
            scaler.update()
            if step == 5:
                averager.remove()
            if step > 5:
                averager.update()
        results.append(beside.ends(net, averager))
    assert results[0] == results[1]


@pytest.mark.parametrize("skipped", [False, True])
def test_a_sample_that_fails_while_the_device_counts_is_taken_before_the_next_step(
    skipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Engine.sample

    def fails(engine: Engine, *arguments: Any, **options: Any) -> bool:
        monkeypatch.setattr(Engine, "sample", sample)
        raise torch.OutOfMemoryError("out of memory")

    results = []
    for failing in (False, True):
        net = beside.Net()
        opt = beside.adamw(net, fused=True)
        averager = rf.Averager(net, rf.ema(0.5), optimizer=opt, backend="cuda")
        for step in range(1, 6):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            opt.zero_grad()
            scaler.scale(beside.loss(net, step)).backward()
            if step == 3 and skipped:
                net.last.weight.grad[0, 0] = torch.inf  # type: ignore[index]
            if step == 3 and failing:
                monkeypatch.setattr(Engine, "sample", fails)
                with pytest.raises(torch.OutOfMemoryError):
                    scaler.step(opt)
                del opt.grad_scale, opt.found_inf  # as the scaler would have
            else:
                scaler.step(opt)
        assert averager.engine.device_counters is not None
        assert averager.n_averaged == 5 - skipped
        results.append(beside.ends(net, averager))
    assert results[0] == results[1]
