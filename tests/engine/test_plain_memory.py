"""Tensors whose memory does not hold their elements as they are: lazily negated ones, lazy zeros.

torch makes them of the imaginary part of a conjugate, and its operators resolve them. A kernel that
reads memory would step the wrong way, without a word.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused.engine import doors

BACKENDS = ["cpu", "reference"]


class Imaginary(torch.autograd.Function):
    """A backward function of a user's own, whose gradient torch negates lazily."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.complex(torch.zeros_like(x), x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].conj().imag


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch._neg_view(gradients[0].clone())


def imaginary(shape: tuple[int, ...]) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.ones(shape))
    return p, lambda: Imaginary.apply(p).imag.sum().backward()


def negative(shape: tuple[int, ...]) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.ones(shape))
    return p, lambda: Negated.apply(p).square().sum().backward()


def trained(cls: Any, make: Any, shape: tuple[int, ...], **options: Any) -> Tensor:
    p, backward = make(shape)
    others = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = cls([others[0], p, *others[1:]], lr=0.5, momentum=0.5, **options)
    for step in range(3):
        opt.zero_grad()
        backward()
        if not options.get("in_backward") and (make is negative or p.numel() == 1):
            assert p.grad is not None and p.grad.is_neg()  # else autograd has copied it
        for other in others[: 3 if step == 1 else 1]:  # some are absent
            other.grad = torch.ones(2)
        opt.step()
    return p.detach()


@pytest.mark.parametrize("options", [{}, {"flatten": False}, {"in_backward": True}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1, 1), (5,), (4, 3)])
@pytest.mark.parametrize("make", [imaginary, negative])
def test_a_lazily_negated_gradient_steps_the_right_way(
    make: Any, shape: tuple[int, ...], backend: str, options: Any
) -> None:
    right = trained(torch.optim.SGD, make, shape)
    assert torch.equal(trained(rf.FusedSGD, make, shape, backend=backend, **options), right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_negated_at_a_later_step_is_noticed(backend: str) -> None:
    """The first step looks at everything anyway."""
    p = nn.Parameter(torch.zeros(3))
    opt = rf.FusedSGD([p], lr=1.0, backend=backend)
    for sign in (1.0, -1.0, -1.0, 1.0):
        p.grad = torch.ones(3)
        if sign < 0:
            p.grad = torch._neg_view(p.grad)
        before = p.detach().clone()
        opt.step()
        assert torch.equal(p, before - sign)


def test_a_negated_gradient_is_unscaled_as_it_is() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch._neg_view(torch.full((3,), 4.0))
    opt: Any = rf.FusedSGD([p], lr=1.0)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    opt.step()
    assert torch.equal(p, torch.full((3,), 2.0)) and torch.equal(p.grad, torch.full((3,), -2.0))


def test_gradients_that_take_no_memory_are_zeros() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=1.0, weight_decay=0.5)
    for _ in range(2):
        p.grad = torch._efficientzerotensor(3)
        opt.step()
    assert torch.equal(p, torch.full((3,), 0.25))


@pytest.mark.parametrize("flatten", [True, False])
def test_a_parameter_that_is_lazily_negated_is_stepped_and_averaged(flatten: bool) -> None:
    memory = torch.full((3,), -1.0)
    p = nn.Parameter(torch._neg_view(memory))
    opt = rf.FusedSGD([p], lr=1.0, momentum=0.5, average=rf.ema(0.5), flatten=flatten)
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
    assert torch.equal(p, torch.full((3,), -1.5))
    with opt.averaged():
        assert torch.equal(p, torch.full((3,), -0.75))
    assert torch.equal(p, torch.full((3,), -1.5))


def test_assigned_state_may_be_lazily_negated() -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = rf.FusedSGD([p], lr=1.0, momentum=0.5)
    p.grad = torch.ones(3)
    opt.step()
    opt.state[p]["momentum_buffer"] = torch._neg_view(torch.full((3,), 2.0))
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.zeros(3))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["momentum_buffer"] = torch._neg_view(torch.full((3,), 2.0))
    opt.load_state_dict(saved)
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.zeros(3))


def test_replicas_that_are_lazily_negated_are_pulled_to_the_mean() -> None:
    a, b = torch.full((3,), 1.0), torch._neg_view(torch.full((3,), -3.0))
    rf.pull_([[a], [b]], alpha=1.0)
    assert torch.equal(a, torch.full((3,), 2.0)) and torch.equal(b, a)


def test_the_gradients_of_a_users_own_class_are_its_own() -> None:
    """`grad` and `is_neg` may be a class's own; what is found is what its code says."""

    class Own(torch.Tensor):
        @property
        def grad(self) -> Tensor:  # type: ignore[override]
            return torch._neg_view(torch.ones(3))

    plain = nn.Parameter(torch.zeros(3))
    own: Any = torch.zeros(3).as_subclass(Own)
    grads, absent, present, negated = doors.gradients([plain, own])
    assert grads[0] is None and grads[1] is not None and torch.equal(grads[1], -torch.ones(3))
    assert (absent, present, negated) == (True, True, True)
    assert doors.gradients([plain])[1:] == (True, False, False)
    assert doors.gradients([])[1:] == (False, False, False)
    plain.grad = torch.ones(3)
    assert doors.gradients([plain])[1:] == (False, True, False)


class Asked(Tensor):
    """Gradients of a user's class, which says itself whether it is negated."""

    asked = 0

    def is_neg(self) -> bool:
        Asked.asked += 1
        return super().is_neg()


def test_a_gradient_of_a_users_class_is_asked_by_its_own_method() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = rf.FusedSGD([p], lr=0.5)
    p.grad = torch.ones(3).as_subclass(Asked)
    opt.step()
    assert p.tolist() == [0.5] * 3 and Asked.asked > 0
