"""examples/ddp.py by the command of its docstring: it learns, and outlives a kill bit for bit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import bits

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds
EPOCHS = "3"
LINE = re.compile(r"epoch +(\d+): weights +([\d.]+) %, loss [\d.]+; averaged +([\d.]+) %")


def start(file: Path) -> subprocess.Popen[str]:
    """The command of the docstring, with another port than other runs of it have."""
    docstring = (ROOT / "examples" / "ddp.py").read_text()
    command = next(line for line in docstring.splitlines() if "torchrun" in line).split()
    assert command == ["torchrun", "--nproc-per-node", "2", "examples/ddp.py"]
    options = ["--standalone", *command[1:], "--epochs", EPOCHS, "--checkpoint", str(file)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "torch.distributed.run", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def held(file: Path) -> list[dict[str, str | None]]:
    """The bits of the checkpoint's model, and of the optimizer's state."""
    model, optimizer, schedule = torch.load(file, weights_only=True)["parts"]
    state = {f"{i} {k}": bits(t) for i, s in optimizer["state"].items() for k, t in s.items()}
    groups = {str(i): str(group) for i, group in enumerate(optimizer["param_groups"])}
    return [{k: bits(t) for k, t in model.items()}, state, groups, {"schedule": str(schedule)}]


def test_it_learns_and_a_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    output = finish(start(whole))
    lines = LINE.findall(output)
    assert [epoch for epoch, _, _ in lines] == ["1", "2", "3"], output
    assert all(float(accuracy) > 90 for accuracy in lines[-1][1:]), output

    process = start(killed)
    assert process.stdout is not None
    for line in process.stdout:
        if LINE.match(line):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    epoch = torch.load(killed, weights_only=True)["epoch"]
    assert epoch < int(EPOCHS)
    resumed = finish(start(killed))
    assert f"going on after epoch {epoch} of" in resumed
    assert LINE.findall(resumed) == lines[epoch:]
    assert held(killed) == held(whole)
    assert all(len(part) for part in held(whole))
