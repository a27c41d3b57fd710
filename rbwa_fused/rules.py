"""Hyperparameters to coefficient rows: every rule is a choice of numbers for lines (1)-(3).

    (1)  g <- s g + lambda theta
    (2)  m <- mu m + c g              z <- mu z + kappa (g - previous gradient)
         v <- nu v + (q g) g          V <- the larger of V and v
    (3)  d <- (alpha g + gamma m + delta z) / (bias sqrt(v or V) + epsilon) + rho theta
         x <- theta - eta d

A row is a kind, which says what line (2) keeps, and these numbers, in the order of ``struct Row``
in csrc/step.h, in float64. Without v nothing is divided. A parameter's age decides `bias`, and
corrects eta and rho (`aging`); no row depends on it. Schedule-free AdamW divides the gradient
itself, before line (1) adds the decay. Lines (4)-(5) have a table of their own, whose row says what
becomes of this step's sample (``struct Sampling``). A kernel rounds all of them to its arithmetic.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbwa_fused import progress
from rbwa_fused.hyperparameters import (
    DECOUPLED,
    check,
    check_adam,
    check_decay,
    check_schedule_free_adamw,
    check_schedule_free_sgd,
)
from rbwa_fused.numbers import power
from rbwa_fused.streams import KEYS, STEP

Group = dict[str, Any]
Memory = dict[str, float]

IMPLICIT = "implicit_momentum"


class Kind(IntEnum):
    """Which streams a step touches; enum Kind of csrc/update.h."""

    SAMPLE = 0  # the average alone: the parameter has no gradient
    PLAIN = 1
    MOMENTUM = 2
    DECOUPLED = 3  # momentum with decoupled decay; schedule-free SGD
    DIFFERENCE = 4
    ADAM = 5
    AMSGRAD = 6
    SCHEDULE_FREE = 7  # schedule-free AdamW


# What a kind keeps between steps, by the names in the kernels.
KEPT_BY: dict[int, tuple[str, ...]] = {
    Kind.SAMPLE: (),
    Kind.PLAIN: (),
    Kind.MOMENTUM: ("m",),
    Kind.DECOUPLED: ("m",),
    Kind.DIFFERENCE: ("m", "z", "previous"),
    Kind.ADAM: ("m", "v"),
    Kind.AMSGRAD: ("m", "v", "v_max"),
    Kind.SCHEDULE_FREE: ("m", "v"),
}


def served_by(kind: int) -> int:
    """The kind whose branch of a GPU's kernel serves a kind, as in csrc/dispatch.h."""
    return Kind.DECOUPLED if kind == Kind.MOMENTUM else kind


def is_adam(kind: int) -> bool:
    """Whether steps of a kind depend on a parameter's age."""
    return kind >= Kind.ADAM


def mixes(kind: int) -> bool:
    """Whether the direction may have a share of the gradient beside m's."""
    return kind in (Kind.MOMENTUM, Kind.DECOUPLED, Kind.SCHEDULE_FREE)


def family(kind: int) -> int:
    """Kinds of one family may share a launch on a GPU, as in csrc/dispatch.h."""
    return 2 if kind == Kind.SCHEDULE_FREE else int(is_adam(kind))


class Coefficients(NamedTuple):
    """A rule's part of a row: all but the sign and the learning rate."""

    kind: Kind
    lambda_: float = 0.0
    mu: float = 0.0
    c: float = 0.0
    kappa: float = 0.0
    alpha: float = 0.0
    gamma: float = 0.0
    delta: float = 0.0
    nu: float = 0.0
    q: float = 0.0
    epsilon: float = 0.0
    rho: float = 0.0


COLUMNS = ("kind", "s", *Coefficients._fields[1:], "eta")  # of a row
ROW = struct.Struct(f"{len(COLUMNS)}d")


class Aging(NamedTuple):
    """What a parameter's age makes of its row; struct Aging of csrc/update.h."""

    bias: float  # of the root of v
    eta: float
    rho: float


def aging(row: Sequence[float], age: int) -> Aging:
    """`aging_of` of csrc/update.h, in the same operations, for the numbers of COLUMNS."""
    numbers = dict(zip(COLUMNS, row, strict=True))
    if not is_adam(int(numbers["kind"])):
        return Aging(1.0, numbers["eta"], numbers["rho"])
    free = numbers["kind"] == Kind.SCHEDULE_FREE
    grown = 1.0 if free else 1.0 - power(numbers["mu"], age + 1)
    bias = 1.0 / math.sqrt(1.0 - power(numbers["nu"], age + 1))
    return Aging(bias, numbers["eta"] / grown, numbers["rho"] * grown)


class Sampling(NamedTuple):
    """What becomes of an average at one step."""

    scale: float = 1.0  # of the learning rate: w where the average is the parameter itself
    w: float = 0.0  # weight of the sample
    sample: bool = False  # whether the average is touched
    current: bool = False  # whether it starts at the weights before the step
    write_back: bool = False  # whether the weights become it


SAMPLING = struct.Struct(f"{len(Sampling._fields)}d")


def _decay(group: Group) -> float:
    return float(group.get("weight_decay", 0.0))


def plain(group: Group) -> Coefficients:
    """SGD without momentum, where coupled and decoupled decay are the same."""
    return Coefficients(Kind.PLAIN, _decay(group), alpha=1.0)


def sgd(group: Group, first: bool) -> Coefficients:
    """torch.optim.SGD: ``first`` is the step at which a parameter gets its momentum buffer. With
    decoupled decay it is SGDW (Loshchilov and Hutter)."""
    mu = float(group["momentum"])
    if mu == 0.0:
        return plain(group)
    if group["nesterov"]:
        own = Coefficients(Kind.MOMENTUM, _decay(group), mu, c=1.0, alpha=1.0, gamma=mu)
    else:
        c = 1.0 if first else 1.0 - float(group["dampening"])
        own = Coefficients(Kind.MOMENTUM, _decay(group), mu, c, gamma=1.0)
    if group.get(DECOUPLED) and own.lambda_ != 0.0:
        return own._replace(kind=Kind.DECOUPLED, lambda_=0.0, rho=own.lambda_)
    return own


def sgdm(group: Group, first: bool) -> Coefficients:
    """SGD with momentum as the RSGDM paper writes it: m <- beta m + (1 - beta) g, m_0 = 0."""
    beta = float(group["momentum"])
    if beta == 0.0:
        return plain(group)
    return Coefficients(Kind.MOMENTUM, _decay(group), beta, 1.0 - beta, gamma=1.0)


def rsgdm_implicit(group: Group, first: bool) -> Coefficients:
    """RSGDM in one buffer: u_1 = 0, u <- beta u + (1 - beta) g, step (1 - beta) g + beta u."""
    beta = float(group["momentum"])
    if beta == 0.0:
        return plain(group)
    c = 0.0 if first else 1.0 - beta
    return Coefficients(Kind.MOMENTUM, _decay(group), beta, c, alpha=1.0 - beta, gamma=beta)


def rsgdm_explicit(group: Group, first: bool) -> Coefficients:
    """RSGDM as printed: m, the difference's average z, the previous gradient; step m + beta z."""
    beta = float(group["momentum"])
    if beta == 0.0:
        return plain(group)
    own = Coefficients(Kind.DIFFERENCE, _decay(group), beta, 1.0 - beta, gamma=1.0, delta=beta)
    return own._replace(kappa=0.0 if first else 1.0 - beta)


def adam(group: Group, first: bool) -> Coefficients:
    """torch.optim.Adam, and AdamW: both averages start at zero, and `aging` corrects them."""
    mu, nu = map(float, group["betas"])
    decay, decoupled = _decay(group), group[DECOUPLED]
    return Coefficients(
        Kind.AMSGRAD if group["amsgrad"] else Kind.ADAM,
        0.0 if decoupled else decay,
        mu,
        1.0 - mu,
        gamma=1.0,
        nu=nu,
        q=1.0 - nu,
        epsilon=float(group["eps"]),
        rho=decay if decoupled else 0.0,
    )


class Scheduled(NamedTuple):
    """The numbers of a row that are others at each step, in a rule that counts steps."""

    c: float
    alpha: float
    gamma: float
    rho: float


def _scheduled(group: Group, beta: float) -> tuple[Scheduled, dict[str, Any]]:
    """Of the step to come, and what it leaves in the group. m is z: z <- z - eta g, and y <-
    y - (eta (1 - c)(1 - beta) g - c z + c y)."""
    eta, c, left = progress.progress(group)
    return Scheduled(-eta, eta * (1.0 - c) * (1.0 - beta), -c, c), left


def scheduled_sgd(group: Group) -> tuple[Scheduled, dict[str, Any]]:
    return _scheduled(group, float(group["momentum"]))


def scheduled_adamw(group: Group) -> tuple[Scheduled, dict[str, Any]]:
    return _scheduled(group, float(group["betas"][0]))


def schedule_free_sgd(group: Group, first: bool) -> Coefficients:
    """Schedule-free SGD (Defazio et al., 2024; progress.py): the kernel of SGD with momentum."""
    own = scheduled_sgd(group)[0]._asdict()
    return Coefficients(Kind.DECOUPLED, _decay(group), mu=1.0, **own)


def schedule_free_adamw(group: Group, first: bool) -> Coefficients:
    """Schedule-free AdamW: the same with a gradient that was divided by the root of v."""
    own, nu = scheduled_adamw(group)[0]._asdict(), float(group["betas"][1])
    adam = {"nu": nu, "q": 1.0 - nu, "epsilon": float(group["eps"])}
    return Coefficients(Kind.SCHEDULE_FREE, _decay(group), mu=1.0, **own, **adam)


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


BETA = "beta"  # of a schedule-free group, once it has z; a checkpoint's hyperparameters say it


def remember_beta(group: Group) -> Memory:
    """y and z say what x is with this beta alone."""
    return {BETA: float(group["betas"][0] if "betas" in group else group["momentum"])}


def check_same_beta(group: Group, memory: Memory) -> None:
    """Raise ValueError for another beta than that of the group's first step."""
    beta = remember_beta(group)[BETA]
    if beta != memory.get(BETA, beta):
        name = "betas[0]" if "betas" in group else "momentum"
        raise ValueError(
            f"Invalid {name}: {beta} (this group has stepped with {memory[BETA]}; with another one "
            "its weights and z would stand for another average)"
        )


def settings(group: Group) -> tuple[float, ...]:
    """What the host says of a schedule-free group's step where a device counts: struct Setting of
    csrc/schedule.h, but for whether it takes part and its learning rate."""
    own = (group[name] for name in progress.HYPERPARAMETERS)
    return (remember_beta(group)[BETA], *map(float, own))


def _nothing(group: Group) -> Memory:
    return {}


def _no_memory(group: Group, memory: Memory) -> None: ...


def _no_check(group: Group) -> None: ...


@dataclass(frozen=True)
class Rule:
    """How an optimizer moves a parameter, as a value.

    Attributes:
        name: by which checkpoints know it.
        hyperparameters: of a param group, all that its rows depend on, but for DECOUPLED, which
            torch's groups of SGD lack; ``"lr"`` is the first, and the last number of a row.
        streams: the keys of what a parameter may come to keep, in its state. Where the first is
            absent, its next step is its first.
        coefficients: of a group's row; ``first`` is a parameter's first step with what it keeps.
        check: raises for a group with a hyperparameter out of range.
        memory: what a group's first step with momentum leaves to its later ones, by the keys that
            checkpoints have for it.
        remember: makes that, of a group that was checked.
        check_memory: raises for a group that contradicts what it has left.
        moves: whether it moves the weights. Where others do, an average is never the parameter.
        late: keys that a group may come to need at any step; what they name starts at zero then.
        wide: whether 16-bit parameters keep their state in float32, with masters or without.
        counts: whether a parameter's state has its ``step``.
        scheduled: of a rule that counts its steps in the group, what a row has of the step to come,
            and what that step leaves in the group. Its learning rate is in those numbers, and eta
            is 1.
        aside: further keys of a parameter's state, as large as it is, that no kernel knows.
        inputs: the hyperparameters of a group, as a tuple; of a rule without any a rate of 0.
    """

    name: str
    hyperparameters: tuple[str, ...]
    streams: tuple[str, ...]
    coefficients: Callable[[Group, bool], Coefficients]
    check: Callable[[Group], None] = check
    memory: tuple[str, ...] = ()
    remember: Callable[[Group], Memory] = _nothing
    check_memory: Callable[[Group, Memory], None] = _no_memory
    moves: bool = True
    late: tuple[str, ...] = ()
    wide: bool = False
    counts: bool = False
    scheduled: Callable[[Group], tuple[Scheduled, dict[str, Any]]] | None = None
    aside: tuple[str, ...] = ()
    inputs: Callable[[Group], tuple[Any, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = self.hyperparameters
        object.__setattr__(self, "inputs", itemgetter(*names) if names else lambda group: (0.0,))

    def streams_of(self, kind: int) -> tuple[str, ...]:
        """Those of what it keeps with rows of a kind."""
        return tuple(stream for stream in self.streams if KEYS[stream] in KEPT_BY[kind])

    def kept_of(self, held: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a parameter's state has of what it must have together, and all of that. A frozen one
        may have its step alone."""
        needed = tuple(stream for stream in self.streams if stream not in self.late)
        needed = (STEP, *needed) if self.counts else needed
        kept = tuple(stream for stream in needed if held.get(stream) is not None)
        return kept, needed

    def row(self, group: Group, first: bool) -> tuple[float, ...]:
        """The numbers of COLUMNS, for a group that was checked."""
        kind, *numbers = self.coefficients(group, first)
        s = -1.0 if group.get("maximize") else 1.0
        eta = float(group.get("lr", 0)) if self.scheduled is None else 1.0
        return kind, s, *numbers, eta


OF_TORCH = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
OF_PAPER = ("lr", "momentum", "weight_decay", "maximize")
OF_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", DECOUPLED)
OF_FREE = ("lr", "weight_decay", "maximize", *progress.HYPERPARAMETERS)
M = ("momentum_buffer",)
M_Z = (*M, "difference_buffer", "previous_gradient")
M_V = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SGD = Rule("sgd", OF_TORCH, M, sgd)
SGDM = Rule("sgdm", OF_PAPER, M, sgdm, check_decay)
RSGDM_IMPLICIT = Rule(
    "rsgdm_implicit",
    OF_PAPER,
    M,
    rsgdm_implicit,
    check_decay,
    memory=(IMPLICIT,),
    remember=remember_momentum,
    check_memory=check_same_momentum,
)
RSGDM_EXPLICIT = Rule("rsgdm_explicit", OF_PAPER, M_Z, rsgdm_explicit, check_decay)
ADAM = Rule(
    "adam", OF_ADAM, M_V, adam, check_adam, late=("max_exp_avg_sq",), wide=True, counts=True
)
FREE: dict[str, Any] = {
    "remember": remember_beta,
    "check_memory": check_same_beta,
    "wide": True,
    "aside": ("y",),
}
SCHEDULE_FREE_SGD = Rule(
    "sgd_schedule_free",
    (*OF_FREE, "momentum"),
    ("z",),
    schedule_free_sgd,
    check_schedule_free_sgd,
    scheduled=scheduled_sgd,
    **FREE,
)
SCHEDULE_FREE_ADAMW = Rule(
    "adamw_schedule_free",
    (*OF_FREE, "betas", "eps"),
    ("z", "exp_avg_sq"),
    schedule_free_adamw,
    check_schedule_free_adamw,
    counts=True,
    scheduled=scheduled_adamw,
    **FREE,
)
NONE = Rule("none", (), (), lambda group, first: plain(group), _no_check, moves=False)
ALL = (
    SGD,
    SGDM,
    RSGDM_IMPLICIT,
    RSGDM_EXPLICIT,
    ADAM,
    SCHEDULE_FREE_SGD,
    SCHEDULE_FREE_ADAMW,
    NONE,
)
RULES = {rule.name: rule for rule in ALL}
MEMORY = tuple(key for rule in RULES.values() for key in rule.memory)
