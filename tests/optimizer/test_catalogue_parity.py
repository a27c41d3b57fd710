"""Equal results under PyTorch's catalogue: torch's for-loop, dtypes, devices, sizes, defaults."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from bounds import ulps
from catalogue import (
    COUNTERPARTS,
    IMPLEMENTATIONS,
    INFOS,
    OF_TORCHS,
    Problem,
    inputs,
    instantiate,
    same_bits,
    split,
    trained,
)
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase, parametrize

import rbwa_fused as rf

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def network(device: str, dtype: torch.dtype) -> tuple[nn.Sequential, list[Tensor]]:
    """Two layers to freeze and thaw, and beside them a parameter of no dimension."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    net.to(device, dtype)
    alone = nn.Parameter(torch.ones((), device=device, dtype=dtype))
    alone.grad = torch.full_like(alone, 0.5)
    return net, [*net.parameters(), alone]


def feed(net: nn.Sequential, step: int) -> None:
    """Gradients of a step: none at all at 2, none for the frozen second layer at 3 and 4."""
    p = next(net.parameters())
    net.zero_grad()
    net[2].requires_grad_(step not in (3, 4))
    if step != 2:
        x = torch.arange(1, 7, dtype=torch.float64).reshape(3, 2).to(p.device, p.dtype) / 10
        net(x).sum().backward()


class TestParity(TestCase):
    @optims(OF_TORCHS, dtypes=DTYPES)
    def test_it_steps_as_torchs_for_loop_does(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            group, alone = split(kwargs)
            if "average" in group:
                continue
            nets, params = zip(*(network(device, dtype) for _ in range(2)), strict=True)
            how: dict[str, bool] = {"foreach": False}
            if "betas" in optim_info.optim_cls(params[1]).defaults and dtype.itemsize == 2:
                # The loop's root of a 16-bit v is 0 where that is small, and its step infinite.
                how = {"fused": True}
                alone["state_dtype"] = "param"
            loop = COUNTERPARTS[optim_info.optim_cls](params[0], **group, **how)
            opt = optim_info.optim_cls(params[1], **deepcopy(group), **alone)
            for step in range(7):
                for net, one in zip(nets, (loop, opt), strict=True):
                    feed(net, step)
                    one.step()
                for p, q in zip(*params, strict=True):
                    held = loop.state.get(p, {})
                    assert held.keys() == opt.state.get(q, {}).keys()
                    for expected, actual in [(p, q), *((held[k], opt.state[q][k]) for k in held)]:
                        # From one state the loop rounds up to five times in the tensor's dtype;
                        # the kernel does so in float32 at least, and once more for 16 bits.
                        assert ulps(actual.detach(), expected.detach()) <= 3
                        with torch.no_grad():
                            actual.copy_(expected)

    @optims(INFOS, dtypes=DTYPES)
    def test_every_implementation_gives_the_same_bits(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device, flatten=True):
            runs = []
            for implementation in IMPLEMENTATIONS:
                net, params = network(device, dtype)
                opt = optim_info.optim_cls(params, **{**deepcopy(kwargs), **implementation})
                for step in range(7):
                    feed(net, step)
                    opt.step()
                runs.append([params, [opt.state.get(p, {}) for p in params]])
            for run in runs[1:]:
                same_bits(runs[0], run)

    @optims(INFOS)
    def test_dtypes_and_devices_in_one_optimizer_are_stepped_as_each_alone(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        kinds = list(itertools.product(DTYPES, sorted({device, "cpu"})))
        for kwargs in inputs(optim_info, device):
            together = [Problem(where, kind) for kind, where in kinds]
            alone = [Problem(where, kind) for kind, where in kinds]
            params = [p for problem in together for p in problem.params]
            opt = optim_info.optim_cls(params, **deepcopy(kwargs))
            own = [optim_info.optim_cls(one.params, **deepcopy(kwargs)) for one in alone]
            for _ in range(3):
                for problem in together:
                    problem.loss()
                opt.step()
                for problem, one in zip(alone, own, strict=True):
                    one.step(problem.loss)
            expected = [p for problem in alone for p in problem.params]
            same_bits(params, expected)

    @optims(INFOS, dtypes=[torch.complex64])
    def test_complex_parameters_are_refused(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        params = [torch.randn(2, device=device), torch.randn(2, dtype=dtype, device=device)]
        with pytest.raises(TypeError, match=r"parameter 1 has dtype torch\.complex64"):
            optim_info.optim_cls(params)

    @optims(INFOS)
    def test_meta_parameters_are_refused_and_taken_once_they_have_memory(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        with torch.device("meta"):
            net = nn.Linear(2, 3)
        real = nn.Parameter(torch.ones(3, device=device))
        with pytest.raises(ValueError, match="parameter 1 is on the meta device"):
            optim_info.optim_cls([real, *net.parameters()])
        net.to_empty(device=device)
        for p in net.parameters():
            nn.init.ones_(p)
            p.grad = torch.ones_like(p)
        modes = hasattr(optim_info.optim_cls, "eval")  # and no momentum that may be 0
        has_momentum = "momentum" in optim_info.optim_cls([real]).defaults and not modes
        options = {"momentum": 0} if has_momentum else {}
        opt = optim_info.optim_cls(net.parameters(), lr=0.5, **options)
        if modes:
            opt.train()
        opt.step()
        for p in net.parameters():
            assert ulps(p.detach(), torch.full_like(p, 0.5)) <= 2

    @parametrize("default", [torch.float64, torch.float16])
    @optims(INFOS)
    def test_the_default_dtype_changes_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, default: torch.dtype
    ) -> None:
        for kwargs in inputs(optim_info, device):
            expected, _ = trained(optim_info, kwargs, device)
            torch.set_default_dtype(default)
            try:
                problem, opt = trained(optim_info, kwargs, device)
            finally:
                torch.set_default_dtype(torch.float32)
            same_bits(problem.params, expected.params)
            kept = {value.dtype for held in opt.state.values() for value in held.values()}
            assert kept <= {torch.float32}

    @optims(INFOS)
    def test_the_default_device_changes_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for kwargs in inputs(optim_info, device):
            expected, theirs = trained(optim_info, kwargs, device)
            with torch.device("meta"):
                problem, opt = trained(optim_info, kwargs, device, steps=1)
                opt.load_state_dict(deepcopy(opt.state_dict()))
                for _ in range(2):
                    opt.step(problem.loss)
            same_bits(problem.params, expected.params)
            with theirs.averaged(), torch.device("meta"), opt.averaged():
                same_bits(problem.params, expected.params)


instantiate(TestParity, globals())


@contextmanager
def repeated(elements: int, period: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor of many elements whose memory is one small piece, mapped again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    nobody, read_write, shared, private, fixed, anonymous, lazily = 0, 3, 1, 2, 16, 32, 0x4000
    piece = period * dtype.itemsize
    total = -(-elements // period) * piece
    base = libc.mmap(None, total, nobody, private | anonymous | lazily, -1, 0)
    assert base != address(-1).value
    file = os.memfd_create("repeated")
    try:
        os.ftruncate(file, piece)
        for at in range(base, base + total, piece):
            assert libc.mmap(at, piece, read_write, shared | fixed, file, 0) == at
        memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(base)
        yield torch.frombuffer(memory, dtype=dtype)
    finally:
        os.close(file)
        libc.munmap(base, total)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")
def test_every_element_past_2_to_the_31_is_stepped_once() -> None:
    """torch's test steps 2^32 float16 elements, 16 GB with their gradient. Here each element of a
    4 MB piece is stepped by all the indices that lie on it; so it counts them."""
    elements, period, dtype = 2**31 + 4099, 2**21, torch.float16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads would race for the piece
    try:
        with repeated(elements, period, dtype) as theta, repeated(elements, period, dtype) as g:
            index = torch.arange(period)
            g[:period] = 1 + index % 2
            p = nn.Parameter(theta)
            p.grad = g
            rf.FusedSGD([p], lr=2.0**-10, flatten=False).step()
            steps = elements // period + (index < elements % period).int()
            expected = -(1 + index % 2) * steps * 2.0**-10  # each sum on the way is a float16
            assert torch.equal(theta[:period], expected.to(dtype))
            assert theta[-1] == theta[4098]
    finally:
        torch.set_num_threads(threads)
