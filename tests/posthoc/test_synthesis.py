"""Averages made after training, against those that the equation says; what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import walks
from started import environment
from torch import Tensor

import rbwa_fused as rf
from rbwa_fused.posthoc import Snapshots, sweep, synthesize
from rbwa_fused.posthoc.folder import snapshots_in
from rbwa_fused.posthoc.members import members_of
from rbwa_fused.posthoc.synthesis import planned
from rbwa_fused.posthoc.tensors import Reader

safetensors = pytest.importorskip("safetensors.torch")

Path_ = list[dict[str, Tensor]]


def run(folder: Path, last: int = walks.STEPS, every: int = 20, **options: Any) -> Path_:
    """A walk of the pair of averages with snapshots; the weights behind each step."""
    model, path = walks.Small(), []

    def look(step: int) -> None:
        path.append({n: p.detach().clone() for n, p in model.named_parameters()})

    start = options.pop("start", 0)
    taken = options.pop("taken", 1)
    owners = walks.averagers(model, start=start, every=taken)
    walks.walked(model, owners, Snapshots(folder, every=every, **options), last=last, behind=look)
    return path


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path_]:
    folder = tmp_path_factory.mktemp("walked")
    return folder, run(folder)


def off(made: Any, true: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    """The error relative to the average's distance from the weights."""
    return walks.distance(made, true) / walks.distance(true, weights)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.075, 0.09, 0.10])
def test_between_the_two_kept_it_is_within_two_percent_of_the_true_average(
    sigma_rel: float, walked: tuple[Path, Path_]
) -> None:
    folder, path = walked
    made = synthesize(folder, sigma_rel=sigma_rel)
    true = walks.literal(path, sigma_rel, walks.STEPS)
    assert off(made.state_dict, true, path[-1]) < 0.02
    assert made.residual < 0.02 and made.realised == pytest.approx(sigma_rel, rel=5e-3)
    assert {n: (t.dtype, t.shape) for n, t in (made.state_dict or {}).items()} == {
        n: (torch.float32, t.shape) for n, t in path[-1].items()
    }


def test_an_earlier_step_leaves_later_snapshots_out(walked: tuple[Path, Path_]) -> None:
    folder, path = walked
    made = synthesize(folder, sigma_rel=0.075, step=100)
    assert made.step == 100 and max(profile.t for profile in made.profiles) == 100
    true = walks.literal(path, 0.075, 100)
    assert off(made.state_dict, true, path[99]) < 0.04  # of five snapshots
    assert made.residual == pytest.approx(0.0262, abs=1e-4)


def test_a_late_start_and_rare_samples_are_counted_in_the_profile(tmp_path: Path) -> None:
    path = run(tmp_path, last=420, every=40, start=20, taken=4)
    assert {s.about.origin for s in snapshots_in(tmp_path)} == {20}
    made = synthesize(tmp_path, sigma_rel=0.075)
    assert made.step == 400 and made.profiles[-1].t == 380
    true = walks.literal(path, 0.075, 400, start=20, every=4)
    assert off(made.state_dict, true, path[399]) < 0.02


def test_a_kept_length_is_its_snapshot(walked: tuple[Path, Path_]) -> None:
    folder, path = walked
    made = synthesize(folder, gamma=rf.power_ema(0.1).weight.gamma)  # type: ignore[union-attr]
    assert off(made.state_dict, walks.literal(path, 0.1, walks.STEPS), path[-1]) < 1e-5
    assert made.sigma_rel == pytest.approx(0.1) and made.residual < 1e-6


def test_a_mean_and_one_power_span_what_lies_between(tmp_path: Path) -> None:
    model, path = walks.Small(), []
    owners = [rf.Averager(model, average) for average in (rf.mean(), rf.power_ema(0.1))]
    for step in range(1, 201):
        walks.walk(model, step)
        path.append({n: p.detach().clone() for n, p in model.named_parameters()})
        for owner in owners:
            owner.update()
        if step == 1:
            snapshots = Snapshots(tmp_path, every=10)
        snapshots.update(owners, model)
    made = synthesize(tmp_path, sigma_rel=0.2)
    assert made.residual < 0.05
    assert off(made.state_dict, walks.literal(path, 0.2, 200), path[-1]) < 0.02


def test_a_step_between_two_snapshots_is_refused_with_both_named(
    walked: tuple[Path, Path_],
) -> None:
    for step, said in ((110, "100 or 120"), (7, "such as 20:"), (300, "such as 200:")):
        with pytest.raises(ValueError, match=rf"Invalid step: {step} .*{said}"):
            synthesize(walked[0], sigma_rel=0.05, step=step)


def test_what_the_snapshots_do_not_span_is_refused_unless_asked_for(
    walked: tuple[Path, Path_], tmp_path: Path
) -> None:
    folder, _ = walked
    out = tmp_path / "made.safetensors"
    with pytest.raises(ValueError, match=r"0.25 has a residual of 0.14 \(expected at most most="):
        synthesize(folder, sigma_rel=0.25, out=out)
    assert not out.exists()
    assert synthesize(folder, sigma_rel=0.25, out=out, most=0.2).files == (out,)
    with pytest.raises(ValueError, match=r"0.01 has a residual of"):
        sweep(folder, [0.075, 0.01], tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 0.3, float("nan")])
def test_a_length_out_of_range_is_named(sigma_rel: float, walked: tuple[Path, Path_]) -> None:
    with pytest.raises(ValueError, match="Invalid sigma_rel"):
        synthesize(walked[0], sigma_rel=sigma_rel)


def test_one_length_must_be_given(walked: tuple[Path, Path_]) -> None:
    with pytest.raises(TypeError, match="expected one of the two"):
        synthesize(walked[0])
    with pytest.raises(TypeError, match="expected one of the two"):
        synthesize(walked[0], sigma_rel=0.1, gamma=5.0)


def test_the_file_is_what_the_memory_would_get(walked: tuple[Path, Path_], tmp_path: Path) -> None:
    made = synthesize(walked[0], sigma_rel=0.075).state_dict
    assert made is not None
    out = tmp_path / "made.safetensors"
    synthesize(walked[0], sigma_rel=0.075, out=out)
    read = safetensors.load_file(out)
    assert read.keys() == made.keys() and all(read[n].equal(made[n]) for n in read)
    assert float(Reader(out).metadata["residual"]) == pytest.approx(0.0084, abs=1e-4)


def test_a_sweep_reads_each_snapshot_once_and_makes_the_same(
    walked: tuple[Path, Path_], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = walked
    read: list[tuple[Path, str]] = []
    real = Reader.read

    def counted(self: Reader, name: str, *where: int) -> Tensor:
        read.append((self.file, name))
        return real(self, name, *where)

    monkeypatch.setattr(Reader, "read", counted)
    made = sweep(folder, [0.05, 0.075, 0.15], tmp_path / "out")
    assert len(read) == len(set(read)) > 0
    assert [m.sigma_rel for m in made] == [0.05, 0.075, 0.15]
    for m in made:
        alone = synthesize(folder, sigma_rel=m.sigma_rel).state_dict
        together = safetensors.load_file(m.files[0])
        assert alone is not None and all(alone[n].equal(together[n]) for n in together)


# ---- folders that do not belong together ---------------------------------------------------------


def test_averages_that_start_at_different_steps_are_refused(
    walked: tuple[Path, Path_], tmp_path: Path
) -> None:
    run(tmp_path, last=65, every=13, start=10)
    mixed(walked[0], tmp_path)
    with pytest.raises(ValueError, match="is of averages that start at another step than"):
        synthesize(tmp_path, sigma_rel=0.075)


def test_snapshots_of_two_runs_are_refused(walked: tuple[Path, Path_], tmp_path: Path) -> None:
    run(tmp_path, last=65, every=13)
    mixed(walked[0], tmp_path)
    with pytest.raises(ValueError, match="is of another run than"):
        synthesize(tmp_path, sigma_rel=0.075)


def mixed(folder: Path, into: Path) -> None:
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": '"0"'}, "is of another model than"),
        ({"world": "2"}, "is of another number of shards than"),
    ],
)
def test_snapshots_of_another_model_or_shard_count_are_refused(
    changed: dict[str, str], said: str, tmp_path: Path
) -> None:
    run(tmp_path, last=40)
    file = snapshots_in(tmp_path)[0].reader.file
    metadata = {**Reader(file).metadata, **changed}
    tensors = safetensors.load_file(file)
    safetensors.save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=said):
        synthesize(tmp_path, sigma_rel=0.075)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    run(tmp_path, last=60)
    file = snapshots_in(tmp_path)[2].reader.file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} \(expected a whole safetensors file"):
        synthesize(tmp_path, sigma_rel=0.075)


def test_a_folder_without_snapshots_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no snapshots of averages with a profile"):
        synthesize(tmp_path, sigma_rel=0.075)
    with pytest.raises(FileNotFoundError):
        synthesize(tmp_path / "none", sigma_rel=0.075)


def test_keeping_fewer_says_what_it_costs(walked: tuple[Path, Path_]) -> None:
    said = [
        planned(members_of(walked[0], keep=5), sigma_rel=sigma_rel).residual
        for sigma_rel in (0.075, 0.15)
    ]
    assert said == [pytest.approx(0.0084, abs=5e-5), pytest.approx(0.0351, abs=5e-5)]


# ---- 16 bits -------------------------------------------------------------------------------------


def settled(folder: Path, dtype: torch.dtype, size: float) -> tuple[dict[str, Tensor], Any]:
    """A walk of steps of that size around weights of norm 1 an element; its true average."""
    model, path = torch.nn.Linear(200, 100, bias=False), []
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.weight, generator=generator)
    owners, snapshots = walks.averagers(model), Snapshots(folder, every=20, dtype=dtype)
    for _ in range(200):
        with torch.no_grad():
            model.weight.add_(size * torch.randn(100, 200, generator=generator))
        path.append({"weight": model.weight.detach().clone()})
        for owner in owners:
            owner.update()
        snapshots.update(owners, model)
    return walks.literal(path, 0.075, 200), path[-1]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_what_rounding_costs_is_said_within_ten_percent(
    dtype: torch.dtype, size: float, tmp_path: Path
) -> None:
    true, weights = settled(tmp_path / "16", dtype, size)
    settled(tmp_path / "32", torch.float32, size)
    narrow = synthesize(tmp_path / "16", sigma_rel=0.075, most=10.0)
    wide = synthesize(tmp_path / "32", sigma_rel=0.075)
    assert narrow.state_dict is not None and wide.state_dict is not None
    assert narrow.state_dict["weight"].dtype == torch.float32  # not rounded once more
    measured = off(narrow.state_dict, wide.state_dict, weights)
    assert narrow.rounding == pytest.approx(measured, rel=0.1)
    assert wide.rounding == 0.0
    assert off(wide.state_dict, true, weights) < 0.02


def test_16_bit_snapshots_of_settled_weights_are_refused(tmp_path: Path) -> None:
    settled(tmp_path, torch.bfloat16, 1e-5)
    with pytest.raises(ValueError, match=r"0.075 has a rounding error of"):
        synthesize(tmp_path, sigma_rel=0.075)


# ---- memory --------------------------------------------------------------------------------------

LARGE = """
import resource, sys
from rbwa_fused.posthoc import sweep
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for made in sweep(sys.argv[1], [0.05, 0.075], sys.argv[2]):
    print(made.files[0])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for its memory")
def test_a_model_larger_than_the_memory_allowed_is_made(tmp_path: Path) -> None:
    """Six snapshots of 64 MB each, with 60 MB more than what importing took."""
    model = torch.nn.ParameterDict({f"p{i}": torch.zeros(1 << 22) for i in range(4)})
    owners = walks.averagers(model)
    snapshots = Snapshots(tmp_path / "in", every=1)
    for step in range(1, 4):
        with torch.no_grad():
            for p in model.values():
                p.fill_(step)
        for owner in owners:
            owner.update()
        snapshots.update(owners, model)
    command = [sys.executable, "-c", LARGE, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, str(60 << 20)],
        capture_output=True,
        text=True,
        env={**environment(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    first, _ = done.stdout.splitlines()
    reader = Reader(Path(first))
    assert reader.kinds["p3"].elements * 4 * 4 > 60 << 20
    average = owners[0].averages()["p3"]
    assert reader.read("p3", 12345, 3).tolist() == pytest.approx(average[:3].tolist(), rel=1e-6)
