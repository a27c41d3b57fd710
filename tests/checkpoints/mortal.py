"""Training runs of test_killed.py, one for each line of standard input, a JSON object:

    method: of METHODS
    folder: that gets the checkpoint and, at the end, the result
    count: which write of the checkpoint the run dies in, or null
    written: bytes that have reached the disk then, or null for behind the write

Imports take seconds and a run does not, so a process that has imported everything, and computed
nothing, forks one for each. It prints the run's process id, and after another line of input its
exit code: until then that id is no other process's, and may be killed.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which a first optimizer imports
from forked import fork_lives
from rules import RULES
from runs import Method, Model, groups, result, train

import rbwa_fused as rf

STEPS = 40
# The rules that count steps, in a parameter's state or in a group, which a checkpoint can lose.
METHODS: dict[str, tuple[Method, torch.dtype]] = {
    "adam": (Method(RULES["adam"]), torch.float32),
    "adamw ema": (Method(RULES["adamw narrow"], rf.ema(0.8)), torch.float32),
    "adamw amsgrad rbwa": (Method(RULES["adamw amsgrad"], rf.rbwa(5, 1)), torch.float32),
    "adamw masters": (Method(RULES["master adamw"], rf.ema(0.8)), torch.bfloat16),
    "free sgd": (Method(RULES["free sgd"]), torch.float32),
    "free adamw ema": (Method(RULES["free adamw"], rf.ema(0.8)), torch.float32),
    "free adamw masters": (Method(RULES["master free adamw"]), torch.bfloat16),
}


def write(file: Path, content: bytes, count: list[int], written: int | None) -> None:
    """Replaces a file; the process dies in the write that `count` comes to 0 in."""
    count[0] -= 1
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as out:
        dies = count[0] == 0
        out.write(content[:written] if dies and written is not None else content)
    if dies and written is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(temporary, file)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


def live(method: str, folder: str, count: int | None, written: int | None) -> None:
    """Trains from the checkpoint, if there is one, to the end. Every other checkpoint of a rule
    with modes is one of eval mode."""
    torch.set_num_threads(1)
    made, dtype = METHODS[method]
    model = Model(dtype)
    opt, taken = made(groups(model)), 0
    checkpoint = Path(folder) / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        taken = saved["taken"]
        if made.rule.modes:
            opt.train()
    counter = [-1 if count is None else count]
    for step in range(taken + 1, STEPS + 1):
        train(model, opt, step, step)
        evaluates = made.rule.modes and step % 2 == 0
        if evaluates:
            opt.eval()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "taken": step}, file)
        write(checkpoint, file.getvalue(), counter, written)
        if evaluates:
            opt.train()
    write(Path(folder) / "result", pickle.dumps(seen(opt)), [-1], None)


def seen(opt: Any) -> dict[str, Any]:
    """Weights, state, counters, and what would be evaluated."""
    with opt.averaged():
        live = result(opt)["weights"]
    return {**result(opt), "averaged": live}


if __name__ == "__main__":
    fork_lives(live)
