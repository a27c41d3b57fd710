"""What users write today: torch's SGD, the averaging wrappers around it, literal algorithms.

The wrappers work on modules and see to BatchNorm's buffers as well (60 small tensors in
ResNet-18), which belongs to what their users pay. They keep their defaults, but for the decays
that make a row comparable with ours.

Bytes count what each pass over an element reads and writes, temporaries included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.rows.maths import Average, Maths, Rule
from benchmarks.rows.problem import LR, MOMENTUM, WEIGHT_DECAY, Problem
from benchmarks.rows.provider import Kind, Provider, use_gradients_of

EMA_DECAY = 0.999
RBWA_E_BETA = 0.9
TIMM_DECAY = 0.9999  # ModelEmaV3's default, from the initial weights on

# Reads and writes of an element by each pass.
FUSED = 5  # theta, g, m; theta, m
SEPARATE = 11  # g + decay theta: 3, m *= mu: 2, m += g: 3, theta -= lr m: 3
LERP = 3
MEAN = 10  # without foreach: (theta - a): 3, / (n + 1): 2, a + …: 3, copied into a: 2
SCALED_SUM = 5  # a *= decay: 2, a += (1 - decay) theta: 3
COPY = 2
RSGDM = 20  # the seven passes of rsgdm_foreach: 3 + 3 + 3 + 3 + 2 + 3 + 3


def mean(n: int) -> float:
    """Weight of the sample after n others in a running mean."""
    return 1 / (n + 1)


def ema(decay: float) -> Callable[[int], float]:
    """Weight in a moving average that begins as a copy of its first sample."""
    return lambda n: 1.0 if n == 0 else 1 - decay


def _from_the_start(n: int) -> float:
    return 1 - TIMM_DECAY


def _warming_up(n: int) -> float:
    """ema_pytorch's inverse schedule at its defaults, decay 1 - (1 + n)^(-2/3), which it computes
    in float32; its first sample is a copy."""
    return 1.0 - (1 - (1 + torch.tensor(float(n))) ** (-2 / 3)).item()


def sgd(problem: Problem, model: nn.Module, how: str = "fused") -> torch.optim.SGD:
    """torch's, for a copy of the problem's model."""
    return torch.optim.SGD(
        problem.groups(model),
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=how == "fused",
        foreach=how == "foreach",
    )


def provider(
    problem: Problem,
    name: str,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    accesses: int | None,
    kind: Kind = "today",
    step: Callable[[], object] | None = None,
    average: Average | None = None,
    averaged: nn.Module | None = None,
    rule: Rule = "momentum",
) -> Provider:
    """A provider of another library's optimizer, with averages in another module where there are
    some."""

    def averages() -> list[Tensor] | None:
        return None if averaged is None else list(averaged.parameters())

    def state() -> list[Tensor]:
        kept = [t for s in opt.state.values() for t in s.values() if isinstance(t, Tensor)]
        if averaged is not None:
            kept += [*averaged.parameters(), *averaged.buffers()]
        return kept

    def moved() -> tuple[float, float] | None:
        if accesses is None:
            return None
        moved_bytes = float(accesses * problem.dtype.itemsize)
        return moved_bytes, moved_bytes

    return Provider(
        name=name,
        kind=kind,
        maths=Maths(rule, average),
        params=list(model.parameters()),
        step=opt.step if step is None else step,
        use_gradients=use_gradients_of(problem, model),
        averages=averages,
        state=state,
        moved=moved,
        model=model,
    )


def torch_sgd(how: Literal["fused", "foreach", "for-loop"]) -> Callable[[Problem, str], Provider]:
    """torch.optim.SGD in one of its three implementations."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        accesses = FUSED if how == "fused" else SEPARATE
        return provider(problem, name, model, sgd(problem, model, how), accesses, "baseline")

    return build


def averaged_model(
    how: Literal["mean", "ema", "rbwa", "rbwa_e"],
) -> Callable[[Problem, str], Provider]:
    """Fused SGD and torch's AveragedModel; RBWA and RBWA-E copy its weights back."""
    means = how in ("mean", "rbwa")
    written_back = how in ("rbwa", "rbwa_e")
    decay = RBWA_E_BETA if how == "rbwa_e" else EMA_DECAY

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        opt = sgd(problem, model)
        averaged = AveragedModel(model, multi_avg_fn=None if means else get_ema_multi_avg_fn(decay))
        live: list[Tensor] = list(model.parameters())
        shadow: list[Tensor] = list(averaged.module.parameters())

        @torch.no_grad()
        def step() -> None:
            opt.step()
            averaged.update_parameters(model)
            if written_back:
                torch._foreach_copy_(live, shadow)

        on_cpu = problem.device.type == "cpu"  # where AveragedModel has no foreach for means
        accesses = FUSED + (MEAN if means and on_cpu else LERP) + (COPY if written_back else 0)
        average = Average(mean if means else ema(decay), written_back=written_back)
        return provider(
            problem, name, model, opt, accesses, step=step, average=average, averaged=averaged
        )

    return build


def foreach_lerp(written_back: bool) -> Callable[[Problem, str], Provider]:
    """Fused SGD and an EMA by hand: one foreach call, from the initial weights on. With RBWA-E's
    decay another one writes it back."""
    weight = 1 - (RBWA_E_BETA if written_back else EMA_DECAY)

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        opt = sgd(problem, model)
        averaged = problem.copy()
        live: list[Tensor] = list(model.parameters())
        shadow: list[Tensor] = list(averaged.parameters())

        @torch.no_grad()
        def step() -> None:
            opt.step()
            torch._foreach_lerp_(shadow, live, weight)
            if written_back:
                torch._foreach_copy_(live, shadow)

        return provider(
            problem,
            name,
            model,
            opt,
            FUSED + LERP + (COPY if written_back else 0),
            step=step,
            average=Average(lambda n: weight, written_back=written_back),
            averaged=averaged,
        )

    return build


def foreach_teacher(problem: Problem, name: str) -> Provider:
    """Fused SGD and a teacher by the two foreach calls of DINO's loop, a multiplication and an
    addition."""
    model = problem.copy()
    opt = sgd(problem, model)
    teacher = problem.copy()
    live: list[Tensor] = list(model.parameters())
    shadow: list[Tensor] = list(teacher.parameters())

    @torch.no_grad()
    def step() -> None:
        opt.step()
        torch._foreach_mul_(shadow, EMA_DECAY)
        torch._foreach_add_(shadow, live, alpha=1 - EMA_DECAY)

    average = Average(lambda n: 1 - EMA_DECAY)
    return provider(
        problem, name, model, opt, FUSED + SCALED_SUM, step=step, average=average, averaged=teacher
    )


def compiled(average: bool) -> Callable[[Problem, str], Provider]:
    """SGD with momentum, and an EMA behind it if asked, as foreach calls that torch.compile makes
    one function of."""

    def build(problem: Problem, name: str) -> Provider:
        model = problem.copy()
        params: list[Tensor] = [p.detach() for p in model.parameters()]
        m, a = ([torch.zeros_like(p) for p in params] for _ in range(2))
        (lr,) = problem.lrs
        live = list(model.parameters())

        def update(params: list[Tensor], grads: list[Tensor], weight: float) -> None:
            decayed = torch._foreach_add(grads, params, alpha=WEIGHT_DECAY)
            torch._foreach_mul_(m, MOMENTUM)
            torch._foreach_add_(m, decayed)
            torch._foreach_add_(params, m, alpha=-lr)
            if average:
                torch._foreach_lerp_(a, params, weight)

        compiled_update = torch.compile(update)
        started = False

        @torch.no_grad()
        def step() -> None:
            nonlocal started
            grads = [p.grad for p in live if p.grad is not None]
            compiled_update(params, grads, 1 - EMA_DECAY)
            if average and not started:
                torch._foreach_copy_(a, params)  # the first sample
            started = True

        moved = 4.0 * (FUSED + 2 * average)
        return Provider(
            name=name,
            kind="today",
            maths=Maths("momentum", Average(ema(EMA_DECAY)) if average else None),
            params=live,
            step=step,
            use_gradients=use_gradients_of(problem, model),
            averages=lambda: a if average else None,
            state=lambda: [*m, *(a if average else [])],
            moved=lambda: (moved, moved),
            model=model,
        )

    return build


def apex_sgd(problem: Problem, name: str) -> Provider:
    """apex's FusedSGD."""
    from apex.optimizers import FusedSGD

    model = problem.copy()
    opt = FusedSGD(problem.groups(model), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return provider(problem, name, model, opt, FUSED, "baseline")


def timm_ema(problem: Problem, name: str) -> Provider:
    """Fused SGD and timm's ModelEmaV3 at its defaults (foreach)."""
    from timm.utils.model_ema import ModelEmaV3

    model = problem.copy()
    opt = sgd(problem, model)
    averaged = ModelEmaV3(model)

    def step() -> None:
        opt.step()
        averaged.update(model)

    # bfloat16 is rounded stochastically, in passes that are not counted here.
    accesses = None if problem.dtype == torch.bfloat16 else FUSED + LERP
    average = Average(_from_the_start)
    return provider(
        problem, name, model, opt, accesses, step=step, average=average, averaged=averaged
    )


def ema_pytorch_ema(problem: Problem, name: str) -> Provider:
    """Fused SGD and ema_pytorch's EMA, at every step from the first."""
    from ema_pytorch import EMA

    model = problem.copy()
    opt = sgd(problem, model)
    averaged = EMA(model, update_every=1, update_after_step=0)

    def step() -> None:
        opt.step()
        averaged.update()

    return provider(
        problem,
        name,
        model,
        opt,
        FUSED + LERP,
        step=step,
        average=Average(_warming_up),
        averaged=averaged.ema_model,
    )


def rsgdm_foreach(problem: Problem, name: str) -> Provider:
    """RSGDM as its paper prints it: m, the difference's average z, the previous gradient."""
    model = problem.copy()
    params: list[Tensor] = list(model.parameters())
    m, z, previous = ([torch.zeros_like(p) for p in params] for _ in range(3))
    (lr,) = problem.lrs
    beta = MOMENTUM
    started = False

    @torch.no_grad()
    def step() -> None:
        nonlocal started
        given = [p.grad for p in params if p.grad is not None]
        grads = torch._foreach_add(given, params, alpha=WEIGHT_DECAY)
        if not started:
            torch._foreach_copy_(previous, grads)
            started = True
        difference = torch._foreach_sub(grads, previous)
        torch._foreach_lerp_(m, grads, 1 - beta)
        torch._foreach_lerp_(z, difference, 1 - beta)
        torch._foreach_copy_(previous, grads)
        torch._foreach_add_(params, m, alpha=-lr)
        torch._foreach_add_(params, z, alpha=-lr * beta)

    moved = float(RSGDM * problem.dtype.itemsize)
    return Provider(
        name=name,
        kind="today",
        maths=Maths("rsgdm"),
        params=params,
        step=step,
        use_gradients=use_gradients_of(problem, model),
        averages=lambda: None,
        state=lambda: [*m, *z, *previous],
        moved=lambda: (moved, moved),
        model=model,
    )
