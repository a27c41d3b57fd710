"""DINO's training program (main_dino.py), whose teacher is where an Averager's averages live. It is
written here twice, as it is and with the Averager."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from beside import as_bits
from programs import EPOCHS, EPS, Net, floating, images, through_a_file
from torch import Tensor, nn
from torch.nn import functional as F

import rbwa_fused as rf

STEPS_PER_EPOCH, OUT = 4, 7


def cosine(base: float, final: float) -> list[float]:
    """DINO's cosine_scheduler: a value for each iteration."""
    n = EPOCHS * STEPS_PER_EPOCH
    return [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / n)) for i in range(n)]


MOMENTUM = cosine(0.9, 1.0)  # of the teacher
WEIGHT_DECAY = cosine(0.04, 0.4)
LR = cosine(0.02, 1e-4)


class MultiCrop(nn.Module):
    """A backbone and a head whose last layer has weight norm; crops of one size go together."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6)).double()
        last = nn.Linear(6, OUT, bias=False).double()
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        magnitude: Any = self.last_layer.parametrizations.weight.original0
        magnitude.data.fill_(1.0)
        magnitude.requires_grad_(False)

    def forward(self, crops: list[Tensor]) -> Tensor:
        sizes = [crop.shape[-1] for crop in crops]
        features = [
            self.backbone(torch.cat([c for c in crops if c.shape[-1] == size]))
            for size in dict.fromkeys(sizes)
        ]
        normed = F.normalize(self.head(torch.cat(features)), dim=-1)
        return self.last_layer(normed)  # type: ignore[no-any-return]


class DinoLoss(nn.Module):
    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1, OUT, dtype=torch.float64))

    def forward(self, student: Tensor, teacher: Tensor, crops: int) -> Tensor:
        of_student = (student / 0.1).chunk(crops)
        of_teacher = F.softmax((teacher - self.center) / 0.04, dim=-1).detach().chunk(2)
        terms = [
            (-q * F.log_softmax(v, dim=-1)).sum(-1).mean()
            for i, q in enumerate(of_teacher)
            for j, v in enumerate(of_student)
            if i != j
        ]
        with torch.no_grad():
            self.center = self.center * 0.9 + teacher.mean(0, keepdim=True) * 0.1
        return torch.stack(terms).mean()


class Dino:
    """A run of the script.

    Args:
        averaged: the teacher is where an Averager's averages live (``into``); else it follows by
            hand, in the arithmetic of the Averager.
    """

    def __init__(self, averaged: bool) -> None:
        torch.manual_seed(1)
        self.student, self.teacher = MultiCrop(), MultiCrop()
        self.teacher.load_state_dict(self.student.state_dict())
        for p in self.teacher.parameters():
            p.requires_grad = False
        self.loss = DinoLoss()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        regularized = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() == 1]
        groups = [{"params": regularized}, {"params": others, "weight_decay": 0.0}]
        self.opt = torch.optim.AdamW(groups)
        self.averager = None
        if averaged:
            schedule = list(MOMENTUM)  # no policy of ours has a schedule: a function has
            average = rf.Average(lambda n, step: 1.0 - schedule[step - 1], name="teacher")
            self.averager = rf.Averager(
                self.student, average, optimizer=self.opt, into=self.teacher
            )

    def step(self, step: int) -> None:
        """An iteration, counted from 0."""
        for i, group in enumerate(self.opt.param_groups):
            group["lr"] = LR[step]
            if i == 0:
                group["weight_decay"] = WEIGHT_DECAY[step]
        crops = [images(10 * step + k, size=8) for k in range(2)]
        crops += [images(10 * step + 2 + k, size=6) for k in range(2)]
        loss = self.loss(self.student(crops), self.teacher(crops[:2]), len(crops))
        self.opt.zero_grad()
        loss.backward()
        for p in self.student.parameters():  # clip_gradients, at what these gradients exceed
            if p.grad is not None:
                norm = p.grad.norm(2)
                if 0.3 / (norm + 1e-6) < 1:
                    p.grad.mul_(0.3 / (norm + 1e-6))
        if step < STEPS_PER_EPOCH:  # cancel_gradients_last_layer
            for p in self.student.last_layer.parameters():
                p.grad = None
        before = {name: p.clone() for name, p in self.teacher.named_parameters()}
        self.opt.step()
        m = MOMENTUM[step]
        for name, k in self.teacher.named_parameters():
            q = self.student.get_parameter(name).detach()
            if self.averager is None:
                k.copy_(before[name] + (1 - m) * (q - before[name]))
            its = before[name].mul_(m).add_((1 - m) * q)  # as the script has it
            unit = EPS * max(its.abs().max().item(), q.abs().max().item())
            assert (k - its).abs().max() <= 4 * unit, (step, name)

    def parts(self) -> dict[str, Any]:
        own = {"student": self.student, "teacher": self.teacher, "optimizer": self.opt}
        averager = {} if self.averager is None else {"averager": self.averager}
        return {**own, "dino_loss": self.loss, **averager}


def ends(run: Dino) -> Any:
    return {name: as_bits(part.state_dict()) for name, part in run.parts().items()}


def test_dinos_teacher_follows_by_its_schedule_from_the_first_step_on() -> None:
    """Bit for bit; each step of the teacher within four units of mul_(m).add_((1 - m) q)."""
    literal, ours = Dino(False), Dino(True)
    start = floating(ours.teacher)
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        literal.step(step)
        ours.step(step)
    expected, found = ends(literal), ends(ours)
    assert {name: found[name] for name in expected} == expected
    now = floating(ours.teacher)
    assert any((now[name] - value).abs().max() > 1e-3 for name, value in start.items())
    assert not torch.equal(ours.loss.center, torch.zeros_like(ours.loss.center))


def test_dino_resumes_bit_for_bit() -> None:
    whole, again = Dino(True), Dino(True)
    stop, last = 6, EPOCHS * STEPS_PER_EPOCH
    for step in range(last):
        if step == stop:
            saved = {name: part.state_dict() for name, part in whole.parts().items()}
            checkpoint = through_a_file(saved)
        whole.step(step)
    parts = again.parts()
    averager = parts.pop("averager")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    with pytest.warns(UserWarning, match="load its state dict, too"):
        averager.load_state_dict(checkpoint["averager"])
    for step in range(stop, last):
        again.step(step)
    assert ends(again) == ends(whole)
