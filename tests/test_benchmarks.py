"""The benchmarks measure what their rows say. Nothing here is about time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("torchvision")

from benchmarks import ceiling, report, step
from benchmarks.check import Average, Maths
from benchmarks.problem import Problem, small_tensors, with_gradients
from benchmarks.provider import Provider, check
from benchmarks.providers import BASELINE, HOST_GROUP_ROWS, HOST_ROWS, ROWS, Row, named, selected
from benchmarks.timing import Times, interleaved

# Bytes of an element that a step moves, by hand: reads and writes of theta, g, m and a.
BYTES_FLOAT32 = {
    BASELINE: 20,
    "SGD, no momentum": 12,
    "SGD + momentum": 20,
    "SGD + momentum, flatten=False": 20,
    "RBWA": 20,
    "RBWA, no momentum": 12,
    "RBWA-E": 20,
    "RSGDM": 20,
    "RSGDM, explicit": 36,
    "EMA": 28,
    "EMA, flatten=False": 28,
    "EMA every 10": 20.8,
    "SWA": 28,
}
# A bfloat16 average is kept in float32, and then needs a buffer under RBWA too.
BYTES_BFLOAT16 = {"SGD + momentum": 10, "EMA": 18, "RBWA": 18, "RSGDM, explicit": 18}
STATE_FLOAT32 = {
    BASELINE: 4,
    "SGD, no momentum": 0,
    "RBWA, no momentum": 0,
    "SGD + momentum": 4,
    "RBWA": 4,
    "RSGDM": 4,
    "RSGDM, explicit": 12,
    "EMA": 8,
    "RSGDM, foreach": 12,
}


@pytest.fixture(scope="module", autouse=True)
def compiled_ceiling() -> None:
    ceiling.use(ceiling.build())


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
    checked(row.name, tiny(dtype))


@pytest.mark.parametrize("name", HOST_ROWS)
def test_every_host_row_computes_what_it_says(name: str) -> None:
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
    times = Times()
    for i in range(5):
        times.add(1.0 + i, disturbed=False)
    times.add(100.0, disturbed=True)
    assert max(times.kept) == 5.0 and times.disturbed == 1
    few = Times([(1.0, True), (2.0, False)])
    assert few.kept == [1.0, 2.0]


def test_rare_samples_are_weighted_as_they_occur() -> None:
    problem = tiny()
    providers = [checked(name, problem) for name in (BASELINE, "EMA every 10")]
    rounds: list[int] = []
    times = interleaved(providers, 20, 1, 0, lambda: rounds.append(1))
    assert len(rounds) == 20
    assert set(times) == {BASELINE, "EMA every 10"}
    assert all(entry["samples"] == 20 and entry["ms"] > 0 for entry in times.values())


def test_a_share_is_that_of_the_ceiling_with_the_same_streams() -> None:
    loops = [row.name for row in ROWS if row.kind == "ceiling"]
    ms = {**dict(zip(loops, (1.0, 2.0, 4.0), strict=True)), "EMA": 5.0, "EMA every 10": 2.2}
    moved = {**dict(zip(loops, ((12, 12), (20, 20), (28, 28)), strict=True))}
    moved |= {"EMA": (20, 28), "EMA every 10": (20, 28)}
    period = {"EMA": 1, "EMA every 10": 10}
    result = {
        "step": {name: {"ms": value} for name, value in ms.items()},
        "facts": {n: {"moved": moved[n], "period": period.get(n, 1)} for n in ms},
    }
    assert report.shares([result], "EMA") == [pytest.approx(0.8)]
    assert report.shares([result], "EMA every 10") == [pytest.approx(1.0)]


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
    assert set(process["step"]) == expected and set(process["host"]) == set(HOST_ROWS)
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
    monkeypatch.setattr("benchmarks.process.in_fresh_process", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        step.main(arguments)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_missing_torchvision_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="torchvision is needed"):
        step.main([])


def test_a_model_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.machine.free_memory", lambda: 10**9)
    with pytest.raises(SystemExit, match="choose some with --only"):
        step.check_memory("vgg16", "float32", 10)


def test_rows_of_missing_packages_are_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.providers.find_spec", lambda name: None)
    names, _ = step.available_rows(["fused*"])
    assert names == (BASELINE, "fused + AveragedModel (mean)", "fused + AveragedModel (EMA)")
    printed = capsys.readouterr().out
    assert "skipped: fused + timm ModelEmaV3 (timm is not installed)" in printed


def test_the_baseline_is_always_measured() -> None:
    assert [row.name for row in selected(["RBWA"])] == [BASELINE, "RBWA"]
