"""Each example, copied alone into an empty folder, does what its docstring says.

Those of several processes also go on where they were killed, to the same bits, and on more
processes.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import bits
from torch.distributed.checkpoint.state_dict import get_model_state_dict

pytest.importorskip("rbwa_fused._C")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples"
NO_EXAMPLES = {"__init__", "compare", "papers", "train"}  # commands that moved
PATIENCE = 120  # seconds
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PET_STANDALONE": "1",  # torchrun's --standalone: a port of its own
}
NEEDS = {
    "accelerate_loop": "accelerate",
    "lightning_callback": "pytorch_lightning",
    "transformers_trainer": "transformers",
}


def commands(name: str) -> list[str]:
    """The command lines of an example's docstring."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return re.findall(r"^    ((?:python|torchrun) .*)$", docstring, re.MULTILINE)


EXAMPLES = sorted({file.stem for file in FOLDER.glob("*.py")} - NO_EXAMPLES)
TORCHRUN = [name for name in EXAMPLES if commands(name)[0].startswith("torchrun")]


def started(command: str, folder: Path) -> subprocess.Popen[str]:
    """A command line as a shell would take it, with this Python."""
    words = command.split("#")[0].split()
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    return subprocess.Popen(
        [sys.executable, *module, *words[1:]],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> list[str]:
    """The lines that it prints."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    return output.splitlines()


Alone = Callable[[str], tuple[Path, list[list[str]]]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Runs an example's commands, one after another, where nothing else is: the folder and what
    each printed. Once for all tests."""

    @cache
    def run(name: str) -> tuple[Path, list[list[str]]]:
        pytest.importorskip(NEEDS.get(name, "sklearn"))
        folder = copied(name, tmp_path_factory.mktemp(name))
        return folder, [finished(started(command, folder)) for command in commands(name)]

    return run


def copied(name: str, folder: Path) -> Path:
    (folder / "examples").mkdir()
    shutil.copy(FOLDER / f"{name}.py", folder / "examples")
    return folder


def percent(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) %", line)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_alone_as_its_docstring_says_and_learns(name: str, alone: Alone) -> None:
    assert commands(name)
    _, printed = alone(name)
    for lines in printed:
        last = next(line for line in reversed(lines) if percent(line))
        assert all(number > 85 for number in percent(last)), lines  # chance is 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_leaves_no_files_that_it_was_not_asked_for(name: str, alone: Alone) -> None:
    folder, _ = alone(name)
    asked = {word for command in commands(name) for word in command.split()}
    assert {file.name for file in folder.iterdir()} - {"examples"} <= asked


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_imports_nothing_that_a_copy_would_lack(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            assert module.split(".")[0] not in {"examples", "studies", "benchmarks", "tests"}
            assert not (FOLDER / f"{module.split('.')[0]}.py").exists()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("package", ["sklearn", "rbwa_fused"])
def test_a_package_that_is_missing_is_one_line_that_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"))
    (line,) = str(ended.value.code).splitlines()
    assert package in line and "pip install" in line and "scikit-learn" in line


@pytest.mark.parametrize("name", TORCHRUN)
def test_it_says_how_several_processes_are_started(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
    line = f"torchrun --nproc-per-node 2 examples/{name}.py"
    assert ended.value.code == f"start it with {line}"
    assert commands(name)[0].startswith(line) and line in (ROOT / "README.md").read_text()


def test_averaged_weights_need_batchnorm_statistics_of_their_own(alone: Alone) -> None:
    """Of 360 images: whether their mean beats the training weights is chance, this is not."""
    _, ((_, stale, own),) = alone("swa_batchnorm")
    assert percent(own)[0] > percent(stale)[0]
    assert float(own.split()[-1]) < 0.5 * float(stale.split()[-1])  # the losses


def test_rbwa_is_sgd_at_its_matched_rate(alone: Alone) -> None:
    _, ((rbwa, matched, constant),) = alone("rbwa")
    losses = [float(line.split()[-1]) for line in (rbwa, matched, constant)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


def test_a_skipped_step_of_amp_is_not_averaged(alone: Alone) -> None:
    _, (lines,) = alone("amp")
    steps, averaged, skipped = map(int, re.findall(r"\d+", lines[-1]))
    assert steps == averaged + skipped and 0 < skipped < 20


EPOCH = re.compile(r"epoch +(\d+): ([\d.]+) %, averaged ([\d.]+) %")


def held(file: Path) -> list[object]:
    """The bits of a checkpoint of ddp.py."""
    saved = torch.load(file, weights_only=True)
    model, opt = saved["model"], saved["opt"]
    state = {f"{i} {k}": bits(t) for i, s in opt["state"].items() for k, t in s.items()}
    assert model and state
    weights = {name: bits(tensor) for name, tensor in model.items()}
    return [weights, state, str(opt["param_groups"]), saved["schedule"]]


def test_a_ddp_run_that_was_killed_goes_on_to_the_same_bits(alone: Alone, tmp_path: Path) -> None:
    whole, (printed,) = alone("ddp")
    (command,) = commands("ddp")
    folder = copied("ddp", tmp_path)
    process = started(command, folder)
    assert process.stdout is not None
    assert any(EPOCH.match(line) for line in process.stdout)  # reads up to the first epoch
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    epoch = torch.load(folder / "digits.pt", weights_only=True)["schedule"]["last_epoch"]
    assert epoch < len(printed)
    assert finished(started(command, folder)) == [f"going on after epoch {epoch}", *printed[epoch:]]
    assert held(folder / "digits.pt") == held(whole / "digits.pt")


def test_an_fsdp2_run_goes_on_with_more_processes_and_its_averages_load_into_a_plain_model(
    alone: Alone,
) -> None:
    folder, (two, four) = alone("fsdp2")
    epochs = [int(found[1]) for line in two if (found := EPOCH.match(line))]
    assert epochs == list(range(1, len(two) + 1))
    assert four[0] == f"going on after epoch {epochs[-1]}" and len(four) == 3

    example = runpy.run_path(str(FOLDER / "fsdp2.py"))
    model = example["network"]()
    averages = {"averaged": get_model_state_dict(model)}
    dcp.load(averages, checkpoint_id=folder / "digits" / f"epoch-{epochs[-1] + 2:03}")
    model.load_state_dict(averages["averaged"])
    digits = example["load_digits"]()
    images = torch.tensor(digits.images[1437:], dtype=torch.float32) / 16
    right = example["accuracy"](model, images, torch.tensor(digits.target[1437:]))
    assert four[-1].endswith(f"averaged {right:.1f} %")
