"""Checks of a param group's hyperparameters, in the words of torch's classes and of the package
schedulefree: each raises ValueError or TypeError for one out of range."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rbwa_fused import progress
from rbwa_fused.numbers import flag, number

Group = dict[str, Any]

DECOUPLED = "decoupled_weight_decay"  # torch's key


def _check_numbers(group: Group, words: dict[str, str]) -> None:
    """Raise for one that is negative or none, and for a learning rate of several elements."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, said in words.items():
        if not number(name, group[name]) >= 0.0:
            raise ValueError(f"Invalid {said}: {group[name]}")


def check(group: Group) -> None:
    """Raise ValueError or TypeError for a hyperparameter out of range, in torch's words."""
    words = {"lr": "learning rate", "momentum": "momentum value"}
    _check_numbers(group, {**words, "weight_decay": "weight_decay value"})
    dampening = number("dampening", group.get("dampening", 0.0))
    if dampening != dampening:
        raise ValueError(f"Invalid dampening value: {group['dampening']}")
    flag("nesterov", group.get("nesterov", False))
    flag("maximize", group["maximize"])
    flag(DECOUPLED, group.get(DECOUPLED, False))
    if group.get("nesterov", False) and (group["momentum"] <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_adam(group: Group) -> None:
    """`check` for Adam's hyperparameters."""
    words = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}
    _check_numbers(group, words)
    beta1, beta2 = betas = _betas(group)
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not 0.0 <= number(f"betas[{i}]", beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if isinstance(beta1, Tensor) != isinstance(beta2, Tensor) or any(map(_is_int, betas)):
        raise ValueError("betas must be either both floats or both Tensors")
    for name in ("amsgrad", "maximize", DECOUPLED):
        flag(name, group[name])


def _betas(group: Group) -> tuple[Any, Any]:
    betas = group["betas"]
    try:
        beta1, beta2 = (betas[i] for i in range(len(betas)))  # a set has no order
    except (TypeError, ValueError, LookupError):
        raise TypeError(f"Invalid betas: {betas!r} (expected two numbers)") from None
    return beta1, beta2


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def check_schedule_free_sgd(group: Group) -> None:
    """`check` for schedule-free SGD."""
    _check_numbers(group, {"lr": "learning rate", "weight_decay": "weight_decay value"})
    words = "Momentum must be between 0 and 1 exclusive"  # the package's
    progress.exclusive("momentum", group["momentum"], words)
    flag("maximize", group["maximize"])
    progress.check(group)


def check_schedule_free_adamw(group: Group) -> None:
    """`check` for schedule-free AdamW."""
    words = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}
    _check_numbers(group, words)
    beta1, beta2 = _betas(group)
    words_of_first = "betas[0] must be between 0 and 1 exclusive"
    progress.exclusive("betas[0]", beta1, words_of_first)
    if not 0.0 <= number("betas[1]", beta2) < 1.0:
        raise ValueError(f"Invalid beta parameter at index 1: {beta2}")
    flag("maximize", group["maximize"])
    progress.check(group)


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


def tensors_with_foreach(lr: Any, betas: Any, foreach: Any, capturable: bool) -> None:
    """Raise where torch.optim.Adam's ``foreach`` would read tensors on the host, in its words."""
    if not foreach or capturable:
        return
    named = {"lr": lr}
    if isinstance(betas, tuple | list):
        named |= {f"betas[{i}]": beta for i, beta in enumerate(betas)}
    for name, value in named.items():
        if isinstance(value, Tensor):
            raise ValueError(
                f"{name} as a Tensor is not supported for capturable=False and foreach=True"
            )
