"""Every optimizer rule, declared once; whatever tests "every rule" takes it from RULES.

A rule is added by one more value in RULES. Its literal algorithm is written as its source prints
it, with nothing of rbwa_fused, for float64 tensors and for the numbers of bounds.py alike.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from bounds import Value
from torch import Tensor
from torch.optim.optimizer import ParamsT

import rbwa_fused as rf

Options = dict[str, Any]
Numbers = dict[str, float]
N = TypeVar("N", Tensor, Value)


class Literal(Protocol):
    """An algorithm: the weights after a step with gradient `g`.

    `state` is what the parameter keeps between steps, empty before the first. The algorithm puts
    its new values there. `o` has every hyperparameter, as a plain number.
    """

    __name__: str

    def __call__(self, state: dict[str, N], theta: N, g: N, o: Numbers) -> N: ...


# ---- the algorithms, by the names that checkpoints know them by ----------------------------------


def sgd(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """torch.optim.SGD, as its documentation prints it. Decoupled decay is that of SGDW (Loshchilov
    and Hutter, 2019), multiplied by lr as AdamW's is in torch; without momentum it is the same."""
    decoupled = o.get("decoupled_weight_decay") and o["momentum"] != 0
    if o["maximize"]:
        g = -g
    if o["weight_decay"] != 0 and not decoupled:
        g = g + o["weight_decay"] * theta
    if o["momentum"] != 0:
        b = g
        if "momentum_buffer" in state:
            b = o["momentum"] * state["momentum_buffer"] + (1 - o["dampening"]) * g
        state["momentum_buffer"] = b
        g = g + o["momentum"] * b if o["nesterov"] else b
    if o["weight_decay"] != 0 and decoupled:
        g = g + o["weight_decay"] * theta
    return theta - o["lr"] * g


def _of_paper(theta: N, g: N, o: Numbers) -> N:
    """The gradient of the loss that a paper minimises: with torch's sign and coupled weight decay,
    which papers leave out."""
    if o["maximize"]:
        g = -g
    return g + o["weight_decay"] * theta


def sgdm(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """SGDM, the baseline of the RSGDM paper: m_0 = 0.

    Without momentum it is SGD, which keeps nothing; so it is in the two below.
    """
    g = _of_paper(theta, g, o)
    beta = o["momentum"]
    if beta == 0:
        return theta - o["lr"] * g
    m = beta * state.get("momentum_buffer", 0.0 * g) + (1 - beta) * g
    state["momentum_buffer"] = m
    return theta - o["lr"] * m


def rsgdm_explicit(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """Algorithm 1 of the RSGDM paper: m_0 = z_0 = 0, and the first difference is 0."""
    g = _of_paper(theta, g, o)
    beta = o["momentum"]
    if beta == 0:
        return theta - o["lr"] * g
    difference = g - state["previous_gradient"] if "previous_gradient" in state else 0.0 * g
    m = beta * state.get("momentum_buffer", 0.0 * g) + (1 - beta) * g
    z = beta * state.get("difference_buffer", 0.0 * g) + (1 - beta) * difference
    state.update(momentum_buffer=m, difference_buffer=z, previous_gradient=g)
    return theta - o["lr"] * (m + beta * z)


def rsgdm_implicit(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """RSGDM with one buffer, as docs/equivalences.md has it: u_1 = 0."""
    g = _of_paper(theta, g, o)
    beta = o["momentum"]
    if beta == 0:
        return theta - o["lr"] * g
    u = 0.0 * g
    if "momentum_buffer" in state:
        u = beta * state["momentum_buffer"] + (1 - beta) * g
    state["momentum_buffer"] = u
    return theta - o["lr"] * (beta * u + (1 - beta) * g)


def _power(base: float, exponent: int) -> float:
    """By squaring, the lowest bit first: a power that is rounded otherwise is another
    hyperparameter, as 1 - beta^t magnifies it."""
    power = 1.0
    while exponent > 0:
        power, base, exponent = power * (base if exponent % 2 else 1.0), base * base, exponent // 2
    return power


def adam(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """torch.optim.Adam and AdamW, as their documentation prints them. The correction of m is in the
    learning rate, and decoupled decay is added to the step."""
    if o["maximize"]:
        g = -g
    decay, decoupled = o["weight_decay"], o["decoupled_weight_decay"]
    if decay != 0 and not decoupled:
        g = g + decay * theta
    beta1, beta2 = map(float, o["betas"])
    before = state.get("step", 0)
    t = int(before.v if isinstance(before, Value) else before) + 1
    step = _count(t, g)
    m = beta1 * state.get("exp_avg", 0.0 * g) + (1 - beta1) * g
    v = beta2 * state.get("exp_avg_sq", 0.0 * g) + ((1 - beta2) * g) * g
    state.update(step=step, exp_avg=m, exp_avg_sq=v)
    if o["amsgrad"]:
        v = _larger(state.get("max_exp_avg_sq", 0.0 * g), v)
        state["max_exp_avg_sq"] = v
    correction = 1 - _power(beta1, t)
    d = m / (v.sqrt() * (1 / math.sqrt(1 - _power(beta2, t))) + o["eps"])
    if decay != 0 and decoupled:
        d = d + (decay * correction) * theta
    return theta - (o["lr"] / correction) * d


def sgd_schedule_free(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """Schedule-free SGD (Defazio et al., 2024), without its x: the weights are y.

    x = y + (1 - 1/beta) (z - y), put into y <- (1 - beta) z + beta x. tests/optimizer has all
    three.
    """
    return _schedule_free(state, theta, -g if o["maximize"] else g, o, o["momentum"])


def adamw_schedule_free(state: dict[str, N], theta: N, g: N, o: Numbers) -> N:
    """Schedule-free AdamW, as `sgd_schedule_free`: the decay is not divided."""
    if o["maximize"]:
        g = -g
    beta1, beta2 = map(float, o["betas"])
    before = state.get("step", 0)
    t = int(before.v if isinstance(before, Value) else before) + 1
    step = _count(t, g)
    v = beta2 * state.get("exp_avg_sq", 0.0 * g) + ((1 - beta2) * g) * g
    state.update(step=step, exp_avg_sq=v)
    g = g / (v.sqrt() * (1 / math.sqrt(1 - _power(beta2, t))) + o["eps"])
    return _schedule_free(state, theta, g, o, beta1)


def _schedule_free(state: dict[str, N], y: N, g: N, o: Numbers, beta: float) -> N:
    if o["weight_decay"] != 0:
        g = g + o["weight_decay"] * y
    eta, c = o["eta"], o["c"]
    z = state.get("z", y) + -eta * g
    state["z"] = z
    d = -c * z
    share = eta * (1 - c) * (1 - beta)
    if share != 0:
        d = share * g + d
    return y - (d + c * y if c != 0 else d)


def counted(o: Numbers) -> tuple[Numbers, Numbers]:
    """What schedule-free learning takes from a group's counts: the learning rate of the step to
    come and the weight of its z in x. And the counts behind it."""
    k = o["k"]
    eta = o["lr"] * ((k + 1) / o["warmup_steps"] if k < o["warmup_steps"] else 1.0)
    largest = max(eta, o["lr_max"])
    weight = (k + 1) ** o["r"] * largest ** o["weight_lr_power"]
    total = o["weight_sum"] + weight
    c = weight / total if total > 0 else 0.0
    behind = {"k": k + 1, "weight_sum": total, "lr_max": largest, "scheduled_lr": eta}
    return {"eta": eta, "c": c}, behind


NOT_STARTED = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}


def _count(steps: int, like: N) -> N:
    """A number of no shape, exact in any arithmetic."""
    count = torch.full((), float(steps), dtype=torch.float64)
    exact = torch.zeros_like(count)
    return Value(count, exact, like.arithmetic) if isinstance(like, Value) else count


def _larger(a: N, b: N) -> N:
    """Of two numbers, either of which the kernel may have found larger."""
    if isinstance(a, Value):
        return Value(torch.maximum(a.v, b.v), torch.maximum(a.off, b.off), a.arithmetic)
    return torch.maximum(a, b)


# ---- their hyperparameters -----------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """What a hyperparameter may be.

    Attributes:
        usual: the values of a grid.
        others: further values to draw.
        up_to: where any number from 0 on may be drawn, the largest.
    """

    usual: tuple[Any, ...]
    others: tuple[Any, ...] = ()
    up_to: float | None = None


OF_PAPER = {
    "lr": Domain((0.2,), (0.1, 0.0, 0.5), up_to=0.5),
    "momentum": Domain((0.0, 0.9), (0.5, 0.0), up_to=0.5),
    "weight_decay": Domain((0.0, 0.1), up_to=0.5),
    "maximize": Domain((False, True)),
}
OF_SGD = {
    **OF_PAPER,
    "dampening": Domain((0.0, 0.3), (1.0, -0.5, 1.5)),
    "nesterov": Domain((False, True)),
}


OF_SGDW = {**OF_SGD, "decoupled_weight_decay": Domain((True,))}
OF_ADAM = {
    "lr": OF_PAPER["lr"],
    "betas": Domain(((0.9, 0.999), (0.0, 0.7)), ((0.5, 0.5), (0.9, 0.9), (0.8, 0.0))),
    "eps": Domain((1e-2,), (1e-1, 1.0)),
    "weight_decay": OF_PAPER["weight_decay"],
    "maximize": OF_PAPER["maximize"],
    "amsgrad": Domain((False, True)),
    "decoupled_weight_decay": Domain((False, True)),
}


OF_FREE = {
    **{key: OF_PAPER[key] for key in ("lr", "weight_decay", "maximize")},
    "warmup_steps": Domain((0, 3), (1, 20)),
    "r": Domain((0.0,), (0.5, 1.0)),
    "weight_lr_power": Domain((2.0,), (0.0, 1.0)),
}
OF_FREE_SGD = {**OF_FREE, "momentum": Domain((0.9,), (0.5, 0.99))}
OF_FREE_ADAMW = {
    **OF_FREE,
    "betas": Domain(((0.9, 0.999),), ((0.5, 0.5), (0.9, 0.0))),
    "eps": OF_ADAM["eps"],
}


class SGDScheduleFree(rf.SGDScheduleFree):
    """In train mode, as all other optimizers are."""

    @functools.wraps(rf.SGDScheduleFree.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.train()


class AdamWScheduleFree(rf.AdamWScheduleFree):
    """In train mode, as all other optimizers are."""

    @functools.wraps(rf.AdamWScheduleFree.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.train()


def _as_given(options: Options) -> Options:
    return options


def _nesterov_alone(options: Options) -> Options:
    """torch refuses Nesterov's momentum without a momentum and with a dampening."""
    nesterov = options["nesterov"] and options["momentum"] > 0
    return {**options, "nesterov": nesterov, **({"dampening": 0.0} if nesterov else {})}


# ---- the rules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A rule, with hyperparameters away from their defaults.

    Attributes:
        cls: the optimizer.
        options: of its constructor.
        literal: the algorithm.
        domain: the hyperparameters; all else in `options` is the constructor's alone.
        allowed: hyperparameters, without what the class refuses together.
        torchs: the class of torch that takes the same steps and exchanges checkpoints with it.
        constant_momentum: whether a group must go on with the momentum of its first step.
        wide: whether 16-bit parameters keep float32 state, with masters or without.
        counts: what a step takes from the counts of its group, and what it leaves there.
        writes_back: whether averages may be written to the weights.
    """

    cls: Callable[..., Any]
    options: Options
    literal: Literal
    domain: dict[str, Domain]
    allowed: Callable[[Options], Options] = _as_given
    torchs: Callable[..., Any] | None = None
    constant_momentum: bool = False
    wide: bool = False
    counts: Callable[[Numbers], tuple[Numbers, Numbers]] | None = None
    writes_back: bool = True

    def made(self, params: ParamsT, **more: Any) -> Any:
        """The optimizer."""
        return self.cls(params, **{**self.options, **more})

    def of_step(self, numbers: Numbers, counts: Numbers) -> tuple[Numbers, Numbers]:
        """What `literal` takes at a step, and the counts of the group behind it."""
        if self.counts is None:
            return numbers, counts
        taken, behind = self.counts({**numbers, **counts})
        return {**numbers, **taken}, behind

    def takes(self, policy: rf.Average | list[rf.Average] | None) -> bool:
        """Whether it can have such an average, or several."""
        policies = policy if isinstance(policy, list) else [policy] if policy is not None else []
        return self.writes_back or all(policy.write_back_every == 0 for policy in policies)

    def beta(self, numbers: Numbers) -> float | None:
        """What a group must go on with, once it has stepped."""
        if not self.constant_momentum:
            return None
        betas: Any = numbers.get("betas")
        return float(numbers["momentum"] if betas is None else betas[0])

    def with_beta(self, options: Options, beta: float) -> Options:
        """The hyperparameters with another one."""
        if "betas" in options:
            return {**options, "betas": (beta, options["betas"][1])}
        return {**options, "momentum": beta}

    @property
    def modes(self) -> bool:
        """Whether it has train() and eval()."""
        return hasattr(self.cls, "eval")

    @property
    def master(self) -> bool:
        """Whether 16-bit parameters have float32 masters."""
        return bool(self.options.get("master_weights"))

    @property
    def constructor(self) -> Options:
        """The options that are no hyperparameters."""
        return {k: v for k, v in self.options.items() if k not in self.domain}

    @property
    def hyperparameters(self) -> Options:
        """All of them, defaults included."""
        defaults = {k: p.default for k, p in inspect.signature(self.cls).parameters.items()}
        # FusedAdamW has no argument for what it always is.
        alone = {k: domain.usual[0] for k, domain in self.domain.items()}
        return {k: self.options.get(k, defaults.get(k, alone[k])) for k in self.domain}

    @cached_property
    def keeps(self) -> tuple[str, ...]:
        """What a parameter has in its state after a step, beside its average and its master."""
        state: dict[str, Tensor] = {}
        one = torch.ones((), dtype=torch.float64)
        self.literal(state, one, one, self.of_step(self.hyperparameters, NOT_STARTED)[0])
        return tuple(state)

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        """What a step works on: a float32 master of a 16-bit parameter, if there is one."""
        return torch.float32 if self.master and dtype.itemsize == 2 else dtype

    def state_dtype(self, key: str, dtype: torch.dtype) -> torch.dtype:
        """Of what the algorithm keeps for a parameter."""
        if key == "step" or (self.wide and dtype.itemsize == 2):
            return torch.float32
        return self.kept(dtype)

    def grid(self) -> Iterator[Options]:
        """Every usual combination of hyperparameters."""
        seen = []
        for values in itertools.product(*(domain.usual for domain in self.domain.values())):
            options = self.allowed(dict(zip(self.domain, values, strict=True)))
            if options not in seen:
                seen.append(options)
                yield options


def _sgd(**options: Any) -> Rule:
    return Rule(rf.FusedSGD, options, sgd, OF_SGD, _nesterov_alone, torch.optim.SGD)


def _with_masters(**options: Any) -> Rule:
    """FusedSGD with float32 masters, which torch's has not."""
    return Rule(rf.FusedSGD, {**options, "master_weights": True}, sgd, OF_SGD, _nesterov_alone)


def _adam(**options: Any) -> Rule:
    return Rule(rf.FusedAdam, options, adam, OF_ADAM, torchs=torch.optim.Adam, wide=True)


def _adamw(**options: Any) -> Rule:
    domain = {**OF_ADAM, "decoupled_weight_decay": Domain((True,))}
    own = options.keys() - domain.keys()
    return Rule(
        rf.FusedAdamW,
        options,
        adam,
        domain,
        torchs=None if own else torch.optim.AdamW,
        wide="state_dtype" not in options,
    )


def _free(cls: Callable[..., Any], literal: Literal, domain: dict[str, Domain], **own: Any) -> Rule:
    return Rule(
        cls,
        own,
        literal,
        domain,
        constant_momentum=True,
        wide=True,
        counts=counted,
        writes_back=False,
    )


def _free_sgd(**options: Any) -> Rule:
    return _free(SGDScheduleFree, sgd_schedule_free, OF_FREE_SGD, **options)


def _free_adamw(**options: Any) -> Rule:
    return _free(AdamWScheduleFree, adamw_schedule_free, OF_FREE_ADAMW, **options)


RULES: dict[str, Rule] = {
    "sgd": _sgd(lr=0.3),
    "decay-maximize": _sgd(lr=0.2, weight_decay=0.1, maximize=True),
    "momentum": _sgd(lr=0.1, momentum=0.8, weight_decay=0.05),
    "dampening": _sgd(lr=0.1, momentum=0.7, dampening=0.4, maximize=True),
    "nesterov": _sgd(lr=0.1, momentum=0.6, nesterov=True, weight_decay=0.1),
    "sgdm": Rule(rf.RSGDM, {"lr": 0.3, "momentum": 0.8, "difference": None}, sgdm, OF_PAPER),
    "rsgdm implicit": Rule(
        rf.RSGDM,
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1},
        rsgdm_implicit,
        OF_PAPER,
        constant_momentum=True,
    ),
    "rsgdm explicit": Rule(
        rf.RSGDM,
        {
            "lr": 0.3,
            "momentum": 0.7,
            "weight_decay": 0.05,
            "maximize": True,
            "difference": "explicit",
        },
        rsgdm_explicit,
        OF_PAPER,
    ),
    "sgdw": Rule(
        rf.FusedSGD,
        {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.1, "decoupled_weight_decay": True},
        sgd,
        OF_SGDW,
        _nesterov_alone,
    ),
    "adam": _adam(lr=0.1, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
    "adamw amsgrad": _adamw(
        lr=0.1, betas=(0.7, 0.9), eps=1e-2, weight_decay=0.05, amsgrad=True, maximize=True
    ),
    "adamw narrow": _adamw(lr=0.1, betas=(0.8, 0.9), eps=1e-1, state_dtype="param"),
    "free sgd": _free_sgd(lr=0.3, momentum=0.8, weight_decay=0.1, warmup_steps=3),
    "free adamw": _free_adamw(
        lr=0.1, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1, warmup_steps=2, r=0.5, maximize=True
    ),
    "master": _with_masters(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.05),
    "master adamw": _adamw(lr=0.1, betas=(0.8, 0.9), eps=1e-2, master_weights=True),
    "master free adamw": _free_adamw(lr=0.1, betas=(0.8, 0.9), eps=1e-2, master_weights=True),
    "master sgd": _with_masters(lr=0.3, weight_decay=0.1),
    "master rsgdm explicit": Rule(
        rf.RSGDM,
        {"lr": 0.2, "momentum": 0.7, "difference": "explicit", "master_weights": True},
        rsgdm_explicit,
        OF_PAPER,
    ),
}


def _one_of_each(key: Callable[[Rule], Any], rules: dict[str, Rule]) -> dict[str, Rule]:
    """The first rule with each value of the key."""
    found: dict[Any, str] = {}
    for name, rule in rules.items():
        found.setdefault(key(rule), name)
    return {name: rules[name] for name in found.values()}


# Parts of the table, for what does not need all of it.
PLAIN = {name: rule for name, rule in RULES.items() if not rule.master}
OF_TORCH = {name: rule for name, rule in RULES.items() if rule.torchs is not None}
WITH_STATE = {name: rule for name, rule in PLAIN.items() if rule.keeps}
ALGORITHMS = _one_of_each(lambda rule: rule.literal, WITH_STATE)
KERNELS = _one_of_each(lambda rule: (rule.keeps, rule.master), RULES)
