"""Hyperparameters to coefficient rows: every rule is a choice of numbers for lines (1)-(3).

    (1)  g <- s g + lambda theta
    (2)  m <- mu m + c g              z <- mu z + kappa (g - previous gradient)
    (3)  x <- theta - eta (alpha g + gamma m + delta z)

A row is a kind, which says what line (2) keeps, and these numbers, in the order of ``struct Row``
in csrc/step.h, in float64. Lines (4)-(5) have a table of their own, whose row says what becomes of
this step's sample (``struct Sampling``). A kernel rounds both to its arithmetic.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbwa_fused.numbers import flag, number
from rbwa_fused.streams import KEPT

Group = dict[str, Any]
Memory = dict[str, float]

IMPLICIT = "implicit_momentum"


class Kind(IntEnum):
    """Which streams a step touches; enum Kind of csrc/update.h."""

    SAMPLE = 0  # the average alone: the parameter has no gradient
    PLAIN = 1
    MOMENTUM = 2
    DIFFERENCE = 3


# What a kind keeps between steps. The first tells, by its absence, a parameter's first step.
KEPT_BY: dict[int, tuple[str, ...]] = {
    Kind.SAMPLE: (),
    Kind.PLAIN: (),
    Kind.MOMENTUM: (KEPT["m"],),
    Kind.DIFFERENCE: (KEPT["m"], KEPT["z"], KEPT["previous"]),
}


class Coefficients(NamedTuple):
    """The rule's part of a row."""

    mu: float
    c: float
    kappa: float
    alpha: float
    gamma: float
    delta: float


COLUMNS = ("kind", "s", "lambda_", *Coefficients._fields, "eta")  # of a row
ROW = struct.Struct(f"{len(COLUMNS)}d")


class Sampling(NamedTuple):
    """What becomes of an average at one step."""

    scale: float = 1.0  # of the learning rate: w where the average is the parameter itself
    w: float = 0.0  # weight of the sample
    sample: bool = False  # whether the average is touched
    current: bool = False  # whether it starts at the weights before the step
    write_back: bool = False  # whether the weights become it


SAMPLING = struct.Struct(f"{len(Sampling._fields)}d")
PLAIN = Coefficients(mu=0.0, c=0.0, kappa=0.0, alpha=1.0, gamma=0.0, delta=0.0)


def sgd(group: Group, first: bool) -> Coefficients:
    """torch.optim.SGD: ``first`` is the step at which a parameter gets its momentum buffer."""
    mu = float(group["momentum"])
    if mu == 0.0:
        return PLAIN
    if group["nesterov"]:
        return Coefficients(mu, c=1.0, kappa=0.0, alpha=1.0, gamma=mu, delta=0.0)
    c = 1.0 if first else 1.0 - float(group["dampening"])
    return Coefficients(mu, c, kappa=0.0, alpha=0.0, gamma=1.0, delta=0.0)


def sgdm(group: Group, first: bool) -> Coefficients:
    """SGD with momentum as the RSGDM paper writes it: m <- beta m + (1 - beta) g, m_0 = 0."""
    beta = float(group["momentum"])
    if beta == 0.0:
        return PLAIN
    return Coefficients(beta, 1.0 - beta, kappa=0.0, alpha=0.0, gamma=1.0, delta=0.0)


def rsgdm_implicit(group: Group, first: bool) -> Coefficients:
    """RSGDM in one buffer: u_1 = 0, u <- beta u + (1 - beta) g, step (1 - beta) g + beta u."""
    beta = float(group["momentum"])
    if beta == 0.0:
        return PLAIN
    c = 0.0 if first else 1.0 - beta
    return Coefficients(beta, c, kappa=0.0, alpha=1.0 - beta, gamma=beta, delta=0.0)


def rsgdm_explicit(group: Group, first: bool) -> Coefficients:
    """RSGDM as printed: m, the difference's average z, the previous gradient; step m + beta z."""
    beta = float(group["momentum"])
    if beta == 0.0:
        return PLAIN
    kappa = 0.0 if first else 1.0 - beta
    return Coefficients(beta, 1.0 - beta, kappa, alpha=0.0, gamma=1.0, delta=beta)


def check(group: Group) -> None:
    """Raise ValueError or TypeError for a hyperparameter out of range, in torch's words."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, words in (
        ("lr", "learning rate"),
        ("momentum", "momentum value"),
        ("weight_decay", "weight_decay value"),
    ):
        if not number(name, group[name]) >= 0.0:
            raise ValueError(f"Invalid {words}: {group[name]}")
    dampening = number("dampening", group.get("dampening", 0.0))
    if dampening != dampening:
        raise ValueError(f"Invalid dampening value: {group['dampening']}")
    flag("nesterov", group.get("nesterov", False))
    flag("maximize", group["maximize"])
    if group.get("nesterov", False) and (group["momentum"] <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def lr_on_device(group: Group) -> Tensor | None:
    """The learning rate where it is a tensor that a kernel can read.

    Raises:
        TypeError: for one of another dtype than float32.
    """
    lr = group.get("lr")
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return None
    if lr.dtype != torch.float32:
        raise TypeError(f"Invalid lr: a tensor of {lr.dtype} (expected torch.float32 on a device)")
    return lr


def check_decay(group: Group) -> None:
    """`check`, and the RSGDM paper's momentum is the decay of an average and must be below 1."""
    check(group)
    if not float(group["momentum"]) < 1.0:
        raise ValueError(f"Invalid momentum value: {group['momentum']} (expected below 1)")


def implementation(foreach: Any, differentiable: Any, fused: Any) -> None:
    """Raise for a choice of implementations that torch.optim.SGD refuses, in its words, and for one
    that autograd is to differentiate. What is left means nothing: there is one implementation."""
    flag("foreach", foreach)
    flag("differentiable", differentiable)
    flag("fused", fused)
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if differentiable:
        raise ValueError(
            f"Invalid differentiable: {differentiable!r} (expected False: autograd sees no "
            "step of ours, but that of torch.optim.SGD(differentiable=True))"
        )


def remember_momentum(group: Group) -> Memory:
    """Implicit RSGDM's one buffer is that of this momentum (docs/equivalences.md)."""
    return {IMPLICIT: float(group["momentum"])}


def check_same_momentum(group: Group, memory: Memory) -> None:
    """Raise ValueError for another momentum than that of the group's first step."""
    momentum = float(group["momentum"])
    if momentum != memory.get(IMPLICIT, momentum):
        raise ValueError(
            f"Invalid momentum value: {momentum} (implicit RSGDM holds for a constant momentum "
            f'only, and this group started with {memory[IMPLICIT]}; use difference="explicit")'
        )


def _nothing(group: Group) -> Memory:
    return {}


def _no_memory(group: Group, memory: Memory) -> None: ...


def _no_check(group: Group) -> None: ...


@dataclass(frozen=True)
class Rule:
    """How an optimizer moves a parameter, as a value.

    Attributes:
        name: by which checkpoints know it.
        hyperparameters: of a param group, all that its rows depend on; ``"lr"`` is the first, and
            the last number of a row.
        kind: of its rows, unless their coefficients are PLAIN.
        coefficients: of a group's row; ``first`` is a parameter's first step with momentum.
        check: raises for a group with a hyperparameter out of range.
        memory: what a group's first step with momentum leaves to its later ones, by the keys that
            checkpoints have for it.
        remember: makes that, of a group that was checked.
        check_memory: raises for a group that contradicts what it has left.
        moves: whether it moves the weights. Where others do, an average is never the parameter.
        inputs: the hyperparameters of a group, as a tuple; of a rule without any a rate of 0.
    """

    name: str
    hyperparameters: tuple[str, ...]
    kind: Kind
    coefficients: Callable[[Group, bool], Coefficients]
    check: Callable[[Group], None] = check
    memory: tuple[str, ...] = ()
    remember: Callable[[Group], Memory] = _nothing
    check_memory: Callable[[Group, Memory], None] = _no_memory
    moves: bool = True
    inputs: Callable[[Group], tuple[Any, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = self.hyperparameters
        object.__setattr__(self, "inputs", itemgetter(*names) if names else lambda group: (0.0,))

    @property
    def streams(self) -> tuple[str, ...]:
        """What a parameter has in its state once its group has momentum."""
        return KEPT_BY[self.kind]

    def row(self, group: Group, first: bool) -> tuple[float, ...]:
        """The numbers of COLUMNS, for a group that was checked."""
        numbers = self.coefficients(group, first)
        kind = Kind.PLAIN if numbers is PLAIN else self.kind
        s = -1.0 if group.get("maximize") else 1.0
        return kind, s, float(group.get("weight_decay", 0)), *numbers, float(group.get("lr", 0))


OF_TORCH = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
OF_PAPER = ("lr", "momentum", "weight_decay", "maximize")
SGD = Rule("sgd", OF_TORCH, Kind.MOMENTUM, sgd)
SGDM = Rule("sgdm", OF_PAPER, Kind.MOMENTUM, sgdm, check_decay)
RSGDM_IMPLICIT = Rule(
    "rsgdm_implicit",
    OF_PAPER,
    Kind.MOMENTUM,
    rsgdm_implicit,
    check_decay,
    memory=(IMPLICIT,),
    remember=remember_momentum,
    check_memory=check_same_momentum,
)
RSGDM_EXPLICIT = Rule("rsgdm_explicit", OF_PAPER, Kind.DIFFERENCE, rsgdm_explicit, check_decay)
NONE = Rule("none", (), Kind.PLAIN, lambda group, first: PLAIN, _no_check, moves=False)
RULES = {rule.name: rule for rule in (SGD, SGDM, RSGDM_IMPLICIT, RSGDM_EXPLICIT, NONE)}
MEMORY = tuple(key for rule in RULES.values() for key in rule.memory)
