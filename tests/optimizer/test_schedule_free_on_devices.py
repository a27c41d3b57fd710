"""Schedule-free optimizers whose steps a device counts: to the bit what the host would count."""

from __future__ import annotations

import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_schedule_free import CLASSES, LR, counts, params, take, values
from test_update import assert_same_bits, state_of
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import checks, doors, schedules

pytestmark = pytest.mark.usefixtures("emulated_cuda")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BACKENDS = ("cuda", "cpu")
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"warmup_steps": 4, "weight_decay": 0.1},
    {"warmup_steps": 3, "r": 2, "weight_lr_power": 3},
    {"r": 0.5, "weight_lr_power": 1.5, "maximize": True},
    {"r": -1, "weight_lr_power": 0},
    {"r": 1.3, "weight_lr_power": 0.7},  # the same function here, as on a CPU
    {"r": 20, "weight_lr_power": 17},
]


def made(
    cls: Any, backend: str = "cuda", dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """In training mode, and its parameters. A device counts, as on a GPU."""
    ps = params(dtype)
    options = {"lr": LR[cls], "capturable": backend == "cuda", **options}
    opt = cls(ps, backend=backend, **options)
    opt.train()
    return opt, ps


def counting(opt: Any) -> bool:
    return opt.engine.device_counters is not None


def everything(opt: Any, ps: list[nn.Parameter]) -> list[Tensor]:
    opt.state_dict()  # a device's count comes back to every `step`
    kept = [t for p in ps for _, t in sorted(state_of(opt, p).items())]
    return [*values(ps), *kept]


def told(opt: Any) -> list[list[Any]]:
    opt.state_dict()
    return [counts(opt, group) for group in range(len(opt.param_groups))]


@contextmanager
def scaler(opt: Any, skip: bool) -> Iterator[None]:
    """What torch.amp.GradScaler tells a step."""
    opt.grad_scale, opt.found_inf = torch.ones(1), torch.tensor([2.0 * skip])
    try:
        yield
    finally:
        del opt.grad_scale, opt.found_inf


@pytest.mark.filterwarnings("ignore:schedule-free steps of 16-bit")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_groups_count_as_on_the_host_whatever_is_skipped_absent_or_changed(
    cls: Any, dtype: torch.dtype
) -> None:
    """A group a schedule, an average beside, and a group that never has a gradient."""
    ends = []
    for backend in BACKENDS:
        ps = [nn.Parameter(torch.linspace(-1, 1, 5 + i, dtype=dtype)) for i in range(16)]
        groups: list[dict[str, Any]] = [
            {"params": ps[2 * i : 2 * i + 2], **own} for i, own in enumerate(SCHEDULES)
        ]
        groups += [{"params": ps[14:15], "lr": 0.0}, {"params": ps[15:], "average": False}]
        opt = cls(groups, lr=torch.tensor(0.3), average=rf.mean(start=2), backend=backend)
        opt.train()
        for step in range(14):
            opt.param_groups[0]["lr"] = torch.tensor(0.3 / (1 + step % 4))
            opt.param_groups[1]["lr"] = 0.2 + 0.1 * (step > 6)
            opt.param_groups[2]["warmup_steps"] = 3 + step // 9
            opt.param_groups[7]["lr"] = 0.1 * (step > 4)
            for i, p in enumerate(ps[:15]):
                p.grad = None if (i + step) % 5 == 0 else torch.full_like(p, 0.1 * i - step % 3)
            with scaler(opt, skip=step in (0, 1, 5, 8)):
                opt.step()
        assert counting(opt) == (backend == "cuda")
        ends.append((everything(opt, ps), told(opt), opt.n_averaged))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
    assert [count[0] for count in ends[0][1]] == [10, 10, 10, 10, 10, 10, 10, 8, 0]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_reads_nothing_back(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, ps = made(cls, lr=torch.tensor(0.1), warmup_steps=3)
    take(opt, ps, range(2))
    monkeypatch.setattr(Tensor, "item", None)
    monkeypatch.setattr(Tensor, "__float__", None)
    monkeypatch.setattr(Tensor, "__bool__", None)
    take(opt, ps, range(2, 4))
    monkeypatch.undo()
    assert told(opt)[0][0] == 4


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a captured graph would run again at each replay."""
    calls: list[Any] = []
    in_turn = doors.in_turn

    def recorded(own: list[Any]) -> None:
        calls.extend(own)
        in_turn(own)

    with monkeypatch.context() as patch:
        patch.setattr(doors, "in_turn", recorded)
        patch.setattr(checks, "capturing", lambda: True)
        yield calls


def replay(calls: list[Any]) -> None:
    for function, *arguments in calls:
        function(*arguments)


@pytest.mark.parametrize("cls", CLASSES)
def test_replays_count_and_follow_a_learning_rate_on_the_device(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for backend in BACKENDS:
        lr = torch.tensor(0.1)
        opt, ps = made(cls, backend, lr=lr, warmup_steps=6, r=1, average=rf.ema(0.5))
        for p in ps:
            p.grad = torch.empty_like(p)
        calls: list[Any] = []
        for step in range(12):
            lr.fill_(0.1 * (1 + step % 5))
            for i, p in enumerate(ps):
                p.grad.fill_(0.3 * i - 0.1 * step)  # type: ignore[union-attr]
            if step == 2 and backend == "cuda":
                with captured(monkeypatch) as calls:
                    opt.step()
            elif 2 < step < 8 and backend == "cuda":
                replay(calls)
            else:
                opt.step()
            if step == 5:  # a look, and a change of modes, in the middle
                assert told(opt)[0][0] == 6
                opt.eval()
                opt.train()
        ends.append((everything(opt, ps), told(opt), opt.n_averaged))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


@pytest.mark.parametrize("changed_before", [False, True])
def test_a_replay_has_the_numbers_of_its_capture_whatever_came_between(
    changed_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured graph reads memory, which later steps must leave alone."""
    opt, ps = made(rf.SGDScheduleFree, lr=0.5)
    take(opt, ps, range(2))
    if changed_before:
        opt.param_groups[0]["lr"] = 0.25
    with captured(monkeypatch) as calls:
        take(opt, ps, range(2, 3))
    captured_lr = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = 0.125
    take(opt, ps, range(3, 4))
    assert told(opt)[0][3] == 0.125
    replay(calls)
    assert told(opt)[0][0] == 5 and told(opt)[0][3] == captured_lr
    take(opt, ps, range(5, 6))
    assert told(opt)[0][3] == 0.125


def test_what_is_sent_in_a_capture_is_the_replays_and_stays_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that is captured happens at the replays: until then its memory says nothing."""
    opt, ps = made(rf.SGDScheduleFree, lr=0.5)
    take(opt, ps, range(2))
    sent, references = schedules._sent, []

    def captured_copy(rows: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        staging, table = sent(rows, device)[0], torch.full((len(rows), len(rows[0])), math.nan)
        table = table.to(device, torch.float64)
        references.extend((weakref.ref(staging), weakref.ref(table)))
        return staging, table

    opt.param_groups[0]["lr"] = 0.25
    with captured(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(schedules, "_sent", captured_copy)
        patch.setattr(doors, "in_turn", lambda calls: None)  # nothing runs in a capture
        take(opt, ps, range(2, 3))
    take(opt, ps, range(2, 3))  # the same numbers, and no replay before
    assert (told(opt)[0][0], told(opt)[0][3]) == (3, 0.25)
    opt.param_groups[0]["lr"] = 0.125
    take(opt, ps, range(3, 4))
    gc.collect()
    assert len(references) == 2 and all(reference() is not None for reference in references)


def by_load(opt: Any, ps: list[nn.Parameter], backend: str) -> Any:
    again, others = made(type(opt), backend)
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    for own, p in zip(others, ps, strict=True):
        own.data.copy_(p.detach())
    again.load_state_dict(torch.load(saved))
    return again, others


def by_torchs_load(opt: Any, ps: list[nn.Parameter], backend: str) -> Any:
    again, others = made(type(opt), backend)
    take(again, others, range(2))  # which its device has counted
    for own, p in zip(others, ps, strict=True):
        own.data.copy_(p.detach())
    torch.optim.Optimizer.load_state_dict(again, deepcopy(opt.state_dict()))
    return again, others


def by_pickle(opt: Any, ps: list[nn.Parameter], backend: str) -> Any:
    return pickle.loads(pickle.dumps((opt, ps)))


def by_deepcopy(opt: Any, ps: list[nn.Parameter], backend: str) -> Any:
    return deepcopy((opt, ps))


def by_hand(opt: Any, ps: list[nn.Parameter], backend: str) -> Any:
    """New tables for the same groups."""
    opt.param_groups[0]["params"][0].data = ps[0].data.clone()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    return opt, ps


@pytest.mark.parametrize("way", [by_load, by_torchs_load, by_pickle, by_deepcopy, by_hand])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_run_goes_on_bit_for_bit_wherever_it_is_counted(
    cls: Any, way: Callable[..., Any]
) -> None:
    still, others = made(cls, "cpu", warmup_steps=5)
    opt, ps = made(cls, "cuda", warmup_steps=5)
    for turn, backend in enumerate(("cpu", "cuda", "cuda")):
        steps = range(3 * turn, 3 * turn + 3)
        for p, q in zip(ps, others, strict=True):
            q.grad = p.grad = None
        take(opt, ps, steps)
        take(still, others, steps)
        opt, ps = way(opt, ps, backend)
        assert_same_bits(everything(opt, ps), everything(still, others))
        assert told(opt)[0] == told(still)[0]
    take(opt, ps, range(9, 11))
    take(still, others, range(9, 11))
    assert counting(opt)
    assert_same_bits(everything(opt, ps), everything(still, others))
    assert told(opt)[0] == told(still)[0]


def test_counts_that_somebody_writes_to_a_group_are_those_of_the_next_step() -> None:
    ends = []
    for backend in BACKENDS:
        opt, ps = made(rf.SGDScheduleFree, backend, weight_lr_power=1)
        take(opt, ps, range(3))
        assert told(opt)[0][0] == 3
        opt.param_groups[0].update(k=0, weight_sum=0.0)
        assert told(opt)[0][:2] == [0, 0.0]
        take(opt, ps, range(3, 5))
        assert told(opt)[0][0] == 2
        ends.append((everything(opt, ps), told(opt)))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_z_starts_at_the_weights_of_the_step_that_is_taken(
    cls: Any, master_weights: bool, looks: bool
) -> None:
    """Not at those of one that was skipped; and until then x is what the weights are."""
    ends = []
    for backend in BACKENDS:
        opt, ps = made(cls, backend, torch.bfloat16, master_weights=True)
        if not master_weights:
            opt, ps = made(cls, backend)
        for step in range(5):
            for p in ps:
                p.grad = torch.ones_like(p)
            ps[0].grad = torch.ones(5, 7).to(ps[0])[:, torch.arange(7)].t() * 1  # copied
            ps[0].grad = ps[0].grad.t().contiguous().view(7, 5)
            with scaler(opt, skip=step in (0, 2)):
                opt.step()
            if step == 0:
                with torch.no_grad():
                    for p in ps:
                        p.mul_(0.5)
                if looks:
                    before = values(ps)
                    with opt.averaged():
                        assert_same_bits(values(ps), before)
                    opt.eval()
                    assert_same_bits(values(ps), before)
                    opt.train()
        ends.append(everything(opt, ps))
    assert_same_bits(*ends)


def test_z_goes_on_where_gradients_are_looked_at_each_time() -> None:
    """Negated gradients are copied, by what gives parameters their state."""
    ends = []
    for backend in BACKENDS:
        opt, ps = made(rf.SGDScheduleFree, backend)
        for step in range(4):
            take(opt, ps[1:], range(step, step + 1))
            own = torch.complex(torch.zeros(7, 5), torch.full((7, 5), -1.0 - step))
            ps[0].grad = own.conj().imag
            opt.step()
        ends.append(everything(opt, ps))
    assert_same_bits(*ends)


def test_launches_are_one_more_than_of_momentum(emulated_cuda: Any) -> None:
    for cls, launches in ((rf.FusedSGD, 1), (rf.SGDScheduleFree, 2)):
        ps = params(torch.float32)
        opt = cls(ps, lr=0.1, momentum=0.9, backend="cuda", capturable=True)
        if cls is rf.SGDScheduleFree:
            opt.train()
        take(opt, ps, range(2))
        assert counting(opt)
        emulated_cuda.launches()
        take(opt, ps, range(2, 3))
        assert emulated_cuda.launches() == launches


def test_of_buffers_nothing_is_counted() -> None:
    """They are a group of the engine's, with an average and no rule."""
    ends = []
    for backend in BACKENDS:
        norm = nn.BatchNorm1d(5)
        options: dict[str, Any] = {"average": rf.ema(0.5), "buffers": norm}
        opt = rf.SGDScheduleFree(
            norm.parameters(), lr=0.1, backend=backend, capturable=backend == "cuda", **options
        )
        opt.train()
        for step in range(4):
            norm.running_mean.fill_(step)  # type: ignore[union-attr, operator]
            take(opt, [*norm.parameters()], range(step, step + 1))
        assert counting(opt) == (backend == "cuda")
        averages = opt.averaged_state_dict(norm, which="average")
        ends.append(([*averages.values()], told(opt)))
    assert_same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"settings": None}, "`settings` and `schedules` go together"),
        ({"schedules": None}, "`settings` and `schedules` go together"),
        ({"settings": torch.zeros(5, dtype=torch.float64)}, "`settings` must be a contiguous"),
        ({"schedules": torch.zeros(11, dtype=torch.float64)}, "`schedules` must be a contiguous"),
        ({"schedules": torch.zeros(12)}, "`schedules` must be a contiguous"),
    ],
)
def test_tables_of_a_schedule_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    opt, ps = made(rf.SGDScheduleFree)
    take(opt, ps, range(2))
    before = values(ps)
    launches = opt.engine.tables.launches

    def call(params: Any, grads: Any, table: Any, counters: Any) -> Any:
        return launches[0][1].call(params, grads, table, replace(counters, **given))

    opt.engine.tables.launches = [(table, b._replace(call=call)) for table, b in launches]
    with pytest.raises(RuntimeError, match=said):
        take(opt, ps, range(2, 3))
    assert_same_bits(values(ps), before)


def test_where_no_device_counts_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, ps = made(rf.SGDScheduleFree, capturable=False)
    take(opt, ps, range(2))
    with (
        captured(monkeypatch) as calls,
        pytest.raises(RuntimeError, match=r"schedule-free .* captured, .*\(expected capturable=T"),
    ):
        take(opt, ps, range(2, 3))
    assert not calls and told(opt)[0][0] == 2
