"""What is run on a machine with a GPU, looked at without one: tests selected, steps captured."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import gpu_smoke
import gpu_stages
import pytest
import torch
from started import environment

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = sorted(ROOT.glob("tests/optimizer/test_catalogue*.py"))
# torch's list of devices that tests are spread over, as a machine with a GPU has it.
WITH_A_GPU = """
from torch.testing._internal import common_device_type as devices

devices.CUDATestBase.primary_device = "cuda:0"
devices.device_type_test_bases.append(devices.CUDATestBase)
"""


def test_the_catalogue_is_selected_on_a_gpu(tmp_path: Path) -> None:
    """By the command of the stage of tests, on a machine that has one."""
    pytest.importorskip("expecttest")
    (tmp_path / "with_a_gpu.py").write_text(WITH_A_GPU)
    collect = ["-q", "--collect-only", "-p", "with_a_gpu", "-m", "gpu", "-p", "no:cacheprovider"]
    files = [part for part in gpu_stages.pytest() if part.endswith(".py") and "test_" in part]
    assert "tests/gpu/test_gpu.py" in files
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *collect, *files],
        env=environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    spread = [re.findall(r"^instantiate\((\w+),", file.read_text(), re.M) for file in CATALOGUE]
    expected = {f"{name}CUDA" for names in spread for name in names}
    selected = re.findall(r"::(\w+)::test_", done.stdout)
    assert set(selected) == expected and len(expected) >= 4
    assert len(selected) > 100


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_smoke_test_captures_steps_of_every_backend(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        replay = "its replay"

    steps: list[int] = []
    monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    smoke = gpu_smoke.Smoke(backend, torch.device("cuda"))
    assert smoke.recorded(lambda: steps.append(1)) == Graph.replay
    assert steps == [1] and smoke.graphs == 1
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    smoke.recorded(lambda: steps.append(2))()
    assert steps == [1, 2] and smoke.graphs == 1


class Failing(gpu_smoke.Smoke):
    """Checks of which one cannot be run and one is stopped."""

    ends: type[BaseException] = ValueError
    lost = False

    def checks(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "the first", lambda: None
        yield "the second", self.second
        yield "the third", lambda: self.report("the third: 2 tensors differ")

    def second(self) -> None:
        raise self.ends("at 21:9:\n  in the kernel")

    def answers(self) -> bool:
        return not self.lost


@pytest.mark.parametrize(
    ("ends", "lost", "status", "printed"),
    [
        (
            ValueError,
            False,
            1,
            [
                "WRONG: the second: ValueError: at 21:9:",
                "WRONG: the third: 2 tensors differ",
                "2 lines say WRONG, of 3 checks",
            ],
        ),
        (
            RuntimeError,
            True,
            1,
            [
                "WRONG: the second: RuntimeError: at 21:9:",
                "WRONG: the device answers no more after 1 checks",
                "2 lines say WRONG, of 1 checks",
            ],
        ),
        (KeyboardInterrupt, False, 130, ["interrupted after 1 checks, 0 lines say WRONG"]),
    ],
)
def test_a_check_that_cannot_be_run_leaves_the_verdicts_of_the_others(
    ends: type[BaseException],
    lost: bool,
    status: int,
    printed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A kernel that does not compile, an illegal address, a stage's time that is over."""
    monkeypatch.setattr(Failing, "ends", ends)
    monkeypatch.setattr(Failing, "lost", lost)
    monkeypatch.setattr(gpu_smoke, "Smoke", Failing)
    assert gpu_smoke.main([]) == status
    assert capsys.readouterr().out.splitlines() == printed
