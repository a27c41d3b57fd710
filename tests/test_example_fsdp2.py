"""examples/fsdp2.py as its docstring says it is run: by torchrun, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from examples.fsdp2 import Network
from studies.digits import data

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")

ROOT = Path(__file__).parents[1]


def run(world: int, epochs: int, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += ["--standalone", "examples/fsdp2.py", f"--epochs={epochs}"]
    done = subprocess.run(
        [*command, "--checkpoint", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_commands_of_the_docstring_train_and_go_on_with_more_processes(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    first = run(2, 3, folder)
    found = [re.fullmatch(r"epoch +(\d+): (.+) % right, averaged weights (.+) %", s) for s in first]
    assert [m and int(m[1]) for m in found] == [1, 2, 3]
    assert all(m and float(m[2]) > 20 and float(m[3]) > 20 for m in found[1:])  # chance is 10
    second = run(4, 4, folder)
    assert second[0] == f"{folder}: 3 epochs, gone on with on 4 processes"
    assert len(second) == 2 and second[1].startswith("epoch  4: ")

    model = Network()
    held = {"averaged": get_model_state_dict(model)}
    dcp.load(held, checkpoint_id=folder / "epoch-004")
    model.load_state_dict(held["averaged"])
    digits = data.load()
    right = (model.eval()(digits.test_images).argmax(1) == digits.test_labels).double().mean()
    assert second[1].endswith(f"averaged weights {100 * right:.1f} %")
