"""The package as it is installed: without a compiler, as a command, and as README shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rbwa_fused as rf
from rbwa_fused.__main__ import main

ROOT = Path(rf.__file__).parent.parent

TRAIN = """
import sys
# an editable install would lend the copy under test its own compiled module
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, rbwa_fused as rf
p = torch.nn.Parameter(torch.ones(3))
opt = rf.FusedSGD([p], lr=0.5, average=rf.ema(0.5))
for _ in range(2):
    p.grad = torch.ones(3)
    opt.step()
with opt.averaged():
    print(opt.backend, p.tolist())
"""


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_without_a_compiler_it_installs_and_trains_with_one_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    build = ["build", "--build-base", str(tmp_path)]
    built = run(sys.executable, "setup.py", "-q", *build, cwd=ROOT, env=environment)
    assert built.returncode == 0, built.stderr
    assert "no C++ compiler found" in built.stdout
    lib = next(tmp_path.glob("lib*"))
    assert not list(lib.rglob("*.so"))
    trained = run(
        sys.executable, "-P", "-c", TRAIN, cwd=tmp_path, env={**environment, "PYTHONPATH": str(lib)}
    )
    assert trained.stdout.split(" ", 1) == ["reference", "[0.25, 0.25, 0.25]\n"], trained.stderr
    assert trained.stderr.count("rbwa_fused runs its slow PyTorch reference") == 1


def test_the_command_prints_what_a_bug_report_needs_and_checks_the_build() -> None:
    result = run(sys.executable, "-m", "rbwa_fused", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for word in (torch.__version__, "cpu instruction set", "check cpu            ok"):
        assert word in result.stdout
    assert re.search(
        r"^cpu kernels +built with (gcc|.*[Cc]lang) \d+\.\d+", result.stdout, re.MULTILINE
    )


def test_the_commands_help_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "checks each kernel against" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_readme_installs_in_place_and_with_a_setuptools_that_reads_pyproject() -> None:
    """Without -e README's next command would run the sources, which hold no kernels."""
    text = (ROOT / "README.md").read_text()
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert len(installs) == 1 and installs[0].endswith("pip install --no-build-isolation -e .")
    asked = re.search(r'requires = \["(setuptools[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert asked is not None and f"'{asked[1]}'" in installs[0]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_what_readme_names_for_several_processes_is_there_after_its_import() -> None:
    text = (ROOT / "README.md").read_text()
    section = text.split("## More than one process\n")[1].split("\n## ")[0]
    imports = re.findall(r"`(import [\w.]+)`", section)
    names = re.findall(r"\brf\.[\w.]*\w", section)
    assert "rf.distributed.Joined" in names
    code = "\n".join(["import rbwa_fused as rf", *imports, *names])
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_five_lines_of_the_readme_run() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    loader = [(torch.randn(3, 4), torch.randn(3, 2)) for _ in range(3)]
    evaluated = []
    names = {
        "model": model,
        "loader": loader,
        "loss_fn": nn.MSELoss(),
        "evaluate": lambda m: evaluated.append(m.weight.detach().clone()),
    }
    exec(python_blocks()[0], names)
    assert len(evaluated) == 1 and not torch.equal(evaluated[0], model.weight)


@pytest.mark.parametrize("block", [1, 2, 6], ids=["AdamW", "several averages", "schedule-free"])
def test_the_readmes_other_optimizers_train(block: int) -> None:
    model = nn.Linear(4, 2)
    a_step = "model(x).sum().backward(); opt.step()\n"
    given = python_blocks()[block]
    code = given.replace("...\n", 3 * a_step) if "...\n" in given else given + 3 * a_step
    evaluated: list[Tensor] = []
    names: dict[str, Any] = {"rf": rf, "model": model, "x": torch.ones(4)}
    names["evaluate"] = lambda m: evaluated.append(m.weight.detach().clone())
    exec(code, names)
    with names["opt"].averaged():
        evaluated.append(model.weight.detach().clone())
    assert not any(torch.equal(seen, model.weight) for seen in evaluated)


def test_the_readmes_averager_runs() -> None:
    model = nn.Linear(4, 2)
    block = python_blocks()[3].replace("...\n", "model(x).sum().backward(); opt.step()\n")
    names: dict[str, Any] = {"torch": torch, "rf": rf, "model": model, "x": torch.ones(4)}
    evaluated = []
    names["evaluate"] = lambda m: evaluated.append(m.weight.detach().clone())
    exec(block, names)
    assert len(evaluated) == 1 and torch.equal(evaluated[0], model.weight)  # its first sample


def test_the_readmes_equivalents_are_equivalent() -> None:
    """What README says is replaced, in plain PyTorch, against what replaces it."""
    blocks = python_blocks()
    assert "get_ema_multi_avg_fn(0.999)" in blocks[4] and "p.copy_(a)" in blocks[5]
    loader = [torch.randn(3, 4, generator=torch.Generator().manual_seed(s)) for s in range(6)]

    def model() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(4, 2, dtype=torch.float64)

    def train(net: nn.Module, opt: Any, after: Any = lambda step: None) -> None:
        for step, x in enumerate(loader * 4, start=1):
            opt.zero_grad()
            net(x.double()).square().mean().backward()
            opt.step()
            after(step)

    plain = model()
    ema = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    train(
        plain, torch.optim.SGD(plain.parameters(), lr=0.1), lambda _: ema.update_parameters(plain)
    )
    ours = model()
    opt = rf.FusedSGD(ours.parameters(), lr=0.1, average=rf.ema(0.999))
    train(ours, opt)
    for name, expected in ema.module.state_dict().items():
        assert torch.allclose(opt.averaged_state_dict(ours)[name], expected, rtol=0, atol=1e-12)

    plain = model()
    mean = AveragedModel(plain)

    def write_back(step: int) -> None:
        if step > 2 * len(loader):
            mean.update_parameters(plain)
            with torch.no_grad():
                for p, a in zip(plain.parameters(), mean.module.parameters(), strict=True):
                    p.copy_(a)

    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), write_back)
    ours = model()
    policy = rf.rbwa(steps_per_epoch=len(loader), start_epoch=2)
    train(ours, rf.FusedSGD(ours.parameters(), lr=0.1, average=policy))
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)
