"""Threads of Python, torch's own threads, forked and spawned processes: the bits do not change."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, policy_for
from rules import RULES
from started import environment
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import _C

HERE = Path(__file__).resolve().parent
LARGE = 100_003  # elements: a step of so many takes torch's thread pool, in unequal parts

KINDS: dict[str, Callable[..., Any]] = {
    "ema": partial(RULES["momentum"].made, average=rf.ema(0.5)),
    "explicit": partial(RULES["rsgdm explicit"].made, average=rf.mean(start=2)),
    "lookahead": partial(RULES["decay-maximize"].made, average=rf.lookahead(3)),
    "rbwa": partial(RULES["momentum"].made, average=rf.rbwa(2, 1)),
}


def parameter(seed: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1 + seed, LARGE, dtype=torch.float64).to(dtype))


def train(opt: Any, p: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        p.grad = (p.detach() + step) * 0.1
        opt.step()


def everything(opt: Any, p: nn.Parameter) -> list[Tensor]:
    """Weights, state and averaged weights."""
    with opt.averaged():
        averaged = p.detach().clone()
    return [averaged, p.detach().clone(), *(value.clone() for value in opt.state[p].values())]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), i


# ---- threads of Python -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizers_stepped_by_threads_at_once_do_not_disturb_each_other(
    dtype: torch.dtype, count: int
) -> None:
    together = threading.Barrier(count)

    def run(seed: int, wait: bool) -> list[Tensor]:
        p = parameter(seed, dtype)
        opt = list(KINDS.values())[seed]([p])
        seen = []
        for step in range(1, 9):
            if wait:
                together.wait()
            train(opt, p, step, step)
            seen += everything(opt, p)
        return seen

    expected = [run(seed, False) for seed in range(count)]
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, range(count), [True] * count))
    for ours, alone in zip(results, expected, strict=True):
        assert_same_bits(ours, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_may_pass_from_thread_to_thread(kind: str) -> None:
    ends = []
    for threads in (1, 4):
        p = parameter(0)
        with ThreadPoolExecutor(1) as builder:
            opt = builder.submit(KINDS[kind], [p]).result()
        for first in range(1, 9, 8 // threads):
            with ThreadPoolExecutor(1) as pool:  # a new thread each time; the old one is gone
                pool.submit(train, opt, p, first, first + 8 // threads - 1).result()
        with ThreadPoolExecutor(1) as pool:
            ends.append(pool.submit(everything, opt, p).result())
    assert_same_bits(*ends)


def test_other_threads_of_python_go_on_during_a_long_step() -> None:
    p = nn.Parameter(torch.zeros(2_000_000, dtype=torch.float16))
    p.grad = torch.ones_like(p)
    opt = rf.RSGDM([p], difference="explicit")
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    def ticked_in_the_middle() -> bool:
        start = time.perf_counter()
        opt.step()
        quarter = (time.perf_counter() - start) / 4
        return any(start + quarter < t < start + 3 * quarter for t in ticks)

    threads, capability = torch.get_num_threads(), _C.cpu_capability()
    other = threading.Thread(target=tick)
    other.start()
    try:
        torch.set_num_threads(1)
        _C.set_cpu_capability("baseline")  # which takes a tenth of a second for it
        opt.step()
        assert any(ticked_in_the_middle() for _ in range(20))  # a busy machine may starve one
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_capability(capability)
        done.set()
        other.join()


# ---- torch's threads ---------------------------------------------------------------------------


CASES = list(itertools.product(RULES, ["none", "rbwa", "mean-write-back", "same-dtype"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_torchs_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    ends = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            seen = []
            for rule, average in CASES:
                policy = policy_for(average, rule, dtype)
                if not RULES[rule].takes(policy):
                    continue
                p = parameter(1, dtype)
                opt = RULES[rule].made([p], average=policy)
                train(opt, p, 1, 4)
                seen += everything(opt, p)
            ends.append(seen)
    finally:
        torch.set_num_threads(before)
    for seen in ends[1:]:
        assert_same_bits(seen, ends[0])


# ---- processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def among_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scenarios of processes.py came to; those that hung are missing."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    file = tmp_path_factory.mktemp("processes") / "answers"
    subprocess.run(
        [sys.executable, HERE / "processes.py", file],
        env=environment(),
        timeout=150,  # longer than its own alarm
        check=False,
    )
    answers: dict[str, Any] = pickle.loads(file.read_bytes())
    return answers


def test_a_forked_child_steps_on_one_thread_and_leaves_the_parents_weights_alone(
    among_processes: dict[str, Any],
) -> None:
    seen = among_processes["a_fork_on_one_thread"]
    assert seen["child"] == seen["parent"] != seen["before"]
    assert seen["after"] == seen["before"]


def test_a_forked_child_steps_a_small_model_on_any_number_of_threads(
    among_processes: dict[str, Any],
) -> None:
    seen = among_processes["a_fork_of_a_small_model"]
    assert seen["child"] == seen["parent"]


def test_a_loaders_forked_workers_do_not_disturb_the_training(
    among_processes: dict[str, Any],
) -> None:
    seen = among_processes["workers_of_a_loader"]
    assert seen["0"] == seen["2"]


def test_two_processes_step_a_model_in_shared_memory(among_processes: dict[str, Any]) -> None:
    seen = among_processes["hogwild"]
    assert seen["exits"] == [0, 0] and seen["in place"]
    assert all(seen["own"])  # what one process steps alone has the bits of a run alone
    assert seen["both"]  # steps may be lost where two write at once, as in torch


READ_ONLY = """
import mmap, sys, warnings
import torch
from torch import nn
import rbwa_fused as rf
from rbwa_fused.engine import backends

if sys.argv[1] == "cuda":
    import emulation

    emulated = emulation.backend()
    backends.choose = lambda name, device: emulated

warnings.simplefilter("ignore", UserWarning)  # torch's, of memory that is not writable
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for kept, masters in ((None, False), (dtype, False), (None, True)):
        memory = mmap.mmap(-1, 4 * mmap.PAGESIZE, prot=mmap.PROT_READ)
        frozen = nn.Parameter(torch.frombuffer(memory, dtype=dtype))
        trained = nn.Parameter(torch.ones(3, dtype=dtype))
        average = rf.Average(rf.Ema(0.5), dtype=None if kept is None else kept)
        opt = rf.FusedSGD([frozen, trained], 0.1, average=average, flatten=False,
                          master_weights=masters, backend=sys.argv[1])
        for _ in range(3):
            trained.grad = torch.ones_like(trained)
            opt.step()
        assert not opt.state[frozen]["average"].any()
"""


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_weights_that_are_only_sampled_are_not_written(backend: str) -> None:
    """Another process may write them at that time, and its step would be lost."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, backend],
        env=environment(HERE.parent, TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)  # -11: killed for writing


def test_an_optimizer_sent_to_a_spawned_process_goes_on_there(
    among_processes: dict[str, Any],
) -> None:
    seen = among_processes["a_spawned_process"]
    assert seen["child"] == seen["alone"]
    assert seen["weights"] == seen["alone"][0]  # torch shares what it sends
