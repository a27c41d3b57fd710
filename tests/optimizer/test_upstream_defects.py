"""Defects of torch.optim.SGD(fused=True) that a drop-in must not inherit.

Each is a scenario that any optimizer with SGD's arguments can be run through. FusedSGD passes all;
torch's own fails those that HAS names for the installed version, and so tells when it is mended.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from bounds import ulps
from torch import Tensor, nn

import rbwa_fused as rf

Make = Callable[..., Any]
MINOR = ".".join(torch.__version__.split(".")[:2])


def values(*shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape) / 8


def an_overflow_on_the_first_step_leaves_no_trace(make: Make) -> None:
    """The buffer of a skipped first step was never written, and counted as valid afterwards."""
    p = nn.Parameter(torch.zeros(19))
    opt = make([p], lr=1.0, momentum=0.5, dampening=0.5)
    p.grad = torch.full((19,), torch.inf)
    opt.grad_scale, opt.found_inf = None, torch.ones(())
    opt.step()
    del opt.grad_scale, opt.found_inf
    p.grad = values(19)
    opt.step()
    assert torch.equal(p.detach(), -values(19))  # the first momentum is the gradient, undamped


def an_overflow_on_two_devices_skips_the_step(make: Make) -> None:
    """A scaler adds up what each device found; a sum of 2 was no overflow."""
    p = nn.Parameter(torch.zeros(5))
    opt = make([p], lr=1.0)
    p.grad = values(5)
    opt.grad_scale, opt.found_inf = None, torch.tensor(2.0)
    opt.step()
    assert p.tolist() == [0.0] * 5


def a_layer_may_be_thawed_after_others_have_momentum(make: Make) -> None:
    """Some parameters with a buffer and some without ended in a TypeError."""
    first, late = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    opt = make([first, late], lr=1.0, momentum=0.5)
    for _ in range(2):
        first.grad = values(3)
        opt.step()
        late.grad = values(4)
    assert torch.equal(first.detach(), -2.5 * values(3))
    assert torch.equal(late.detach(), -values(4))


def momentum_saved_in_another_memory_format_is_not_misread(make: Make) -> None:
    """The CPU kernel walked memory, whatever strides the buffer and the parameter had."""
    ends = []
    for format_ in (torch.contiguous_format, torch.channels_last):
        saved = nn.Parameter(torch.zeros(2, 3, 4, 5))
        opt = make([saved], lr=1.0, momentum=0.5)
        saved.grad = values(2, 3, 4, 5)
        opt.step()
        p = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=format_))
        resumed = make([p], lr=1.0, momentum=0.5)
        resumed.load_state_dict(deepcopy(opt.state_dict()))
        p.grad = torch.zeros_like(p)
        resumed.step()
        ends.append(p.detach().contiguous())
    assert torch.equal(*ends)


def sixteen_bit_parameters_move(make: Make, dtype: torch.dtype) -> None:
    """The CPU's vector blocks computed the new parameter and did not store it."""
    p = nn.Parameter(torch.zeros(67, dtype=dtype))
    opt = make([p], lr=1.0, momentum=0.5)
    p.grad = values(67).to(dtype)
    opt.step()
    assert ulps(p.detach(), -values(67).to(dtype)) == 0


def a_float32_average_of_sixteen_bits_stays_float32(make: Make) -> None:
    """`load_state_dict` casts floating state to the parameter's dtype."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = make([p], lr=0.5)
    p.grad = torch.ones_like(p)
    opt.step()
    fine = torch.tensor([1.0, 1.001, 1.002])  # bfloat16 has 1 and 1.0078125
    opt.state[p].setdefault("average", torch.zeros(3)).copy_(fine)
    q = nn.Parameter(p.detach().clone())
    resumed = make([q], lr=0.5)
    resumed.load_state_dict(deepcopy(opt.state_dict()))
    assert torch.equal(resumed.state[q]["average"], fine)


def a_loaded_state_dict_is_not_stepped(make: Make) -> None:
    """Where dtype and device agree, the loaded tensors are the caller's own."""
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    opt, other = (make([one], lr=1.0, momentum=0.5) for one in (p, q))
    p.grad = values(3)
    opt.step()
    kept = opt.state_dict()
    other.load_state_dict(kept)
    q.grad = values(3)
    other.step()
    assert torch.equal(kept["state"][0]["momentum_buffer"], values(3))


SCENARIOS: dict[str, Callable[[Make], None]] = {
    "first overflow": an_overflow_on_the_first_step_leaves_no_trace,
    "overflow of two": an_overflow_on_two_devices_skips_the_step,
    "thawed layer": a_layer_may_be_thawed_after_others_have_momentum,
    "strides": momentum_saved_in_another_memory_format_is_not_misread,
    "bfloat16": partial(sixteen_bit_parameters_move, dtype=torch.bfloat16),
    "float16": partial(sixteen_bit_parameters_move, dtype=torch.float16),
    "float32 average": a_float32_average_of_sixteen_bits_stays_float32,
    "aliasing": a_loaded_state_dict_is_not_stepped,
}

# Every scenario was run under each of these versions.
KNOWN = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
HAS: dict[str, tuple[str, ...]] = {
    "first overflow": KNOWN,
    "overflow of two": KNOWN,
    "thawed layer": KNOWN,
    "strides": KNOWN,
    "bfloat16": ("2.10", "2.11", "2.12", "2.13"),
    "float16": ("2.10", "2.11", "2.12", "2.13"),
    "float32 average": KNOWN,
    "aliasing": KNOWN,
}

OURS: dict[str, dict[str, Any]] = {
    "as built": {},
    "not flattened": {"flatten": False},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_fused_sgd_has_none_of_them(name: str, options: dict[str, Any]) -> None:
    SCENARIOS[name](partial(rf.FusedSGD, average=rf.ema(0.5), **options))


@pytest.mark.parametrize("name", SCENARIOS)
def test_torchs_fused_sgd_has_it_still(name: str) -> None:
    if MINOR not in KNOWN:
        pytest.skip(f"torch {MINOR} has not been looked at; {KNOWN[-1]} was the last")
    make = partial(torch.optim.SGD, fused=True)
    if MINOR in HAS[name]:
        with pytest.raises((AssertionError, TypeError)):
            SCENARIOS[name](make)
    else:
        SCENARIOS[name](make)


@pytest.mark.parametrize("name", ["thawed layer", "strides", "bfloat16", "float16"])
def test_the_scenarios_ask_for_no_more_than_torchs_for_loop_does(name: str) -> None:
    SCENARIOS[name](partial(torch.optim.SGD, foreach=False))
