"""The benchmarks measure what their rows say. Nothing here is about time."""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_smoke
import pytest
import torch
from emulation import emulated_cuda  # noqa: F401 (a fixture)
from recorded import Host
from torch import nn

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")

import rbwa_fused as rf
from benchmarks import __main__ as suite
from benchmarks import gpu, instructions, ratios, replicas, sizes, step, training
from benchmarks.measure import bandwidth, clock, machine, process, progress, proof, runner
from benchmarks.measure.check import check
from benchmarks.measure.timing import LEAST_ROUNDS, Samples, on_device, on_host
from benchmarks.report import pictures, tables, training_tables
from benchmarks.rows import ceiling, graph, shapes, today, variants
from benchmarks.rows.maths import Average, Maths
from benchmarks.rows.problem import Problem, small_tensors, with_gradients
from benchmarks.rows.provider import Provider, Row
from benchmarks.rows.providers import (
    BASELINE,
    GPU_CAPTURED,
    GPU_OURS,
    GPU_TODAY,
    HOST_GROUP_ROWS,
    HOST_ROWS,
    IN_BACKWARD,
    ROWS,
    TRAINED,
    TRAINED_ADAMW,
    gpu_rows,
    named,
    selected,
)

# Bytes of an element that a step moves, by hand: reads and writes of theta, g, m and a.
BYTES_FLOAT32 = {
    BASELINE: 20,
    "SGD, no momentum": 12,
    "SGD + momentum": 20,
    "SGD + momentum, flatten=False": 20,
    "SGD + momentum, clipped": 24,
    "fused + clip_grad_norm_": 32,
    "RBWA": 20,
    "RBWA, no momentum": 12,
    "RBWA-E": 20,
    "RSGDM": 20,
    "RSGDM, explicit": 36,
    "EMA": 28,
    "EMA, flatten=False": 28,
    "EMA every 10": 20.8,
    "SGD + two EMAs": 36,
    "EMA + Averager (EMA)": 40,
    "SWA": 28,
}
# A bfloat16 average is kept in float32, and then needs a buffer under RBWA too.
BYTES_BFLOAT16 = {
    "SGD + momentum": 10,
    "EMA": 18,
    "SGD + two EMAs": 26,
    "RBWA": 18,
    "RSGDM, explicit": 18,
}
STATE_FLOAT32 = {
    BASELINE: 4,
    "SGD, no momentum": 0,
    "RBWA, no momentum": 0,
    "SGD + momentum": 4,
    "RBWA": 4,
    "RSGDM": 4,
    "RSGDM, explicit": 12,
    "EMA": 8,
    "SGD + two EMAs": 12,
    "EMA + Averager (EMA)": 12,
    "RSGDM, foreach": 12,
}


@pytest.fixture(scope="module", autouse=True)
def compiled_ceiling() -> None:
    ceiling.use(ceiling.build(machine.slug()))


def tiny(dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(129, 33, bias=False)
    )
    return with_gradients(model.to(dtype))


def row_named(name: str) -> Row:
    (row,) = named([name])
    return row


def built(name: str, problem: Problem) -> Provider:
    return row_named(name).build(problem, name)


def checked(name: str, problem: Problem) -> Provider:
    provider = built(name, problem)
    assert check(provider, problem) is None
    return provider


def needed(row: Row) -> None:
    if row.needs is not None:
        pytest.importorskip(row.needs)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_row_computes_what_it_says(row: Row, dtype: torch.dtype) -> None:
    needed(row)
    if row.not_in == str(dtype).removeprefix("torch."):
        pytest.skip(f"{dtype} cannot hold what it keeps")
    checked(row.name, tiny(dtype))


@pytest.mark.parametrize("name", HOST_ROWS)
def test_every_host_row_computes_what_it_says(name: str) -> None:
    needed(row_named(name))
    checked(name, small_tensors())


@pytest.mark.parametrize("name", HOST_GROUP_ROWS)
def test_every_group_steps_with_its_own_learning_rate(name: str) -> None:
    problem = small_tensors(groups=31)
    assert len(set(problem.lrs)) == 31
    checked(name, problem)


@pytest.mark.parametrize(
    "other",
    [
        Maths("plain", Average(lambda n: 1 / (n + 1))),
        Maths("rsgdm", Average(lambda n: 1 / (n + 1))),
        Maths("momentum", Average(lambda n: 1.0 if n == 0 else 0.001)),
        Maths("momentum", Average(lambda n: 1 / (n + 1), every=2)),
        Maths("momentum", Average(lambda n: 1 / (n + 1), written_back=True)),
    ],
)
def test_the_check_fails_for_other_maths(other: Maths) -> None:
    problem = tiny()
    wrong = check(replace(built("SWA", problem), maths=other), problem)
    assert wrong is not None and "SWA: " in wrong


def test_the_check_fails_for_another_learning_rate() -> None:
    problem = tiny()
    provider = built("SGD + momentum", problem)
    assert check(provider, replace(problem, lrs=(0.1001,))) is not None


def test_the_check_fails_for_a_provider_that_writes_to_the_shared_gradients() -> None:
    problem = tiny()
    provider = built(BASELINE, problem)
    provider.step = lambda: [p.grad.zero_() for p in provider.params if p.grad is not None]
    assert "writes to the gradients" in str(check(provider, problem))


@pytest.mark.parametrize(("name", "count"), BYTES_FLOAT32.items())
def test_bytes_are_counted_from_the_streams(name: str, count: float) -> None:
    assert checked(name, tiny()).bytes_per_element() == pytest.approx(count)


@pytest.mark.parametrize(("name", "count"), BYTES_BFLOAT16.items())
def test_bytes_of_16_bit_streams(name: str, count: float) -> None:
    assert checked(name, tiny(torch.bfloat16)).bytes_per_element() == count


@pytest.mark.parametrize(("name", "count"), STATE_FLOAT32.items())
def test_state_is_counted_by_its_storages(name: str, count: int) -> None:
    problem = tiny()
    assert checked(name, problem).state_bytes() == count * problem.numel


def test_a_storage_that_two_tensors_share_counts_once() -> None:
    problem = tiny()
    provider = checked(BASELINE, problem)
    whole = torch.zeros(10)
    provider.state = lambda: [whole, whole[:5]]
    assert provider.state_bytes() == 40


def test_disturbed_samples_are_dropped_unless_too_few_are_left() -> None:
    times = Samples()
    for i in range(5):
        times.add(1.0 + i, disturbed=False)
    times.add(100.0, disturbed=True)
    assert max(times.kept()) == 5.0 and times.disturbed == 1
    few = Samples([(1.0, True, False), (2.0, False, False)])
    assert few.kept() == [1.0, 2.0]


def test_rare_samples_are_weighted_as_they_occur() -> None:
    problem = tiny()
    providers = [checked(name, problem) for name in (BASELINE, "EMA every 10")]
    rounds: list[int] = []
    times = on_host(providers, 20, 1, 0, lambda: rounds.append(1))
    assert len(rounds) == 20
    assert set(times) == {BASELINE, "EMA every 10"}
    assert all(entry["samples"] == 20 and entry["ms"] > 0 for entry in times.values())


def test_a_share_is_that_of_the_ceiling_with_the_same_streams() -> None:
    loops = [row.name for row in ROWS if row.kind == "ceiling"]
    ms = {**dict(zip(loops, (1.0, 2.0, 4.0, 6.0), strict=True)), "EMA": 5.0, "EMA every 10": 2.2}
    moved = {**dict(zip(loops, ((12, 12), (20, 20), (28, 28), (36, 36)), strict=True))}
    moved |= {"EMA": (20, 28), "EMA every 10": (20, 28)}
    period = {"EMA": 1, "EMA every 10": 10}
    result = {
        "step": {name: {"ms": value} for name, value in ms.items()},
        "facts": {n: {"moved": moved[n], "period": period.get(n, 1)} for n in ms},
    }
    assert tables.shares([result], "EMA") == [pytest.approx(0.8)]
    assert tables.shares([result], "EMA every 10") == [pytest.approx(1.0)]


def test_a_run_prints_its_tables_and_writes_every_process(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "new" / "result.json"
    arguments = [
        "--model",
        "squeezenet1_1",
        "--processes",
        "1",
        "--repeats",
        "2",
        "--out",
        str(out),
    ]
    step.main([*arguments, "--only", "SGD + momentum", "--only", "plain loop: theta, g, m"])
    printed = capsys.readouterr().out
    (process,) = json.loads(out.read_text())["processes"]
    expected = {BASELINE, "SGD + momentum", "plain loop: theta, g, m"}
    assert set(process["step"]) == expected and set(process["host"]) == {
        row.name for row in named(HOST_ROWS) if row.available()
    }
    assert all(f"| {name} " in printed for name in expected)
    assert json.loads(out.read_text())["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--model", "resnet19"], "unknown model: resnet19"),
        (["--only", "Adam"], "no row matches 'Adam'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", str(Path(__file__) / "y.json")], "y.json (File exists)"),
        (["--out", str(Path(__file__).parent)], "cannot write"),
    ],
)
def test_bad_options_take_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.measure.process.fresh", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        step.main(arguments)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_the_cpu_takes_one_model() -> None:
    with pytest.raises(SystemExit, match="takes one --model, not 2"):
        step.main(["--model", "resnet18", "resnet34"])


def test_missing_torchvision_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="torchvision is needed"):
        step.main([])


def test_a_model_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.machine.free_memory", lambda: 10**9)
    with pytest.raises(SystemExit, match="choose some with --only"):
        step.check_memory("vgg16", "float32", 10)


def test_rows_of_missing_packages_are_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.rows.provider.find_spec", lambda name: None)
    names, _ = step.available_rows(["fused + *E[mM]*"], "float32")
    others = ("fused + Averager (EMA)", "fused + AveragedModel (EMA)")
    assert names == (BASELINE, *others)
    printed = capsys.readouterr().out
    assert "skipped: fused + timm ModelEmaV3 (timm is not installed)" in printed


def test_rows_whose_state_a_dtype_cannot_hold_are_skipped_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names, _ = step.available_rows(["torch AdamW fused"], "float16")
    assert names == (BASELINE,)
    printed = capsys.readouterr().out
    assert "skipped: torch AdamW fused (float16 cannot hold what it keeps)" in printed
    assert step.available_rows(["torch AdamW fused"], "bfloat16")[0][1:] == ("torch AdamW fused",)


def test_the_baseline_is_always_measured() -> None:
    assert [row.name for row in selected(["RBWA"])] == [BASELINE, "RBWA"]


# ---- on a GPU, with the CPU and its clock in its place ------------------------------------------


@pytest.fixture(autouse=True)
def known_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte is not copied in every test."""
    monkeypatch.setattr(runner, "of_device", lambda device: 100.0)


@pytest.fixture
def emulated_forms(emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """The emulated kernels, also by the launches of rows/variants.py."""
    monkeypatch.setattr(variants, "launch_form", emulated_cuda.launch_form)
    return emulated_cuda


GPU_ROWS = gpu_rows(("cuda",), Host())
GPU_NAMES = [row.name for row in GPU_ROWS]
TINY = shapes.Layout([(8, 3, 3, 3), (8,), (33, 129)], [(8,), ()])


def gpu_row(name: str) -> Row:
    (row,) = (row for row in GPU_ROWS if row.name == name)
    return row


def tiny_on(dtype: torch.dtype = torch.float32) -> Problem:
    return shapes.problem(TINY, dtype, Host.device)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_built_in_shapes_are_those_of_torchvision(name: str) -> None:
    from torchvision.models import get_model

    with torch.device("meta"):
        model = get_model(name, weights=None)
    layout = shapes.MODELS[name]()
    assert layout.parameters == [tuple(p.shape) for p in model.parameters()]
    assert layout.buffers == [tuple(b.shape) for b in model.buffers()]


def test_transformers_have_the_size_that_they_are_named_after() -> None:
    gpt2 = shapes.MODELS["gpt2"]()
    assert (gpt2.numel, len(gpt2.parameters)) == (124_439_808, 148)
    assert 1.0e9 < shapes.MODELS["transformer-1b"]().numel < 1.05e9


def test_built_in_weights_have_the_dtype_and_their_counters_are_integers() -> None:
    model = shapes.Weights(TINY, torch.bfloat16, Host.device)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [b.dtype for b in model.buffers()] == [torch.bfloat16, torch.int64]
    assert all(p.std() > 0.05 for p in model.parameters())


@pytest.mark.usefixtures("emulated_forms")
@pytest.mark.parametrize("row", GPU_ROWS, ids=GPU_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gpu_row_computes_what_it_says(row: Row, dtype: torch.dtype) -> None:
    needed(row)
    problem = tiny_on(dtype)
    assert check(row.build(problem, row.name), problem) is None


@pytest.mark.parametrize(
    ("name", "count"), [("EMA: fused + foreach lerp", 32), ("RBWA-E: fused + lerp + copy back", 40)]
)
def test_bytes_of_averages_by_hand(name: str, count: int) -> None:
    assert gpu_row(name).build(tiny_on(), name).bytes_per_element() == count


def test_the_table_has_ours_on_both_backends_and_captures_where_it_can() -> None:
    names = {row.name for row in gpu_rows(("cuda", "triton"), Host())}
    for method in GPU_OURS:
        assert {f"{method}, cuda", f"{method}, triton"} <= names
    for method in GPU_CAPTURED:
        assert f"{method}, cuda, graph" in names and f"{method}, triton, graph" not in names
    assert {f"{row.name}, graph" for row in GPU_TODAY} <= names


def test_a_variant_is_launched_in_its_form_and_the_others_as_usual(emulated_forms: Any) -> None:
    emulated_forms.small_launches(), emulated_forms.tabled_launches()
    problem = tiny_on()
    seen = {}
    for name in ("EMA, cuda, 32 KB, block table", "EMA, cuda, 32 KB", "EMA, cuda"):
        provider = gpu_row(name).build(problem, name)
        provider.prepare()
        provider.step()
        seen[name] = emulated_forms.small_launches(), emulated_forms.tabled_launches()
    assert list(seen.values()) == [(0, 1), (0, 0), (1, 0)]


def test_a_triton_variant_plans_with_its_block_and_warps() -> None:
    from rbwa_fused.triton_kernels import step as triton_step

    usual = triton_step.CHUNK, triton_step.WARPS
    for name, setting in variants.VARIANTS["triton"]:
        with setting():
            assert f"{triton_step.WARPS[1]} warps of {triton_step.CHUNK}" == name
    assert usual == (triton_step.CHUNK, triton_step.WARPS)


def test_a_step_is_captured_once_for_each_set_of_gradients_and_replayed_with_it() -> None:
    replayed: list[int] = []

    class Recording(Host):
        def capture(self, step: Any, pool: Any = None) -> Any:
            self.captures += 1
            captured = self.captures
            return lambda: replayed.append(captured)

    problem = tiny_on()
    provider = graph.captured(today.torch_sgd("fused"), Recording())(problem, "captured")
    for _ in range(7):
        provider.prepare()
        provider.step()
    assert replayed == [1, 2, 1, 2, 1]


def measured(host: Host, rows: list[Row], rounds: int = LEAST_ROUNDS) -> dict[str, Any]:
    return runner.one_by_one(host, TINY, torch.float32, rows, rounds)


def test_a_row_that_waits_is_skipped_and_the_others_are_timed() -> None:
    host = Host()
    host.waits = RuntimeError("called a synchronizing CUDA operation\nand a stack")
    rows = gpu_rows((), host)
    result = measured(host, rows)
    assert set(result["rows"]) == {row.name for row in GPU_TODAY}
    assert result["skipped"]["torch SGD fused, graph"] == "called a synchronizing CUDA operation"
    assert not result["wrong"]


def test_what_failed_first_is_the_reason() -> None:
    def ending(first: str, then: str) -> BaseException:
        try:
            try:
                raise RuntimeError(first)
            finally:
                raise ValueError(then)
        except ValueError as error:
            return error

    error = ending("operation not permitted when stream is capturing", "capture was invalidated")
    assert proof.reason(error) == "operation not permitted when stream is capturing"


def broken(problem: Problem, name: str) -> Provider:
    return replace(gpu_row(BASELINE).build(problem, name), kind="ours", maths=Maths("rsgdm"))


def test_a_wrong_row_of_ours_is_not_timed_and_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [gpu_row(BASELINE), Row("wrong", "ours", broken)]
    plan = gpu.Plan(Host(), {"tiny": TINY}, torch.float32, rows, LEAST_ROUNDS)
    out = tmp_path / "result.json"
    assert gpu.main(plan, out) == 1
    assert "WRONG: wrong, not timed" in capsys.readouterr().out
    (problem,) = json.loads(out.read_text())["problems"]
    assert problem["wrong"] == ["wrong"] and set(problem["rows"]) == {BASELINE}
    assert "parameter is off by" in problem["skipped"]["wrong"]


def test_a_wrong_baseline_stops_the_run() -> None:
    with pytest.raises(proof.WrongError):
        measured(Host(), [Row(BASELINE, "ours", broken)])


@pytest.mark.usefixtures("emulated_forms")
def test_a_gpu_run_prints_its_tables_and_writes_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host()
    rows = selected(["EMA*", "torch*"], gpu_rows(("cuda",), host))
    plan = gpu.Plan(host, {"a": TINY, "b": TINY}, torch.float32, rows, LEAST_ROUNDS)
    out = tmp_path / "result.json"
    assert gpu.main(plan, out) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [problem["model"] for problem in written["problems"]] == ["a", "b"]
    for problem in written["problems"]:
        assert list(problem["rows"]) == [row.name for row in rows]
        for name, row in problem["rows"].items():
            assert printed.count(f"| {name} ") == 2
            assert row["launches"] == 7 and row["rounds"] == LEAST_ROUNDS
            assert row["cold ms"] > 0 and row["warm ms"] > 0 and row["host ms"] > 0
        assert problem["rows"][BASELINE]["ratio"] == 1.0
    # Two models: the baseline by itself, then once more beside every other row, and that row.
    visits = 2 * (2 * len(rows) - 1)
    assert host.evictions == visits * (LEAST_ROUNDS + 1)
    assert host.spins == host.evictions + 2  # and before the empty kernels


def test_a_row_that_ends_the_process_leaves_the_rows_before_it_written(tmp_path: Path) -> None:
    def dying(problem: Problem, name: str) -> Provider:
        raise KeyboardInterrupt

    out = tmp_path / "result.json"
    rows = [gpu_row(BASELINE), gpu_row("torch SGD foreach"), Row("dies", "today", dying)]
    plan = gpu.Plan(Host(), {"tiny": TINY}, torch.float32, rows, LEAST_ROUNDS)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(plan, out)
    (problem,) = json.loads(out.read_text())["problems"]
    assert set(problem["rows"]) == {BASELINE, "torch SGD foreach"}
    assert not list(tmp_path.glob("*.part"))


def test_a_row_that_does_not_compile_or_cannot_be_profiled_leaves_the_others_measured() -> None:
    class CompilationError(Exception):
        """As Triton's, which is no RuntimeError."""

    class Unseen(Host):
        def launches(self, step: clock.Step) -> int | None:
            raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    def failing(problem: Problem, name: str) -> Provider:
        raise CompilationError("at 21:9:")

    rows = [gpu_row(BASELINE), Row("fails", "ours", failing), gpu_row("torch SGD foreach")]
    host = Unseen()
    result = runner.one_by_one(host, TINY, torch.float32, rows, LEAST_ROUNDS)
    assert set(result["rows"]) == {BASELINE, "torch SGD foreach"}
    assert result["skipped"] == {"fails": "at 21:9:"}
    runner.count_launches(host, TINY, rows, result)
    assert all(row["launches"] is None for row in result["rows"].values())


def test_a_device_that_a_row_has_broken_is_not_measured_on() -> None:
    class Breaking(Host):
        broken = False

        def synchronize(self) -> None:
            if self.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    host = Breaking()

    def breaking(problem: Problem, name: str) -> Provider:
        host.broken = True
        host.synchronize()
        raise AssertionError

    written: list[Any] = []
    rows = [gpu_row(BASELINE), Row("breaks", "ours", breaking), gpu_row("torch SGD foreach")]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.one_by_one(host, TINY, torch.float32, rows, LEAST_ROUNDS, written.append)
    assert not written  # torch's row was not tried


def test_ours_are_timed_before_the_others() -> None:
    order: list[list[str]] = []
    rows = [gpu_row(BASELINE), gpu_row("torch SGD foreach"), replace(gpu_row(BASELINE), name="own")]
    rows[2] = replace(rows[2], kind="ours")
    result = runner.one_by_one(
        Host(),
        TINY,
        torch.float32,
        rows,
        LEAST_ROUNDS,
        lambda so_far: order.append(list(so_far["rows"])),
    )
    assert order == [[BASELINE, "own"], [BASELINE, "own", "torch SGD foreach"]]
    assert list(result["rows"]) == [row.name for row in rows]  # the table's order


def test_an_empty_kernel_is_not_charged_as_bandwidth() -> None:
    class Slow(Host):
        def seconds(self, start: float, end: float) -> float:
            return 3e-6

    assert bandwidth.empty_ms(Slow()) == pytest.approx(0.003)
    provider = gpu_row(BASELINE).build(tiny_on(), BASELINE)  # 20 bytes a parameter
    times = {"cold ms": 0.5, "warm ms": 0.1, "host ms": 9.0}

    def reached(empty: float) -> Any:
        return runner.figures(times, provider, 10**8, 5000.0, empty, 0.25)["GB/s"]

    assert reached(0.1) == pytest.approx(5000.0)
    assert reached(0.5) is None


def test_every_clock_sees_every_tenth_step() -> None:
    problem = tiny_on()
    seen: dict[str, set[int]] = {}

    class Spy(Host):
        def mark(self) -> float:
            return provider.steps

        def seconds(self, start: float, end: float) -> float:
            return 1.0 if provider.steps else 0.0

    provider = replace(gpu_row(BASELINE).build(problem, "rare"), period=10)
    assert check(provider, problem) is None
    adding = Samples.add

    def add(self: Samples, seconds: float, disturbed: bool = False, sampled: bool = False) -> None:
        seen.setdefault(str(id(self)), set()).add(sampled)
        adding(self, seconds, disturbed, sampled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "add", add)
        on_device(Spy(), [provider], LEAST_ROUNDS, 0, limit=0.0)
    assert sum(kinds == {False, True} for kinds in seen.values()) == 3


def test_rounds_end_with_the_time_but_never_too_early() -> None:
    provider = gpu_row(BASELINE).build(tiny_on(), BASELINE)
    times = on_device(Host(), [provider], 1000, 0, limit=0.0)
    assert times[BASELINE]["rounds"] == LEAST_ROUNDS


def test_rare_samples_weigh_as_they_occur() -> None:
    samples = Samples()
    for seconds in (1.0, 1.0, 3.0):
        samples.add(seconds)
    samples.add(11.0, sampled=True)
    assert samples.ms(10) == pytest.approx(2000.0)
    assert Samples([(0.002, False, True)]).ms(1) == 2.0


def test_a_share_of_the_copy_follows_from_stated_bytes_and_the_cold_time() -> None:
    provider = gpu_row(BASELINE).build(tiny_on(), BASELINE)  # 20 bytes a parameter
    times = {"cold ms": 0.5, "warm ms": 0.1, "host ms": 9.0}
    row = runner.figures(times, provider, 100_000_000, 5000.0, 0.0, baseline_ms=0.25)
    assert row["GB/s"] == pytest.approx(4000.0)
    assert row["of copy"] == pytest.approx(0.8)
    assert row["ratio"] == 2.0


def test_a_copy_counts_what_it_reads_and_what_it_writes() -> None:
    class Second(Host):
        def seconds(self, start: float, end: float) -> float:
            return 1e-3

    assert bandwidth.of_device(Second(), size=10**6) == pytest.approx(2.0)


def test_launches_are_the_kernels_of_a_trace() -> None:
    events = [{"cat": kind} for kind in ("kernel", "gpu_memcpy", "kernel", "gpu_user_annotation")]
    assert clock.kernels(json.dumps({"traceEvents": [{"ph": "M"}, *events]})) == 2
    assert clock.kernels(json.dumps({"traceEvents": events[1:2]})) is None


def test_a_row_has_to_fit_beside_the_baseline() -> None:
    baseline, ema, replayed = map(gpu_row, (BASELINE, "EMA, cuda", "EMA, cuda, graph"))

    def fits(rows: list[Row], copies: float) -> bool:
        free = int(copies * 4000 / runner.USABLE) + 1
        return runner.fits(rows, torch.float32, 1000, free)

    # 3 temporary copies, 3 of the baseline, 3 of a row and 5 of a captured one.
    assert fits([baseline], 6) and not fits([baseline], 5.9)
    assert fits([baseline, ema], 9) and not fits([baseline, ema], 8.9)
    assert fits([baseline, replayed], 11) and not fits([baseline, replayed], 10.9)


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Small(Host):
        def free_bytes(self) -> int:
            return 1000

    rows = [gpu_row(BASELINE), gpu_row("torch SGD foreach")]
    result = {"model": "tiny", **measured(Small(), rows)}
    assert not result["rows"]
    printed = tables.gpu_tables({}, [result], rows)
    assert "tiny: not measured" in printed
    assert "skipped: torch SGD foreach (does not fit into 0 GB)" in printed


def test_the_gpu_table_shows_what_was_measured() -> None:
    row = {
        "cold ms": 0.0524,
        "warm ms": 0.04,
        "host ms": 0.0151,
        "rounds": 50,
        "ratio": 1.0,
        "bytes per parameter": 20.0,
        "GB/s": 4465.6,
        "of copy": 0.951,
        "launches": 1,
    }
    unknown = {**row, "bytes per parameter": None, "GB/s": None, "of copy": None, "launches": None}
    result = {
        "model": "resnet18",
        "parameters": 11_700_000,
        "tensors": 62,
        "dtype": "float32",
        "copy GB/s": 4696.0,
        "empty ms": 0.0023,
        "baseline cold ms": [0.0531, 0.0524],
        "rows": {BASELINE: row, "EMA, cuda": unknown},
        "skipped": {"apex FusedSGD": "amp_C is not installed"},
        "wrong": [],
    }
    printed = tables.gpu_tables({"gpu": "some"}, [result], GPU_ROWS)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert [BASELINE, "52.4", "40.0", "15.1", "20", "4466", "95%", "1", "1.00"] in lines
    assert ["EMA, cuda", "52.4", "40.0", "15.1", "-", "-", "-", "-", "1.00"] in lines
    assert "resnet18, 11.7M parameters in 62 tensors, float32; 50 rounds" in printed
    assert "torch SGD fused, by itself and beside each row: 52.4 to 53.1 us" in printed
    assert "an empty kernel takes 2.3 us" in printed
    assert "skipped: apex FusedSGD (amp_C is not installed)" in printed


def test_nothing_on_a_gpu_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.bar(3, "row") as silent:
        silent.update()
    assert isinstance(silent, progress.Silent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--model", "resnet19"], "unknown model: resnet19"),
        (["--device", "cuda", "--repeats", "9"], "--repeats must be at least 10 on cuda, not 9"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--backend", "triton"], "--backend is for --device cuda"),
    ],
)
def test_bad_options_of_a_gpu_take_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        step.main(arguments)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_backend_that_is_missing_is_named_and_refused_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"cuda": None, "triton": "is not there"}
    monkeypatch.setattr(
        "rbwa_fused.engine.backends.unavailable", lambda name, device: missing[name]
    )
    assert gpu.backends(None, Host.device) == ("cuda",)
    assert "skipped: rbwa_fused on triton (is not there)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="backend 'triton' is not there"):
        gpu.backends("triton", Host.device)


def test_the_smoke_test_passes_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_smoke.main(["--device", "cpu", "--backend", "cpu"]) == 0
    assert capsys.readouterr().out == "ok\n"


@pytest.mark.usefixtures("emulated_cuda")
def test_the_smoke_test_passes_on_the_emulated_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_smoke.main(["--device", "cpu", "--backend", "cuda"]) == 0
    assert capsys.readouterr().out == "ok\n"


def test_the_smoke_test_fails_where_one_element_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rf.engine.backends.CPU

    def wrong(params: list[torch.Tensor], *tables: Any) -> Any:
        function, *arguments = right.call(params, *tables)

        def step() -> None:
            function(*arguments)
            params[-1].view(-1)[-1] += 1

        return (step,)

    monkeypatch.setattr(rf.engine.backends, "CPU", right._replace(call=wrong))
    monkeypatch.setattr(gpu_smoke, "DTYPES", [torch.float32])
    assert gpu_smoke.main(["--device", "cpu", "--backend", "cpu"]) == 1
    assert "WRONG: torch.float32, sgd, none: 1 tensors differ" in capsys.readouterr().out


def test_results_name_the_gpu_and_the_versions_but_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    cuda = object.__new__(clock.Cuda)
    cuda._facts = SimpleNamespace(
        name="NVIDIA H200",
        multi_processor_count=132,
        major=9,
        minor=0,
        total_memory=150_000_000_000,
        L2_cache_size=62_914_560,
    )
    monkeypatch.setattr("subprocess.run", absent)
    facts = cuda.description()
    assert cuda.slug() == "nvidia-h200" and facts["driver"] == "unknown"
    assert facts["multiprocessors"] == 132 and facts["L2 MB"] == 62.9
    assert {"cuda", "torch", "triton", "rbwa_fused", "date"} <= facts.keys()
    assert not any("/" in str(fact) for fact in facts.values())


def test_the_rows_of_replicas_pull_to_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        replicas.MODELS, "small", lambda: shapes.Layout([(3, 4), (5,), (2, 3, 2, 2)])
    )
    for dtype, count in product(replicas.DTYPES, (2, 3, 4)):
        for provider in replicas.PROVIDERS:
            replicas.check(provider, replicas.drawn("small", getattr(torch, dtype), count))
    wrong = replace(replicas.PROVIDERS[0], pull=lambda models: rf.pull_(models, 0.4))
    with pytest.raises(ArithmeticError, match="is off by"):
        replicas.check(wrong, replicas.drawn("small", torch.float32, 3))
    assert [p.moved(3) * 4 for p in replicas.PROVIDERS] == [68, 76, 24]


# ---- a whole training step ---------------------------------------------------------------------


def sampled(step: float, whole: float = 10.0, disturbed: bool = False) -> training.Sample:
    return training.Sample(whole / 1e3, step / 1e3, disturbed)


def test_overhead_is_the_steps_difference_over_the_whole_training_step() -> None:
    base = [sampled(2.0), sampled(2.0), sampled(3.0), sampled(9.0, 99.0, disturbed=True)]
    own = [sampled(2.5), sampled(2.5, 11.0), sampled(2.5, 12.0), sampled(2.5)]
    found = training_tables.figures([{BASELINE: base, "EMA": own}], "EMA")
    assert found["step ms"] == pytest.approx(2.5)
    assert found["overhead"] == pytest.approx(5.0)
    assert found["ratio"] == pytest.approx(1.1)  # of 1.0, 1.1, 1.2: the disturbed pair is dropped
    assert found["pairs"] == 3
    low, high = found["interval"]
    assert 1.0 - 1e-9 <= low <= 1.1 <= high <= 1.2 + 1e-9
    within = training_tables.figures(
        [{BASELINE: base, "EMA, in_backward": own}], "EMA, in_backward"
    )
    assert within["step ms"] is None and within["ratio"] == pytest.approx(1.1)


def network_of(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, training.CLASSES)).to(dtype)


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ([], TRAINED),
        (["--amp", "--channels-last"], TRAINED),
        (["--optimizer", "adamw"], TRAINED_ADAMW),
        (["--optimizer", "adamw", "--model", "transformer"], TRAINED_ADAMW),
    ],
    ids=["plain", "amp", "adamw", "transformer"],
)
def test_every_row_of_a_training_step_proves_itself_and_trains(
    how: list[str], rows: tuple[Row, ...], monkeypatch: Any
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(training, "torchvision_model", network_of)
    args = training.arguments(["--processes", "1", "--repeats", "2", "--batch-size", "2", *how])
    last = rows[-1].name
    try:
        found = training.measure(args, args.rows, 0)
        peaks = {last: training.peak(args, last)}
    finally:
        torch.set_num_threads(threads)
        gc.enable()
    samples = found.samples
    assert not found.skipped and not found.wrong
    assert list(samples) == [row.name for row in rows if row.available()]
    assert all(len(own) == 2 and all(s.step > 0.0 for s in own) for own in samples.values())
    text = training_tables.report(args, [found], peaks)
    assert len([line for line in text.splitlines() if line.startswith("|")]) == len(samples) + 2
    assert f"{peaks[last]:.0f}" in text and f"against {rows[0].name}" in text
    assert ("bfloat16 autocast, channels_last" in text) == ("--amp" in how)
    assert ("2 sequences of 64 bytes" in text) == ("transformer" in how)


def test_a_row_in_backward_has_no_gradients_left_when_its_step_begins() -> None:
    problem = with_gradients(nn.Sequential(nn.Flatten(), nn.Linear(12, training.CLASSES)))
    (row,) = named(["EMA, in_backward"], TRAINED)
    provider = row.build(problem, row.name)
    seen = []
    step = provider.step
    provider.step = lambda: seen.append([p.grad for p in provider.params]) or step()
    args = training.arguments(["--batch-size", "2", "--side", "2"])
    training.train(provider, training.batch_of(args, clock.Cpu.device), args, clock.Cpu())
    assert seen == [[None, None]]


def results_of_a_suite() -> dict[str, Any]:
    """Figures that nobody measured, in the suite's form."""
    times = {row.name: 1.0 + k for k, row in enumerate(ROWS)}
    processes = [
        {
            "step": {
                name: {"ms": factor * ms, "samples": 9, "disturbed": 1}
                for name, ms in times.items()
            },
            "facts": {
                name: {"bytes per parameter": 20.0 if "foreach" not in name else None}
                for name in times
            },
            "parameters": 10**7,
        }
        for factor in (1.0, 1.5)
    ]
    overhead = {"overhead": 3.0, "overheads": (2.0, 4.0), "ratio": 1.0, "interval": (0.9, 1.1)}
    within = {**overhead, "overhead": None, "overheads": None}
    rows = {row.name: within if row.name.endswith(IN_BACKWARD) else overhead for row in TRAINED}
    sizes_found = {str(n): {name: {"ms": n / 1e6} for name in sizes.ROWS} for n in sizes.COUNTS}
    return {
        "machine": {"cpu": "a processor", "threads": 2, "torch": "2.10"},
        "step": {"model": "resnet18", "dtype": "float32", "processes": processes},
        "copy GB/s": 50.0,
        "sizes": sizes_found,
        "training": [{"model": "resnet18", "batch size": size, "rows": rows} for size in (1, 8)],
    }


def test_the_suites_pictures_show_every_row(tmp_path: Path) -> None:
    results = json.loads(json.dumps(results_of_a_suite()))
    files = pictures.draw(results, tmp_path / "machine-2026-01-01")
    assert [file.name for file in files] == [
        f"machine-2026-01-01-{what}.png" for what in ("step", "bandwidth", "sizes", "training")
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)

    steps = pictures.steps_of(results)
    assert steps is not None

    def names(figure: Any) -> list[str]:
        return [label.get_text() for label in figure.axes[0].get_yticklabels()]

    assert names(pictures.step_times(results, steps)) == [row.name for row in ROWS]  # fastest first
    moved = processes_with_bytes(results)
    assert names(pictures.bandwidth(results, steps)) == moved
    trained = [r.name for r in TRAINED if r.name != BASELINE and "in_backward" not in r.name]
    assert names(pictures.training(results, results["training"])) == trained


@pytest.mark.parametrize("file", sorted(step.RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_results_can_be_read_and_printed_again(file: Path) -> None:
    results = json.loads(file.read_text())
    told = results["step"] if "step" in results else {**results["settings"], **results}
    printed = tables.cpu_tables(results["machine"], told["model"], told["dtype"], told["processes"])
    assert results["machine"]["cpu"] in printed
    for name in told["processes"][0]["step"]:
        assert f"| {name} " in printed
    assert "step" not in results or pictures.steps_of(results) is not None


def processes_with_bytes(results: dict[str, Any]) -> list[str]:
    facts = results["step"]["processes"][0]["facts"]
    return [row.name for row in ROWS if facts[row.name]["bytes per parameter"]]


def test_step_time_by_size_is_measured_for_every_size(monkeypatch: Any) -> None:
    monkeypatch.setattr(sizes, "COUNTS", (620, 6200))
    monkeypatch.setattr(bandwidth, "HOST_BYTES", 2**16)
    threads = torch.get_num_threads()
    try:
        found = sizes.on_cpu(threads, 0)
    finally:
        torch.set_num_threads(threads)
    assert found["copy GB/s"] > 0.0
    assert list(found["sizes"]) == ["620", "6200"]
    for figures in found["sizes"].values():
        assert list(figures) == list(sizes.ROWS)
        assert all(own["ms"] > 0.0 and own["samples"] >= 8 for own in figures.values())


@pytest.mark.parametrize("failing", [None, sizes.on_cpu, runner.side_by_side])
def test_the_suite_on_the_cpu_writes_every_part_and_names_one_that_fails(
    failing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def here(function: Any, *given: Any, after_tick: Any = None) -> Any:
        if function is failing:
            raise RuntimeError("terminated abruptly\nand more")
        return function(*given)

    for module in (suite, training, process):
        monkeypatch.setattr(module, "fresh", here)
    names = (BASELINE, "EMA")
    few = step.arguments(["--processes", "1", "--repeats", "2", "--no-host"])
    monkeypatch.setattr(step, "arguments", lambda argv: few)
    monkeypatch.setattr(step, "MODEL", "squeezenet1_1")
    monkeypatch.setattr(step, "available_rows", lambda patterns, dtype: (names, None))
    monkeypatch.setattr(sizes, "COUNTS", (620, 6200))
    monkeypatch.setattr(bandwidth, "HOST_BYTES", 2**16)
    monkeypatch.setattr(training, "torchvision_model", network_of)
    lines = [[*("--processes", "1", "--repeats", "2", "--only", "EMA", "--batch-size"), "4"]]
    monkeypatch.setattr(suite, "cpu_runs", lambda full, threads: lines)
    out, threads = tmp_path / "cpu.json", torch.get_num_threads()
    try:
        status = suite.main(["--out", str(out), "--threads", str(threads)])
    finally:
        torch.set_num_threads(threads)
        gc.enable()
    written = json.loads(out.read_text())
    parts = {"step", "copy GB/s"}
    parts -= {None: set(), sizes.on_cpu: {"copy GB/s"}, runner.side_by_side: {"step"}}[failing]
    missing = {"not measured"} if failing else set()
    assert written.keys() == {"machine", "sizes", "training"} | parts | missing
    assert status == len(missing) and list(written["training"][0]["rows"]) == list(names)
    assert set(written["training"][0]["peak MB"]) == set(names)
    assert all(why == "terminated abruptly" for why in written.get("not measured", {}).values())
    said = capsys.readouterr().out
    assert ("not measured: " in said) == bool(failing)
    pictures_of = {"step": "step", "copy GB/s": "sizes"}
    assert {file.stem for file in tmp_path.glob("*.png")} >= {
        f"cpu-{what}" for what in ("training", *(pictures_of[part] for part in parts))
    }


def test_the_suite_says_what_is_not_installed(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "benchmarks.measure.needed.find_spec", lambda name: None if name == "scipy" else True
    )
    with pytest.raises(SystemExit, match="scipy not installed"):
        suite.main([])


def test_a_process_that_dies_does_not_hang_the_suite_and_one_that_lives_tells_of_progress() -> None:
    told: list[int] = []
    process.fresh(process.tick, after_tick=lambda: told.append(1))
    assert told == [1]
    assert process.fresh(int, "7") == 7
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        process.fresh(os._exit, 3)


@pytest.mark.parametrize(
    "bad",
    [
        ["--repeats", "0"],
        ["--only", "nothing of that name"],
        ["--model", "resnet19"],
        ["--optimizer", "adam"],
    ],
)
def test_training_refuses_what_it_cannot_measure(bad: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        training.arguments(bad)
    error = capsys.readouterr().err
    assert (bad[-1] in error or "at least 1" in error) and "Traceback" not in error


def test_instructions_are_read_from_a_dump(tmp_path: Path) -> None:
    dump = tmp_path / "out.1"
    dump.write_text("events: Ir\nsummary: 0\nfn=(1) step\n12 7\ntotals: 2480000\n")
    assert instructions.total(dump) == 2_480_000
    dump.write_text("events: Ir\nsummary: 0\n")
    with pytest.raises(RuntimeError, match=r"out\.1 has no total"):
        instructions.total(dump)


def test_instructions_without_valgrind_are_told_in_a_line(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["instructions"])
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="valgrind is not installed"):
        instructions.main()


def test_quotients_are_medians_over_processes_of_times_and_of_what_a_row_adds(
    tmp_path: Path,
) -> None:
    def process(**step: float) -> dict[str, Any]:
        return {"step": {name.replace("_", " "): {"ms": ms} for name, ms in step.items()}}

    measured = [process(a=3.0, b=2.0, c=5.0, d=1.0), process(a=6.0, b=2.0, c=3.0, d=1.0)]
    assert ratios.of_processes(measured, ratios.Quotient("step", ("a",), ("b",))) == [1.5, 3.0]
    added = ratios.Quotient("step", ("a", "b"), ("c", "d"))
    assert ratios.of_processes(measured, added) == [0.25, 2.0]
    assert ratios.of_processes(measured, ratios.Quotient("step", ("a",), ("e",))) == []
    file = tmp_path / "made.json"
    one = {"torch AdamW fused": {"ms": 4.0}, "AdamW": {"ms": 3.0}}
    file.write_text(json.dumps({"processes": [{"step": one, "host": {}}]}))
    first, *others = ratios.report([file]).splitlines()[2:]
    assert first.startswith("| step: AdamW, over torch AdamW fused ")
    assert first.endswith(" 0.75 (0.75-0.75) |")
    assert all(line.endswith(" - |") for line in others)


def test_quotients_are_of_rows_that_there_are() -> None:
    known = {row.name for row in ROWS}
    for _, over, under in ratios.QUOTIENTS:
        assert known.issuperset(over + under)
