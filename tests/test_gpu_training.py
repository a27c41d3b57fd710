"""Whole training steps on a GPU, with the CPU in its place."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulation import emulated_cuda  # noqa: F401 (a fixture)
from recorded import Host, Recording, recorded_backend
from torch import nn

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from benchmarks import (
    gpu_measure,
    graph_training,
    shapes,
    training,
    training_report,
)
from benchmarks.check import Maths
from benchmarks.problem import Problem
from benchmarks.provider import Provider
from benchmarks.providers import BASELINE, CAPTURED, ON_GPU, named
from rbwa_fused import ops

WAITS = "called a synchronizing operation"
NO_GRAPH = {  # and why
    "torch SGD foreach": WAITS,  # for the tensor lr
    "fused + AveragedModel (mean)": WAITS,
    "fused + AveragedModel (EMA)": WAITS,
    "RBWA: fused + mean + copy back": WAITS,
    "SGD + momentum, in_backward": "capturable=True does not go with in_backward=True",
    "EMA, in_backward": "capturable=True does not go with in_backward=True",
}
TINY = shapes.Layout([(8, 3, 3, 3), (8,), (33, 129)], [(8,), ()])


def tiny(name: str = "tiny", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, training.CLASSES)).to(dtype)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, emulated_cuda: Any) -> Iterator[Recording]:  # noqa: F811
    """A GPU that is the CPU; ours run on the emulated kernels."""
    kernels, device, threads = recorded_backend(), Recording(), torch.get_num_threads()
    choose = ops.choose

    def pick(name: str, where: torch.device) -> ops.Backend:
        return kernels if name in ("auto", "cuda") else choose(name, where)

    monkeypatch.setattr(ops, "choose", pick)
    monkeypatch.setattr(training, "torchvision_model", tiny)
    monkeypatch.setattr(training, "Cuda", lambda: device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_measure, "copy_bandwidth", lambda device: 100.0)
    yield device
    torch.set_num_threads(threads)
    gc.enable()


def arguments(*more: str) -> Any:
    return training.arguments(
        ["--device", "cuda", "--batch-size", "4", "--repeats", "3", "--processes", "1", *more]
    )


@pytest.mark.parametrize("how", [[], ["--amp", "--channels-last"]], ids=["plain", "amp"])
def test_whole_training_steps_are_captured_proved_and_timed(
    how: list[str], recording: Recording
) -> None:
    args = arguments("--graph", *how)
    found = training.measure(args, args.rows, 0)
    assert found.skipped == NO_GRAPH and not found.wrong
    assert list(found.samples) == [row.name for row in CAPTURED if row.name not in NO_GRAPH]
    for own in found.samples.values():
        assert len(own) == 3 and all(s.step > 0.0 and s.whole > 0.0 for s in own)
    assert recording.captures == 3 * len(found.samples)  # whole, passes and step
    assert set(recording.pools) == {"a pool"}  # or every row's activations would stay
    assert recording.sides == len(found.samples) + list(NO_GRAPH.values()).count(WAITS)
    text = training_report.report(args, [found], {BASELINE: 5.0})
    assert "CUDA graph" in text and "1 process of 3 rounds; range: quartiles" in text
    for name, why in NO_GRAPH.items():
        assert f"skipped: {name} ({why})" in text


def test_a_replay_trains_as_the_eager_step_does(recording: Recording) -> None:
    args = arguments("--graph")
    batch = training.images(args, recording.device)
    problem = Problem(training.network(args, recording.device), ([], []), tensor_lr=True)

    def run(provider: Provider) -> None:
        training.passes(provider, batch, args)

    for row in named(["SGD + momentum", "EMA", "RBWA", "RSGDM"], CAPTURED):
        graphs = graph_training.proven(row, problem, run, recording, None)
        eager = row.build(problem, row.name)
        steps = graph_training.WARMING + 1 + 2 * graph_training.REPLAYS + 1  # the last by `astray`
        for _ in range(steps + 2):
            run(eager)
            eager.step()
        graphs.whole()
        graphs.passes()
        graphs.step()
        for captured, plain in zip(graphs.provider.params, eager.params, strict=True):
            torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-6)


def test_a_schedule_reaches_a_replay(recording: Recording) -> None:
    args = arguments("--graph")
    batch = training.images(args, recording.device)
    problem = Problem(training.network(args, recording.device), ([], []), tensor_lr=True)
    lrs: list[Any] = []
    groups = Problem.groups

    def spied(self: Problem, model: nn.Module) -> Any:
        made = groups(self, model)
        lrs.append(made[0]["lr"])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "groups", spied)
        for row in named([BASELINE, "RBWA"], CAPTURED):
            graphs = graph_training.proven(
                row, problem, lambda p: training.passes(p, batch, args), recording, None
            )
            for lr in (0.0, 0.1):
                lrs[-1].fill_(lr)
                before = [p.detach().clone() for p in graphs.provider.params]
                graphs.step()
                pairs = zip(graphs.provider.params, before, strict=True)
                assert any(not torch.equal(p, b) for p, b in pairs) == (lr > 0.0)


class Deaf(Recording):
    """A graph that captured nothing, as work on another stream would be."""

    def capture(self, step: Any, pool: Any = None) -> Any:
        super().capture(step, pool)
        return lambda: None


class Stale(Recording):
    """Forward and backward by themselves, the second graph, see the weights of its capture."""

    def capture(self, step: Any, pool: Any = None) -> Any:
        replay = super().capture(step, pool)
        if self.captures % 3 == 2:
            replay()
            return lambda: None
        return replay


@pytest.mark.parametrize(("kind", "why"), [(Deaf, "parameter is off by"), (Stale, "passes graph")])
def test_a_graph_that_does_not_train_is_wrong(
    kind: type[Recording], why: str, recording: Recording
) -> None:
    args = arguments("--graph")
    batch = training.images(args, recording.device)
    problem = Problem(training.network(args, recording.device), ([], []), tensor_lr=True)
    (row,) = named(["SGD + momentum"], CAPTURED)
    with pytest.raises(gpu_measure.WrongError, match=why):
        graph_training.proven(row, problem, lambda p: training.passes(p, batch, args), kind(), None)


def test_a_wrong_row_of_ours_under_a_graph_is_named_and_ends_with_status_1(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {row.name: row for row in CAPTURED}

    def broken(problem: Problem, name: str) -> Provider:
        return replace(right["EMA"].build(problem, name), maths=Maths("rsgdm"))

    rows = (right[BASELINE], replace(right["EMA"], build=broken))
    monkeypatch.setattr(training, "CAPTURED", rows)
    monkeypatch.setattr(training, "fresh", lambda function, *given: function(*given))
    line = ["--device", "cuda", "--graph", "--batch-size", "4", "--repeats", "2"]
    with pytest.raises(SystemExit) as ended:
        training.main([*line, "--processes", "1"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "**WRONG: EMA, not timed**" in printed and f"| {BASELINE} " in printed
    assert "| 5 |" in printed.replace("  ", "")  # the peak, of the allocator


class Stopwatch(Host):
    """A device on which time passes as a test says."""

    passed = 0.0

    def mark(self) -> float:
        return self.passed

    def spend(self, seconds: float) -> None:
        self.passed += seconds


def test_the_step_is_timed_behind_passes_and_the_whole_by_itself() -> None:
    device = Stopwatch()
    provider = named([BASELINE], ON_GPU)[0].build(Problem(tiny(), ([], [])), BASELINE)
    parts = [lambda seconds=seconds: device.spend(seconds) for seconds in (10.0, 7.0, 2.0)]
    graphs = graph_training.Graphs(provider, training.passes, *parts, [], [])
    assert graph_training.visit(graphs, device) == (10.0, 2.0) and device.spins == 1
    provider.step = lambda: device.spend(3.0)
    forward = provider.model.forward
    provider.model.forward = lambda x: (device.spend(4.0), forward(x))[1]
    args = training.arguments(["--batch-size", "4"])
    batch = training.images(args, device.device)
    timed = training.train(provider, batch, args, device)
    assert (timed.whole, timed.step) == (7.0, 3.0)


def test_parameters_without_gradients_are_no_training_step() -> None:
    with pytest.raises(RuntimeError, match="1 parameters have no gradient"):
        graph_training.gradients([nn.Parameter(torch.ones(2))])


def test_a_gpus_eager_rows_stand_beside_averages_by_hand(recording: Recording) -> None:
    args = arguments("--seconds", "0", "--repeats", "20")
    found = training.measure(args, args.rows, 0)
    assert list(found.samples) == [row.name for row in ON_GPU]
    rounds = {len(own) for own in found.samples.values()}
    assert rounds == {training.LEAST_ROUNDS} and not found.skipped
    assert training.peak(args, "EMA, in_backward") == 5.0


def test_a_graph_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.arguments(["--graph"])
    assert "--graph is for --device cuda" in capsys.readouterr().err


def test_a_single_process_has_the_quartiles_of_its_rounds() -> None:
    base = [training.Sample(0.1, 0.010, False)] * 5
    own = [training.Sample(0.1, 0.010 + k / 1e3, False) for k in (1, 2, 3, 4, 9)]
    found = training_report.figures([{BASELINE: base, "EMA": own}], "EMA")
    assert found["overhead"] == pytest.approx(3.0)
    assert found["overheads"] == pytest.approx((1.5, 6.5))
    one = training_report.figures([{BASELINE: base[:1], "EMA": own[:1]}], "EMA")
    assert one["overheads"] == pytest.approx((1.0, 1.0))
