"""Whole training steps on a GPU, and the suite there, with the CPU in its place."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import emulated_cuda  # noqa: F401 (a fixture)
from recorded import Host, Recording, recorded_backend
from torch import nn

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from benchmarks import __main__ as suite
from benchmarks import gpu, sizes, step, training
from benchmarks.measure import graph_training, proof, runner
from benchmarks.report import pictures, training_tables
from benchmarks.rows import shapes, variants
from benchmarks.rows.decoder import BYTES
from benchmarks.rows.maths import Maths
from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Provider
from benchmarks.rows.providers import (
    ADAMW_BASELINE,
    BASELINE,
    CAPTURED,
    ON_GPU,
    TRAINED_ADAMW,
    gpu_rows,
    named,
)
from rbwa_fused.engine import backends, doors

WAITS = "called a synchronizing operation"
NO_GRAPH = {  # and why
    "torch SGD foreach": WAITS,  # for the tensor lr
    "fused + AveragedModel (mean)": WAITS,
    "fused + AveragedModel (EMA)": WAITS,
    "RBWA: fused + mean + copy back": WAITS,
    "SGD + momentum, in_backward": "capturable=True does not go with in_backward=True",
    "EMA, in_backward": "capturable=True does not go with in_backward=True",
}
NO_GRAPH_ADAMW = {
    "torch AdamW foreach": "If capturable=True, params and state_steps must be on supported "
    "devices: ['cuda', 'xpu', 'hpu', 'privateuseone'].",  # the CPU is none
    "AdamW fused + AveragedModel (EMA)": WAITS,
    "AdamW fused + clip + AveragedModel": WAITS,
    "AdamW + EMA, in_backward": "capturable=True does not go with in_backward=True",
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
    choose = backends.choose

    def pick(name: str, where: torch.device) -> doors.Backend:
        return kernels if name in ("auto", "cuda") else choose(name, where)

    monkeypatch.setattr(backends, "choose", pick)
    monkeypatch.setattr(training, "torchvision_model", tiny)
    monkeypatch.setattr(training, "Cuda", lambda: device)
    monkeypatch.setattr(variants, "launch_form", emulated_cuda.launch_form)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # torch's Adam asks the device, in each step, whether a graph captures it.
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
    monkeypatch.setattr(runner, "of_device", lambda device: 100.0)
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
    text = training_tables.report(args, [found], {BASELINE: 5.0})
    assert "CUDA graph" in text and "1 process of 3 rounds; range: quartiles" in text
    for name, why in NO_GRAPH.items():
        assert f"skipped: {name} ({why})" in text


def test_a_replay_trains_as_the_eager_step_does(recording: Recording) -> None:
    args = arguments("--graph")
    batch = training.batch_of(args, recording.device)
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
    batch = training.batch_of(args, recording.device)
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
    batch = training.batch_of(args, recording.device)
    problem = Problem(training.network(args, recording.device), ([], []), tensor_lr=True)
    (row,) = named(["SGD + momentum"], CAPTURED)
    with pytest.raises(proof.WrongError, match=why):
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
    batch = training.batch_of(args, device.device)
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
    found = training_tables.figures([{BASELINE: base, "EMA": own}], "EMA")
    assert found["overhead"] == pytest.approx(3.0)
    assert found["overheads"] == pytest.approx((1.5, 6.5))
    one = training_tables.figures([{BASELINE: base[:1], "EMA": own[:1]}], "EMA")
    assert one["overheads"] == pytest.approx((1.0, 1.0))


# ---- the suite ---------------------------------------------------------------------------------


def small_decoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(BYTES, 8), nn.Linear(8, BYTES)).to(dtype)


@pytest.fixture
def small_suite(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """The suite on small models, in this process."""
    monkeypatch.setattr(sizes, "Cuda", lambda: recording)
    for module in (suite, training):
        monkeypatch.setattr(module, "fresh", lambda function, *given: function(*given))
    monkeypatch.setattr(suite, "GPU_BATCH_SIZES", (4, 6))
    monkeypatch.setattr(training, "decoder", small_decoder)
    monkeypatch.setattr(suite, "ROUNDS", 10)
    monkeypatch.setattr(sizes, "ROUNDS", 10)
    monkeypatch.setattr(suite, "SECONDS", 0.0)
    monkeypatch.setattr(step, "gpu_plan", lambda args: plan_of(recording))
    monkeypatch.setattr(sizes, "COUNTS", (620, 6200))
    return recording


def plan_of(device: Host) -> gpu.Plan:
    rows = [row for row in gpu_rows(("cuda",), device) if row.available()]
    chosen = [row for row in rows if row.name.startswith(("torch SGD fused", "EMA, cuda"))]
    return gpu.Plan(device, {"tiny": TINY}, torch.float32, chosen, 10)


def test_the_suite_on_a_gpu_writes_every_part_and_draws_its_pictures(
    small_suite: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert suite.main(["--out", str(out)]) == 0, json.loads(out.read_text())["not measured"]
    written = json.loads(out.read_text())
    assert {"machine", "settings", "problems", "copy GB/s", "sizes", "training"} <= written.keys()
    assert list(written["sizes"]) == ["620", "6200"]
    for rows in written["sizes"].values():
        assert list(rows) == list(sizes.ROWS)
        assert all(row["ms"] > 0 and row["host ms"] > 0 for row in rows.values())
    with_sgd = [run for run in written["training"] if run["baseline"] == BASELINE]
    with_adamw = written["training"][len(with_sgd) :]
    assert [(run["how"], run["batch size"]) for run in with_sgd] == [
        (f"{precision}{graph}", size)
        for precision in ("float32", "float32, bfloat16 autocast, channels_last")
        for size in (4, 6)
        for graph in ("", ", CUDA graph")
    ]
    for run in with_sgd:
        skipped = NO_GRAPH if run["how"].endswith("graph") else {}
        assert run["skipped"] == skipped
        assert list(run["rows"]) == [row.name for row in ON_GPU if row.name not in skipped]
    assert [(run["model"], run["how"]) for run in with_adamw] == [
        (model, f"float32{graph}")
        for model in ("resnet18", "transformer")
        for graph in ("", ", CUDA graph")
    ]
    for run in with_adamw:
        skipped = NO_GRAPH_ADAMW if run["how"].endswith("graph") else {}
        assert run["skipped"] == skipped and run["baseline"] == ADAMW_BASELINE
        assert list(run["rows"]) == [row.name for row in TRAINED_ADAMW if row.name not in skipped]
    printed = capsys.readouterr().out
    assert printed.count(f"| {BASELINE} ") == 1 + 8
    for what in ("step", "bandwidth", "sizes", "training", "adamw"):
        assert (tmp_path / f"gpu-{what}.png").read_bytes().startswith(b"\x89PNG")
    steps = pictures.steps_of(written)
    assert steps is not None and list(steps.times) == list(written["problems"][0]["rows"])
    assert pictures.kind_of("torch SGD fused, graph") == "baseline"
    panels = [axes.get_title() for axes in pictures.training(written, with_sgd).axes]
    assert panels == list(dict.fromkeys(f"resnet18, {run['how']}" for run in with_sgd))


def test_a_part_that_fails_is_named_and_leaves_the_others(
    small_suite: Recording,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "gpu.json"

    def failing(function: Any, *given: Any) -> Any:
        if function is not sizes.on_gpu:  # whoever ends the run now finds what has failed
            assert "sizes" in json.loads(out.read_text())["not measured"]
        if function is sizes.on_gpu or given[0].graph:
            raise RuntimeError("CUDA error: an illegal memory access\nand a stack")
        return function(*given)

    for module in (suite, training):
        monkeypatch.setattr(module, "fresh", failing)
    assert suite.main(["--out", str(out)]) == 1
    written = json.loads(out.read_text())
    assert len(written["training"]) == 6 and len(written["not measured"]) == 7
    assert set(written["not measured"].values()) == {"CUDA error: an illegal memory access"}
    assert "not measured: sizes (CUDA error" in capsys.readouterr().out
    assert not (tmp_path / "gpu-sizes.png").exists()
    assert (tmp_path / "gpu-training.png").exists()


def test_no_run_is_begun_that_would_not_end_in_time(
    small_suite: Recording, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(suite, "BUDGET", 0.0)
    out = tmp_path / "gpu.json"
    assert suite.main(["--out", str(out)]) == 1
    written = json.loads(out.read_text())
    assert not written["training"] and len(written["not measured"]) == 12
    assert set(written["not measured"].values()) == {"0 s would not have been enough"}
    assert not (tmp_path / "gpu-training.png").exists() and (tmp_path / "gpu-sizes.png").exists()


def test_all_batch_sizes_and_precisions_are_measured_with_full() -> None:
    lines = suite.gpu_runs(full=True)
    sizes_found = {line[line.index("--batch-size") + 1] for line in lines}
    assert sizes_found == {"32", "128", "512", "1024"} and len(lines) == 28
    flags = ("--amp", "--channels-last", "--graph")
    assert len({tuple(flag in line for flag in flags) for line in lines}) == 6
    assert len(suite.gpu_runs(full=False)) == 12


def test_the_suite_goes_to_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps: list[Any] = []
    parts: list[str] = []

    def main(plan: gpu.Plan, out: Path) -> int:
        steps.append((plan.device, out))
        out.write_text("{}")
        return 1

    device = Host()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(step, "gpu_plan", lambda args: plan_of(device))
    monkeypatch.setattr(step, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "main", main)
    monkeypatch.setattr(suite, "in_parts", lambda given, *_: parts.extend(p.name for p in given))
    assert suite.main(["--full", "--no-pictures"]) == 1  # as a row of ours was wrong
    ((where, out),) = steps
    assert where is device and len(parts) == 1 + 28
    assert json.loads(out.read_text())["seconds"] >= 0.0  # whatever has failed, the rest is written
    assert out.parent == tmp_path and out.name.startswith("none-") and out.suffix == ".json"
