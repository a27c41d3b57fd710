"""The Triton backend: interpreted on the CPU against the reference, and compiled without a GPU.

Triton decides when it is imported whether it interprets, so the interpreted tests run in a process
of their own, which `test_the_interpreted_kernels_give_the_reference` starts.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import AVERAGES, DTYPES, SCHEDULES, SEVERAL, gradients, params, policy_for, products
from rules import KERNELS, RULES
from test_norm import gradients as norm_gradients
from test_norm import sums_by
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import reference, rules
from rbwa_fused.engine import backends, doors, norm, segments
from rbwa_fused.engine.counters import policy_table
from rbwa_fused.rules import Kind
from rbwa_fused.streams import KEPT, KEYS

pytest.importorskip("triton")
pytest.importorskip("numpy")  # what the interpreter computes with

from rbwa_fused.triton_kernels import step as triton_step
from rbwa_fused.triton_kernels.norm import sum_squares

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("RBWA_TRITON_TESTS") == "interpreted"
CPU = torch.device("cpu")
# Kinds of which one launch may have several.
FAMILIES = [
    (Kind.PLAIN, Kind.MOMENTUM, Kind.DECOUPLED, Kind.DIFFERENCE),
    (Kind.ADAM, Kind.AMSGRAD),
    (Kind.SCHEDULE_FREE,),
]
NAMED = [name for name in AVERAGES if name not in ("custom", "same-dtype")]
# Whose weights the device computes by functions that are rounded otherwise in their last place.
TRANSCENDENTAL = ("inverse", "exponential", "both", "power", "power-now", "sqrt", "cosine")


def states(opt: Any, p: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in opt.state.get(p, {}).items() if isinstance(v, Tensor)}


def units(a: Tensor, b: Tensor) -> int:
    """The largest distance in representable bfloat16 numbers."""

    def order(t: Tensor) -> Tensor:
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((order(a) - order(b)).abs().max())


def assert_same(actual: Tensor, expected: Tensor, where: Any) -> None:
    """Equal bits. The interpreter truncates where it stores bfloat16: one unit there."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.bfloat16 and actual.numel() > 0:
        assert units(actual, expected) <= 1, where
    else:
        assert torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True), where


class Twice:
    """A backend that takes each step by the reference and by Triton, from the same memory, compares
    all that they wrote, and goes on from what the reference wrote."""

    def __init__(self) -> None:
        self.steps = 0

    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        table: segments.Table,
        counters: Any = None,
        clip: Tensor | None = None,
    ) -> None:
        assert counters is None
        live = [*(p.detach() for p in params), *(g for g in grads if g is not None)]
        live += [*table.state, table.ages]
        before = [t.clone() for t in live]
        reference.step_(params, grads, table, clip)
        expected = [t.clone() for t in live]
        for tensor, value in zip(live, before, strict=True):
            tensor.copy_(value)
        triton_step.step_triton(params, grads, table, None, clip)
        for i, (tensor, value) in enumerate(zip(live, expected, strict=True)):
            assert_same(tensor, value, (i, tuple(tensor.shape)))
            tensor.copy_(value)
        self.steps += 1

    def call(self, *arguments: Any) -> Any:
        return self.step, *arguments


def few(dtype: torch.dtype) -> list[nn.Parameter]:
    """Of the cases' layouts one each; with chunks of 32 elements, several chunks and tails."""
    every = params(dtype)
    full = nn.Parameter(torch.linspace(-2, 2, 64, dtype=torch.float64).to(dtype))
    return [full, *(every[i] for i in (0, 1, 7, 9, 12, 14, 15))]


def run_twice(
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    average: str,
    dtype: torch.dtype,
    ps: list[nn.Parameter],
    steps: int,
    clipped: int | None = None,
) -> None:
    both = Twice()
    backend = doors.Backend("triton", both.call, False)
    monkeypatch.setattr(backends, "choose", lambda name, device: backend)
    policy = policy_for(average, rule, dtype)
    opt = RULES[rule].made(ps, average=policy, backend="reference")
    for step in range(steps):
        for p, g in zip(ps, gradients(ps, step), strict=True):
            p.grad = g
        if step > 0:
            ps[step % len(ps)].grad = None  # takes no step, but is sampled
        if step == 2:  # somebody else writes, which a master follows
            ps[0].detach().mul_(0.7)
        if step == clipped:
            opt.clip_grad_norm_(3.0)
        opt.step()
    assert both.steps == steps


MOST = ["none", "mean-write-back", "same-dtype", "swa-current"]
UNMASTERED = [name for name, rule in KERNELS.items() if rule.keeps and not rule.master]
AGED = [name for name in UNMASTERED if KERNELS[name].counts is None]  # by segments, not by groups
WIDE_AND_NARROW = (torch.float64, torch.float16)
CASES = products([torch.float32], UNMASTERED, AVERAGES)
CASES += products([torch.float32], RULES, MOST)
CASES += products([torch.float32, torch.float16], UNMASTERED, ["three"])
CASES += products([torch.float32, torch.float64], ["sgd", "momentum"], SEVERAL)
# The interpreter truncates to bfloat16, so it takes a parameter for another than its master's.
CASES += [
    case
    for case in products(DTYPES[1:], RULES, MOST[1:3])
    if not (case[0] == torch.bfloat16 and RULES[case[1]].master)
]
CASES += products([torch.float16], ["master"], [*AVERAGES, "three"])


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(("dtype", "rule", "average"), dict.fromkeys(CASES), ids=str)
    def test_every_step_gives_the_bits_of_the_reference(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rule: str, average: str
    ) -> None:
        monkeypatch.setattr(triton_step, "CHUNK", 32)
        run_twice(monkeypatch, rule, average, dtype, few(dtype), steps=5)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_clipped_step_gives_the_bits_of_the_reference(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(triton_step, "CHUNK", 32)
        for rule in ("momentum", "rsgdm explicit"):
            run_twice(monkeypatch, rule, "ema", dtype, few(dtype), steps=3, clipped=1)

    @pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
    def test_the_norm_has_the_bits_of_the_reference(self, dtype: torch.dtype | None) -> None:
        grads = norm_gradients(dtype)
        expected, found = sums_by(norm.sum_squares_, grads), sums_by(sum_squares, grads)
        assert torch.equal(found, expected)

    def test_the_norm_of_more_chunks_than_lanes(self) -> None:
        grads = norm_gradients(torch.float32, (3, 300 * 4096 + 9, 5))
        assert torch.equal(sums_by(sum_squares, grads), sums_by(norm.sum_squares_, grads))

    def test_without_a_single_element_the_norm_is_0(self) -> None:
        grads = [torch.zeros(0), torch.zeros(3, 0)]
        assert sums_by(sum_squares, grads).tolist() == [0.0]

    def test_a_clipped_step_of_which_the_device_counts(self) -> None:
        ends = []
        for backend in ("triton", "cpu"):
            p = nn.Parameter(torch.zeros(2))
            opt = rf.FusedSGD([p], lr=1.0, momentum=0.5, backend=backend, capturable=True)
            for skipped in (False, True, False):
                p.grad = torch.tensor([3.0, 4.0])
                opt.clip_grad_norm_(1.0)
                opt.found_inf = torch.tensor([float(skipped)])
                opt.step()
            ends.append(p.tolist())
        assert ends[0] == ends[1]

    @pytest.mark.parametrize("parts", [1, 4])
    def test_every_layout_in_chunks_as_they_are(
        self, monkeypatch: pytest.MonkeyPatch, parts: int
    ) -> None:
        if parts > 1:
            monkeypatch.setattr(triton_step, "LARGE", 1)
            monkeypatch.setattr(triton_step, "CHUNK", 512)
        ps = params(torch.float32)
        run_twice(monkeypatch, "rsgdm explicit", "mean-write-back", torch.float32, ps, steps=3)

    @pytest.mark.parametrize("kinds", FAMILIES, ids=str)
    def test_any_coefficients_and_infinities_do_as_in_the_reference(
        self, kinds: tuple[Kind, ...]
    ) -> None:
        random = torch.Generator().manual_seed(0)
        groups = list(itertools.product(kinds, (0.0, 1.0), (0.0, 1.0), (0.0, 1.0)))
        columns = len(rules.COLUMNS)
        numbers = torch.rand(2 * len(groups), columns, generator=random, dtype=torch.float64)
        dropped = [rules.COLUMNS.index(name) for name in ("lambda_", "alpha", "rho")]
        for i, (kind, *zeros) in enumerate(groups):
            numbers[2 * i : 2 * i + 2, 0] = kind
            numbers[2 * i : 2 * i + 2, dropped] *= torch.tensor(zeros).double()
            if kind == Kind.MOMENTUM:  # served as Kind.DECOUPLED
                numbers[2 * i : 2 * i + 2, rules.COLUMNS.index("rho")] = 0.0
        flags = (0.0, 1.0)
        samplings = [
            [0.5, *row] for row in itertools.product((0.0, 0.3, 1.0), (1.0,), flags, flags)
        ]
        samplings.append([0.7, 0.3, 0.0, 0.0, 1.0])  # not sampled, whatever else it says
        table = segments.Segments()
        memory, grads = [], []
        every = list(itertools.product(range(len(groups)), range(len(samplings))))
        for i, (group, sampling) in enumerate(every):
            memory.append(torch.randn(40, generator=random))
            table.add(memory[-1], 0, i, 2 * group, sampling)
            g = torch.randn(40, generator=random)
            g[3] = -torch.inf
            memory[-1][5] = torch.inf
            grads.append(None if i % 7 == 0 else g)
        keys = {"average": "average"} | {slot: key for key, slot in KEYS.items()}
        for slot in ("average", *KEPT):
            own = [
                i
                for i, (group, _) in enumerate(every)
                if slot == "average" or slot in rules.KEPT_BY[groups[group][0]]
            ]
            held = {i: torch.randn(40, generator=random) for i in own}
            if slot.startswith("v"):
                held = {i: tensor.abs() for i, tensor in held.items()}
            table.attach(keys[slot], held)
        table.set_ages(i % 2 for i in range(len(memory)))
        tables = table.table(numbers, torch.tensor(samplings, dtype=torch.float64))
        for i, buffer in enumerate(tables.state):
            buffer[7 + i % 32] = torch.inf
        Twice().step(memory, grads, tables)

    def test_all_groups_of_a_pair_of_dtypes_are_one_launch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both = Twice()
        monkeypatch.setattr(
            backends, "choose", lambda *_: doors.Backend("triton", both.call, False)
        )
        launched: list[tuple[torch.dtype, torch.dtype]] = []
        launch = triton_step.Launch._launch

        def count(self: Any, *args: Any) -> None:
            launched.append((self.dtype, self.average_dtype))
            launch(self, *args)

        monkeypatch.setattr(triton_step.Launch, "_launch", count)
        a, b, c, d = (nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 9, 1, 3))
        e, f = (nn.Parameter(torch.ones(7, dtype=torch.float16)) for _ in "ef")
        same = rf.Average(rf.Ema(0.5), dtype=torch.float16)
        opt = rf.FusedSGD(
            [
                {"params": [a]},
                {"params": [b], "lr": 0.3, "average": False},
                {"params": [c], "momentum": 0.0, "maximize": True},
                {"params": [d], "average": rf.mean(start=1, write_back_every=2)},
                {"params": [e], "average": same},
                {"params": [f]},
            ],
            lr=0.1,
            momentum=0.9,
            average=rf.ema(0.6),
            backend="reference",
        )
        for _ in range(3):
            launched.clear()
            for p in (a, b, c, d, e, f):
                p.grad = torch.linspace(1, 2, p.numel(), dtype=p.dtype)
            opt.step()
            half = (torch.float16, torch.float16), (torch.float16, torch.float32)
            assert sorted(launched, key=str) == sorted(
                [*half, (torch.float32, torch.float32)], key=str
            )

    def test_tables_do_not_follow_the_default_device(self) -> None:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        with torch.device("meta"):
            opt = rf.FusedSGD([p], lr=0.5, momentum=0.5, backend="triton")
            for _ in range(2):
                opt.step()
        assert p.tolist() == [1 - 0.5 * (1 + 1.5)] * 3

    def test_tables_are_copied_only_when_they_change_and_are_forgotten(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tables: list[Any] = []

        def step(params: Any, grads: Any, table: Any, counters: Any) -> None:
            triton_step.step_triton(params, grads, table)
            tables.append(triton_step._launches[table][0][0].upload)

        def call(*args: Any) -> Any:
            return step, *args

        monkeypatch.setattr(backends, "choose", lambda *_: doors.Backend("triton", call, False))
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = rf.FusedSGD([p], lr=0.5, momentum=0.5, backend="triton")
        for lr in (0.5, 0.5, 0.5, 0.25, 0.25):
            opt.param_groups[0]["lr"] = lr
            opt.step()
        _, second, third, fourth, fifth = tables
        assert second is third and third is not fourth and fourth is fifth
        assert p.tolist() == [1 - 0.5 * (1 + 1.5 + 1.75) - 0.25 * (1.875 + 1.9375)] * 3
        del opt
        gc.collect()
        assert len(triton_step._launches) == 0

    @pytest.mark.parametrize("average", ["rbwa", "mean-write-back", "swa"])
    def test_a_step_that_only_changes_weights_copies_a_few_numbers(
        self, monkeypatch: pytest.MonkeyPatch, average: str
    ) -> None:
        """A mean's weight is another one each step, and an lr may be."""
        both, copied = Twice(), []
        monkeypatch.setattr(
            backends, "choose", lambda *_: doors.Backend("triton", both.call, False)
        )
        copy = triton_step._copied

        def spy(pieces: Any, device: Any) -> Any:
            copied.append(sum(piece.nbytes for piece in pieces))
            return copy(pieces, device)

        monkeypatch.setattr(triton_step, "_copied", spy)
        ps = [nn.Parameter(torch.linspace(-1, 1, 3 + i)) for i in range(20)]
        policy = {
            "rbwa": rf.rbwa(steps_per_epoch=100, start_epoch=0),
            "mean-write-back": rf.mean(write_back_every=3),
            "swa": rf.swa(start=0, every=1),
        }[average]
        opt = rf.FusedSGD(ps, 0.1, 0.9, average=policy, backend="reference")
        for p in ps:
            p.grad = torch.ones_like(p)
        steady = []
        for step in range(12):
            opt.param_groups[0]["lr"] = 0.1 / (1 + step // 6)
            copied.clear()
            opt.step()
            steady.append(list(copied))
        table = len(ps) * 15 * 8
        assert sum(steady[0]) > table
        alone = 4 * (14 * 2 + 5 * 2)  # two rows of a group, two of a sampler
        assert steady[2:] == [[alone]] * 10

    @pytest.mark.parametrize("name", [*NAMED, *SCHEDULES])
    def test_the_device_counts_and_weighs_as_the_host_does(self, name: str) -> None:
        policy = policy_for(name, "momentum", torch.float32)
        counters = Counters([None, policy], segments=1)
        step = n = 0
        for skipped in ([1.0, 0.0, 0.0, 3.0] * 9)[1:]:
            rows = [torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)] * 4
            if policy is not None:
                *rows, n_after = [*rows[:2], *expected_rows(policy, n, step + 1)]
            else:
                n_after = n
            expected = torch.stack(rows)
            exact = name not in TRANSCENDENTAL
            assert torch.equal(counters.samplings64, expected) or not exact, step
            assert (counters.samplings64 - expected).abs().max() <= 4 * 2**-53, step
            assert torch.equal(counters.samplings32, counters.samplings64.float()), step
            counters.found_inf = torch.tensor([skipped])
            triton_step.advance_triton(counters)
            if not skipped:
                step, n = step + 1, n_after
            assert counters.counts.tolist() == [step, 0, n]

    def test_many_policies_and_segments_are_counted_at_once(self) -> None:
        tables = [rf.table([0.5, 0.25 + i / 8], start=i) for i in range(2)]
        counters = Counters([rf.ema(0.5, start=i) for i in range(5)] + tables, segments=3000)
        counters.marks[5, 0] = 1
        expected = counters.marks.clone()
        expected[::7, 0] = 3
        for _ in range(3):
            counters.marks[::7, 1] = 1
            triton_step.advance_triton(counters)
        assert counters.counts.tolist() == [3, 3, 2, 1, 0, 0, 3, 2]
        assert counters.samplings64[10::2, 1].tolist() == [0.25, 0.375]
        assert torch.equal(counters.marks, expected)

    def test_a_gradient_that_changes_its_layout_later_is_still_read_rightly(self) -> None:
        ends = []
        for backend in ("triton", "reference"):
            p = nn.Parameter(torch.arange(6.0).reshape(3, 2).t())
            opt = rf.FusedSGD([p], lr=1.0, backend=backend)
            for step in range(3):
                p.grad = torch.arange(6.0).reshape(2, 3)
                if step == 0:
                    p.grad = torch.empty_like(p).copy_(p.grad)
                opt.step()
            ends.append(p.detach())
        assert_same(*ends, "weights")

    @pytest.mark.parametrize(
        "average", ["none", "mean-write-back", "swa-current", "rbwa", "three", "rbwa-and-ema"]
    )
    def test_the_optimizer_takes_it_by_name(
        self, average: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Steps, skipped steps, counters and averaged() through FusedSGD(backend="triton")."""
        monkeypatch.setattr(triton_step, "CHUNK", 32)
        ends = []
        for backend in ("triton", "reference"):
            ps = three(torch.float32)
            policy = policy_for(average, "momentum", torch.float32)
            opt = rf.FusedSGD(ps, 0.1, 0.8, average=policy, backend=backend)
            assert opt.backend == backend
            for step in range(1, 9):
                skip = step in (1, 4)
                for p, g in zip(ps, gradients(ps, step), strict=True):
                    p.grad = g * (torch.inf if skip else 4.0)
                opt.grad_scale, opt.found_inf = torch.tensor([4.0]), torch.tensor([float(skip)])
                opt.step()
                del opt.grad_scale, opt.found_inf
            assert (opt.engine.device_counters is not None) == (backend == "triton")
            with opt.averaged():
                inside = [p.detach().clone() for p in ps]
            kept = [t for p in ps for t in (p.detach(), *states(opt, p).values())]
            ends.append([*inside, *kept, torch.tensor(opt.n_averaged)])
        for ours, theirs in zip(*ends, strict=True):
            assert_same(ours, theirs, average)

    @pytest.mark.parametrize(
        ("rule", "average", "dtype"),
        [
            *(("dampening", average, torch.float32) for average in NAMED),
            *itertools.product(AGED, ["mean-write-back"], WIDE_AND_NARROW),
            *itertools.product(["rsgdm implicit"], ["rbwa"], WIDE_AND_NARROW),
            ("sgd", "algorithm2", torch.float32),
            ("rsgdm explicit", "lookahead", torch.float32),
        ],
        ids=str,
    )
    def test_skipped_steps_leave_no_trace_and_counters_on_the_device_agree(
        self, monkeypatch: pytest.MonkeyPatch, rule: str, average: str, dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(triton_step, "CHUNK", 32)
        ours, theirs = three(dtype), three(dtype)
        policy = policy_for(average, rule, dtype)
        second = {"lr": 0.05, "average": False, "weight_decay": 0.3}
        opt = RULES[rule].made(
            [{"params": theirs[:2]}, {"params": theirs[2:], **second}],
            average=policy,
            backend="reference",
        )
        device = OnDevice(ours, opt, policy)
        for step in range(12):
            lr = torch.tensor([RULES[rule].options["lr"] / (1 + step)])
            opt.param_groups[0]["lr"], device.deferred.lrs = lr.item(), [lr, None]
            scale = None if step % 5 == 3 else torch.tensor([3.0 + step])
            # a sum over devices, so it may be above 1; the very first step overflows too
            skipped = torch.tensor([{0: 1.0, 4: 2.0, 7: 1.0}.get(step, 0.0)])
            grads = gradients(ours, step)
            for p, q, g in zip(ours, theirs, grads, strict=True):
                p.grad, q.grad = g.clone(), g.clone()
            if step in (0, 1, 2, 6):
                ours[1].grad = theirs[1].grad = None  # steps first when others have a momentum
            opt.grad_scale, opt.found_inf = scale, skipped
            opt.step()
            device.step(scale, skipped)
            for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                assert_same(p.detach(), q.detach(), (step, i))
                if p.grad is not None and scale is not None:
                    wide = torch.promote_types(dtype, torch.float32)
                    unscaled = grads[i].to(wide) * (1 / scale.to(wide))
                    assert_same(p.grad, grads[i] if skipped else unscaled.to(dtype), (step, i))
                held = states(opt, q)
                age = int(held.pop("step", 0))
                for name, value in held.items():
                    assert_same(device.state[name][i], value, (step, i, name))
                started = opt.engine.rule.streams[0] in held
                assert age in (0, device.deferred.marks[i, 0]), (step, i)
                assert (device.deferred.marks[i, 0] > 0) == started, (step, i)
        assert device.deferred.counts.tolist() == [9, opt.n_averaged, 0]

    @pytest.mark.parametrize("dtype", WIDE_AND_NARROW, ids=str)
    @pytest.mark.parametrize("rule", ["free sgd", "free adamw"])
    def test_what_a_group_counts_has_the_bits_of_the_host(
        self, monkeypatch: pytest.MonkeyPatch, rule: str, dtype: torch.dtype
    ) -> None:
        """Groups of every schedule, some of them without a gradient, in several blocks."""
        monkeypatch.setattr(triton_step, "CHUNK", 32)
        monkeypatch.setattr(triton_step, "GROUPS_BLOCK", 2)
        schedules: list[dict[str, float]] = [
            {"warmup_steps": warmup, "r": r, "weight_lr_power": power}
            for warmup, r, power in [(0, 0, 2), (3, 1, 2), (5, 0.5, 1), (0, -1.5, 0), (2, 16, 0.5)]
        ]
        schedules += [{"lr": 0.1 * i} for i in range(4)]
        ends, counted = [], []
        for backend in ("triton", "cpu"):
            ps = [nn.Parameter(torch.linspace(-1, 1, 3, dtype=dtype)) for _ in schedules]
            groups = [{"params": [p], **own} for p, own in zip(ps, schedules, strict=True)]
            opt = RULES[rule].made(groups, average=rf.ema(0.5), backend=backend)
            for step in range(7):
                for p, g in zip(ps, gradients(ps, step), strict=True):
                    p.grad = g
                ps[step % 5].grad = None
                opt.param_groups[0]["lr"] = 0.3 / (1 + step)  # falls below the largest
                if step == 1:  # z begins there, not where the weights were in the skipped step
                    ps[2].detach().mul_(0.5)
                opt.grad_scale = torch.ones(1)
                opt.found_inf = torch.tensor([float(step in (0, 3))])
                opt.step()
            assert (opt.engine.device_counters is not None) == (backend == "triton")
            kept = [states(opt, p) for p in ps]
            ends.append([t for own in kept for _, t in sorted(own.items())])
            ends[-1] += [p.detach() for p in ps]
            counted.append(opt.state_dict()["param_groups"])
        assert counted[0] == counted[1] and [counted[0][i]["k"] for i in range(3)] == [4, 3, 4]
        for ours, theirs in zip(*ends, strict=True):
            assert_same(ours, theirs, rule)

    @pytest.mark.parametrize(("r", "power"), [(1.3, 2.7), (20, 17)])
    def test_exponents_of_no_half_or_large_ones_differ_in_the_last_places_alone(
        self, r: float, power: float
    ) -> None:
        counted = []
        for backend in ("triton", "cpu"):
            p = nn.Parameter(torch.ones(3))
            opt = RULES["free sgd"].made([p], r=r, weight_lr_power=power, backend=backend)
            for step in range(1, 60):
                opt.param_groups[0]["lr"] = 0.3 * step
                p.grad = torch.ones(3)
                opt.found_inf = torch.zeros(1)
                opt.step()
            assert (opt.engine.device_counters is not None) == (backend == "triton")
            counted.append(opt.state_dict()["param_groups"][0])
        ours, theirs = (group["weight_sum"] for group in counted)
        assert abs(ours - theirs) <= 64 * 2**-53 * theirs


class Counters(SimpleNamespace):
    """What `advance_triton` works on, before the first step."""

    def __init__(self, policies: list[rf.Average | None], segments: int) -> None:
        rows = 2 * len(policies)
        super().__init__(
            counts=torch.tensor([-1] + [0] * len(policies)),
            policies=torch.tensor(policy_table(policies), dtype=torch.float64),
            samplings32=torch.zeros(rows, 5),
            samplings64=torch.zeros(rows, 5, dtype=torch.float64),
            marks=torch.zeros(segments, 2, dtype=torch.int32),
            agings=torch.full((segments, 3), torch.nan, dtype=torch.float64),
            grad_scale=None,
            found_inf=None,
            settings=None,
            schedules=None,
            lrs=[],
        )
        triton_step.advance_triton(self)  # counts step 0, which no policy samples


def expected_rows(policy: rf.Average, n: int, step: int) -> tuple[Tensor, Tensor, int]:
    """Both rows of a policy after n samples, from its documentation, and the samples after it."""
    begun = {"first_sample": False, "current": step > policy.start, "now": True}
    current = n == 0 and begun[policy.initial]
    n += current
    due = policy.due(step)
    w = policy.weight_of(n, step) if due else 0.0
    written = due and policy.written_back(step)
    buffered = [1.0, w, due or current, current, written]
    elided = [w if due else 1.0, 0.0, 0.0, 0.0, 0.0]
    pair = torch.tensor([buffered, elided], dtype=torch.float64)
    return pair[0], pair[1], n + due


def three(dtype: torch.dtype) -> list[nn.Parameter]:
    values = torch.linspace(-1, 1, 40, dtype=torch.float64)
    return [nn.Parameter(values[:n].to(dtype).clone()) for n in (40, 5, 17)]


class OnDevice:
    """Three parameters in two groups, the first with a policy, stepped by device counters alone."""

    def __init__(self, ps: list[nn.Parameter], opt: Any, policy: rf.Average | None) -> None:
        self.params, self.opt = ps, opt
        self.table = segments.Segments()
        for i, p in enumerate(ps):
            group = int(i == 2)
            elided = policy is not None and policy.elided_for(p.dtype) and group == 0
            self.table.add(p, group, i, row=2 * group, sampling=2 * group + elided)
        self.state = {
            name: {
                i: torch.zeros_like(
                    p, dtype=opt.engine.tables.plan.groups[0].dtype_of(name, p)
                ).detach()
                for i, p in enumerate(ps)
            }
            for name in opt.engine.rule.streams
            if opt.engine.rule.name != "adam" or opt.defaults["amsgrad"] or "max" not in name
        }
        if policy is not None and not policy.elided_for(ps[0].dtype):
            dtype = policy.dtype_for(ps[0].dtype)
            self.state["average"] = {i: ps[i].detach().to(dtype, copy=True) for i in range(2)}
        for name, tensors in self.state.items():
            self.table.attach(name, tensors)
        self.deferred = Counters([policy, None], segments=3)

    def step(self, grad_scale: Tensor | None, found_inf: Tensor) -> None:
        rows = []
        for group, first in itertools.product(self.opt.param_groups, (False, True)):
            lr = 99.0 if group is self.opt.param_groups[0] else group["lr"]  # the tensor's turn
            rows.append(self.opt.engine.rule.row({**group, "lr": lr}, first))
        self.deferred.grad_scale, self.deferred.found_inf = grad_scale, found_inf
        samplings = torch.full((4, rules.SAMPLING.size // 8), torch.nan, dtype=torch.float64)
        table = self.table.table(torch.tensor(rows, dtype=torch.float64), samplings)
        grads = [p.grad for p in self.params]
        triton_step.step_triton(self.params, grads, table, self.deferred)
        triton_step.advance_triton(self.deferred)


def disassemble(cubin: bytes, folder: Path) -> Counter[str]:
    """How often each instruction stands in a kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        pytest.skip("this build of Triton has no disassembler")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^\s+(?:/\*\w+\*/)?\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]+)", text, re.M))


# dtype, dtype of theta, of what is kept and of averages, rule, averaged, counters on the device
KERNELS = [
    ("float32", "float32", "float32", "float32", "PLAIN", False, False),
    ("float32", "float32", "float32", "float32", "DECOUPLED", False, False),
    ("float32", "float32", "float32", "float32", "DECOUPLED", True, False),
    ("float32", "float32", "float32", "float32", "DIFFERENCE", True, True),
    ("bfloat16", "bfloat16", "bfloat16", "float32", "DECOUPLED", True, False),
    ("bfloat16", "bfloat16", "bfloat16", "float32", "DIFFERENCE", True, True),
    ("bfloat16", "float32", "float32", "float32", "DECOUPLED", False, False),
    ("float16", "float32", "float32", "float32", "DIFFERENCE", True, True),
    ("float16", "float16", "float16", "float16", "DECOUPLED", True, True),
    ("float32", "float32", "float32", "float32", "ADAM", False, False),
    ("float32", "float32", "float32", "float32", "ADAM", True, False),
    ("float32", "float32", "float32", "float32", "AMSGRAD", True, True),
    ("bfloat16", "bfloat16", "float32", "float32", "ADAM", True, False),
    ("bfloat16", "float32", "float32", "float32", "ADAM", True, True),
    ("float16", "float16", "float16", "float16", "AMSGRAD", True, False),
    ("float32", "float32", "float32", "float32", "SCHEDULE_FREE", True, False),
    ("bfloat16", "bfloat16", "float32", "float32", "SCHEDULE_FREE", True, False),
]


class TestCompiled:
    __test__ = not INTERPRETED

    def test_the_interpreted_kernels_give_the_reference(self) -> None:
        env = {**os.environ, "RBWA_TRITON_TESTS": "interpreted", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "passed" in done.stdout and "skipped" not in done.stdout

    def test_without_the_interpreter_the_cpu_is_refused_with_the_way_out(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "TRITON_INTERPRET=1" in (triton_step.available(CPU) or "")
        p = torch.ones(3)
        table = segments.Segments()
        table.add(p, 0, 0, row=0, sampling=0)
        columns = len(rules.COLUMNS)
        rows = torch.zeros(2, columns, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            triton_step.step_triton([p], [p], table.table(*rows))
        assert "mps" in (triton_step.available(torch.device("mps")) or "")

    def test_nothing_needs_triton_before_a_step_does(self) -> None:
        module = triton_step.__name__
        code = f"""
import sys
before = "triton" in sys.modules
import {module} as step, torch
assert before or "triton" not in sys.modules
sys.modules["triton"] = None
assert "pip install triton" in step.available(torch.device("cuda"))
"""
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)

    @pytest.mark.parametrize("parts", [1, triton_step.PARTS])
    @pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k)))
    def test_full_chunks_move_128_bits_an_instruction_and_spill_nothing(
        self, kernel: tuple[str, str, str, str, str, bool, bool], parts: int, tmp_path: Path
    ) -> None:
        import triton
        import triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        update = sys.modules.get(f"{triton_step.__package__}.update")
        if update is None:
            triton_step.available(torch.device("cuda"))
            update = sys.modules[f"{triton_step.__package__}.update"]
        if not isinstance(update.step_kernel, triton.JITFunction):
            pytest.skip("TRITON_INTERPRET is set")
        dtype, theta, kept_dtype, average, rule, averaged, deferred = kernel
        pointers = {"chunks": "*i32", "table": "*i64", "rows": "*fp32", "samplings": "*fp32"}
        pointers["agings"] = "*fp32"
        counting = {"marks": "*i32", "grad_scale": "*fp32", "found_inf": "*fp32"}
        constants: dict[str, Any] = {
            "DTYPE": getattr(tl, dtype),
            "THETA_DTYPE": getattr(tl, theta),
            "KEPT_DTYPE": getattr(tl, kept_dtype),
            "AVERAGE_DTYPE": getattr(tl, average),
            "KIND": getattr(update, rule).value,
            "AVERAGED": averaged,
            "BLOCK": triton_step.CHUNK,
            "PARTS": parts,
            "clip": None,
            "schedules": None,
            "further": None,
            "FURTHER": 0,
        }
        if deferred:
            pointers.update(counting)
        else:
            constants.update(dict.fromkeys(counting))
        source = ASTSource(
            fn=update.step_kernel,
            signature={**pointers, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
        )
        warps = triton_step.WARPS[parts]
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False},
        )
        found = disassemble(compiled.asm["cubin"], tmp_path)

        def vectors(name: str) -> int:
            """Of a stream and thread."""
            return triton_step.CHUNK // (32 * warps) * getattr(torch, name).itemsize // 16

        of_average = vectors(average) * averaged
        of_param = vectors(dtype) * (theta != dtype)  # beside its master
        kept = {
            "PLAIN": [0],
            "DECOUPLED": [0, 1],
            "DIFFERENCE": [0, 1, 3],
            "ADAM": [2],
            "AMSGRAD": [2, 3],
            "SCHEDULE_FREE": [2],
        }[rule]
        own = vectors(theta) + of_param + of_average
        both = [n * vectors(kept_dtype) + own for n in kept]
        loads = sum(both) + len(kept) * vectors(dtype)
        stores = sum(both) + len(kept) * vectors(dtype) * deferred
        if averaged:  # a segment without a gradient
            alone = vectors(theta) + of_param + of_average
            loads, stores = loads + alone, stores + alone
        assert found["LDG.E.128"] == loads and found["STG.E.128"] == stores, found
        forbidden = r"(DADD|DMUL|DFMA|DSETP)\b"
        if not deferred and rule[0] not in "AS":  # the reciprocal of the loss scale divides
            forbidden += r"|FFMA|.*\.FTZ"
        # Triton 3.6 and 3.8 keep two words of some kernels of four blocks in local memory.
        assert found["STL"] + found["LDL"] <= (0 if parts == 1 else 4), found
        assert not [name for name in found if re.match(forbidden, name)], found
