"""What the ranks of test_zero_modes.py do: schedule-free training with ZeroRedundancyOptimizer.

A program is a list of words. All ranks have the same batches, so that their mean has the bits that
one process gets, however many ranks there are: 1, 2 or 4.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from ddp_jobs import Driven, buffers, images, normed
from elastic_jobs import refused
from gone_jobs import Peer
from runs import bits
from torch import nn
from torch.distributed import optim
from torch.nn.parallel import DistributedDataParallel
from zero_jobs import held, through_bytes

import rbwa_fused as rf
from rbwa_fused.distributed import ZeroRedundancyOptimizer, averaged

OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (rf.SGDScheduleFree, {"lr": 0.3, "warmup_steps": 4, "weight_decay": 0.1}),
    "adamw": (rf.AdamWScheduleFree, {"lr": 0.05, "warmup_steps": 2, "r": 0.5}),
    "averaged": (rf.AdamWScheduleFree, {"lr": 0.05, "average": rf.ema(0.7)}),
    "masters": (rf.AdamWScheduleFree, {"lr": 0.05, "master_weights": True}),
}


class Run:
    """A model, an optimizer and the words that they understand.

    Args:
        ranks: whether it is one of several.
        view: see torch's ``parameters_as_bucket_view``.
        saved: a checkpoint to go on from.
    """

    def __init__(
        self, name: str, ranks: bool, view: bool = False, saved: bytes | None = None
    ) -> None:
        cls, options = OPTIONS[name]
        dtype = torch.bfloat16 if name == "masters" else torch.float32
        self.model = Driven(dtype)
        named = dict(self.model.named_parameters())
        self._late_one, alone = named.pop("late"), named.pop("scalar")
        groups = [{"params": list(named.values())}, {"params": [alone], "lr": 0.1}]
        if ranks:
            kind = {"parameters_as_bucket_view": view, **options}
            self.opt: Any = ZeroRedundancyOptimizer(groups, cls, **kind)
            self.forward: nn.Module = DistributedDataParallel(self.model)
        else:
            self.opt, self.forward = cls(groups, **options), self.model
        self.taken = 0
        if saved is not None:
            state = torch.load(io.BytesIO(saved), weights_only=True)
            self.model.load_state_dict(state["model"])
            self.opt.load_state_dict(state["optimizer"])
            self.taken = state["taken"]

    @property
    def weights(self) -> list[str | None]:
        return [bits(p) for p in self.model.parameters()]

    def do(self, words: Sequence[str]) -> list[Any]:
        """What is seen behind each word."""
        return [(word, getattr(self, f"_{word}")(), self.weights) for word in words]

    def bytes(self) -> bytes:
        """Of a checkpoint, where it was consolidated."""
        file = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.opt.state_dict()}
        torch.save({**state, "taken": self.taken}, file)
        return file.getvalue()

    def _step(self) -> None:
        self.taken += 1
        self.model.zero_grad()
        self.forward(self.taken).backward()
        self.opt.step()

    def _part(self) -> None:
        """A step in which one parameter of the first group alone has a gradient."""
        self.taken += 1
        self.model.zero_grad()
        self.forward(self.taken).backward()
        for p in self.model.parameters():
            p.grad = p.grad if p is self.model.conv else None
        self.opt.step()

    def _train(self) -> list[Any]:
        self.opt.train()
        return [group["train_mode"] for group in self.opt.param_groups]

    def _eval(self) -> list[Any]:
        self.opt.eval()
        return [group["train_mode"] for group in self.opt.param_groups]

    def _averaged(self) -> list[Any]:
        with self.opt.averaged(), self.opt.averaged():
            return self.weights

    def _blended(self) -> list[Any]:
        with self.opt.averaged(blend=0.25):
            return self.weights

    def _beside(self) -> list[Any]:
        with self.opt.averaged(which="average"):
            return self.weights

    def _lr(self) -> None:
        for group in self.opt.param_groups:
            group["lr"] *= 0.5

    def _late(self) -> None:
        self.opt.add_param_group({"params": [self._late_one], "lr": 0.2})


def alone(name: str, words: Sequence[str], saved: bytes | None = None) -> tuple[list[Any], Run]:
    """What one process comes to."""
    run = Run(name, False, saved=saved)
    return run.do(words), run


# ---- jobs ----------------------------------------------------------------------------------------


def programmed(
    name: str, words: Sequence[str], saved: bytes | None = None
) -> list[tuple[list[Any], bytes | None]]:
    """In both layouts; what is seen, and a checkpoint of the last rank."""
    answers = []
    for view in (False, True):
        run = Run(name, True, view, saved)
        seen = run.do(words)
        last = dist.get_world_size() - 1
        run.opt.consolidate_state_dict(to=last)
        answers.append((seen, run.bytes() if dist.get_rank() == last else None))
    return answers


def counted(name: str, words: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """What is seen, and what the groups of this rank count."""
    run = Run(name, True)
    seen = run.do(words)
    keys = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
    return seen, [{key: group[key] for key in keys} for group in run.opt.param_groups]


def not_trained(name: str) -> dict[str, Any]:
    """A step in eval mode, before the first one and behind it."""
    run = Run(name, True)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(dist.get_rank())  # a broadcast would be seen
    before = run.weights
    first = refused(lambda: run.do(["step"]))
    untouched = before == run.weights and not run.opt.optim.state
    run.do(["train", "step", "eval"])
    before = run.weights
    second = refused(lambda: run.do(["step"]))
    return {"errors": [first, second], "kept": untouched and before == run.weights}


def torchs() -> dict[str, Any]:
    """torch's own class, and an optimizer without modes."""
    model = Driven()
    theirs = optim.ZeroRedundancyOptimizer(model.parameters(), rf.SGDScheduleFree, lr=0.1)
    model(1).backward()
    before = [bits(p) for p in model.parameters()]
    answers: dict[str, Any] = {
        "step": refused(theirs.step),
        "untouched": before == [bits(p) for p in model.parameters()],
        "modes": [hasattr(theirs, mode) for mode in ("train", "eval")],
    }
    theirs.optim.train()  # which every rank can say, as no weight moves
    theirs.step()
    with averaged(theirs):
        answers["averaged"] = [bits(p) for p in model.parameters()]
    plain = ZeroRedundancyOptimizer(model.parameters(), rf.FusedSGD, lr=0.1)
    answers["without modes"] = [hasattr(plain, mode) for mode in ("train", "eval")]
    answers["asked"] = refused(lambda: plain.eval())
    return answers


def refusals() -> dict[str, str]:
    run = Run("averaged", True)
    run.do(["train", "step", "step"])
    before = run.weights
    answers = {}
    with run.opt.averaged():
        live = run.weights
        for mode in ("train", "eval"):
            answers[f"{mode} inside"] = refused(getattr(run.opt, mode))
        answers["step inside"] = refused(run.opt.step)
        answers["live"] = str(live == run.weights != before)
    answers["exactly"] = str(before == run.weights)
    run.do(["eval"])
    answers["beside"] = refused(lambda: run.do(["beside"]))
    answers["blended"] = refused(lambda: run.do(["blended"]))
    return answers


def estimated(cls: Any, mode: str, sharded: bool) -> dict[str, Any]:
    """BatchNorm for x, in either mode."""
    model = normed()
    given = {"lr": 0.1}
    if sharded:
        opt: Any = ZeroRedundancyOptimizer(model.parameters(), cls, **given)
        forward: nn.Module = DistributedDataParallel(model)
    else:
        opt, forward = cls(model.parameters(), **given), model
    opt.train()
    for step in range(4):
        opt.zero_grad()
        forward(images(0, step)).square().mean().backward()
        opt.step()
    getattr(opt, mode)()
    before = deepcopy(model.state_dict())
    with rf.averaged_model(opt, model, [images(9, step) for step in range(3)]):
        inside = [bits(t) for t in model.state_dict().values()]
        statistics = buffers(model)
    exactly = all(map(torch.equal, before.values(), model.state_dict().values()))
    answer = {"inside": inside, "statistics": statistics, "exactly": exactly}
    if mode == "train":
        with rf.averaged_model(opt, model, [images(9, 1)], blend=0.5):
            answer["blended"] = [bits(t) for t in model.state_dict().values()]
    return answer


def told() -> bool:
    """Whether autograd is told that other ranks' weights have changed."""
    run = Run("sgd", True)
    run.do(["train", "step"])
    answers = []
    for mode in ("eval", "train"):
        versions = [p._version for p in run.opt.param_groups[0]["params"]]
        run.do([mode])
        now = [p._version for p in run.opt.param_groups[0]["params"]]
        answers += [after > before for before, after in zip(versions, now, strict=True)]
    return all(answers)


def gone(mode: str) -> dict[str, Any]:
    """The second rank is killed in front of a switch."""
    peer = Peer()
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = ZeroRedundancyOptimizer(
        model.parameters(), rf.SGDScheduleFree, process_group=peer.group, lr=0.1
    )
    opt.train()
    for step in range(3):
        model.zero_grad()
        model(torch.full((1, 3), float(step))).square().sum().backward()
        opt.step()
    if mode == "train":
        opt.eval()
    before = [bits(p) for p in model.parameters()]
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    answer = peer.error_of(getattr(opt, mode))
    kept = before == [bits(p) for p in model.parameters()]
    return {**answer, "kept": kept, "train_mode": opt.param_groups[0]["train_mode"]}


def of_bytes(saved: bytes) -> dict[str, Any]:
    """A checkpoint's optimizer, comparable."""
    state = torch.load(io.BytesIO(saved), weights_only=True)
    return held(through_bytes(state["optimizer"]))
