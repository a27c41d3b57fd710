"""The counters on the device: csrc/policy.h mirrored, for steps that the host does not count."""

# Constants are in capitals.
# ruff: noqa: N803
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from rbwa_fused.average import Ema, Mean
from rbwa_fused.rules import Sampling

from .schedule import move_on

SAMPLING_COLUMNS = tl.constexpr(len(Sampling._fields))
POLICY_COLUMNS = tl.constexpr(7)  # see csrc/policy.h
MEAN = tl.constexpr(Mean.on_device)  # kinds of weight; 0 is none, 3 Algorithm2
EMA = tl.constexpr(Ema.on_device)


@triton.jit
def number(policy, column, mask):
    """An integer of a policy."""
    return tl.load(policy + column, mask=mask, other=0).to(tl.int64)


@triton.jit
def sample(policy, n, step, mask):
    """`Sampler.update` in engine/samplers.py, and each weight's `of`, for all samplers.

    Returns the samples averaged after the step, and of the step w, whether a sample is due, the
    average starts at theta, and is written back.
    """
    kind = number(policy, 0, mask)
    past = step - number(policy, 1, mask)  # origin
    every = tl.maximum(number(policy, 2, mask), 1)
    write_back_every = number(policy, 3, mask)
    decay = tl.load(policy + 5, mask=mask, other=0)  # Ema's
    steps_per_epoch = tl.maximum(number(policy, 5, mask), 1)  # Algorithm2's
    start_epoch = number(policy, 6, mask)

    begins = tl.load(policy + 4, mask=mask, other=0)
    current = (kind != 0) & (n == 0) & (step.to(tl.float64) > begins)
    n = tl.where(current, 1, n)
    due = (kind != 0) & (past > 0) & (past % every == 0)
    written = (write_back_every > 0) & (past % tl.maximum(write_back_every, 1) == 0)

    epochs = (step - 1) // steps_per_epoch
    batch = (step - 1) % steps_per_epoch
    k = tl.where(kind == MEAN, n, (epochs + 1 - start_epoch) * batch)
    # Where nothing is due, k may be anything; 1 keeps the division quiet.
    w = 1.0 / tl.where(due, k + 1, 1).to(tl.float64)
    w = tl.where(kind == EMA, 1.0 - decay, w)
    w = tl.where(n == 0, 1.0, w)
    return n + due.to(tl.int64), tl.where(due, w, 0.0), due, current, due & written


@triton.jit
def pack(samplings, sampler, w, due, current, write_back, mask):
    """A sampler's two rows: averages in a buffer, and averages that are the parameter itself."""
    dtype: tl.constexpr = samplings.dtype.element_ty
    row = samplings + 2 * sampler * SAMPLING_COLUMNS
    tl.store(row, tl.full(w.shape, 1, dtype), mask=mask)
    tl.store(row + 1, w.to(dtype), mask=mask)
    tl.store(row + 2, (due | current).to(dtype), mask=mask)
    tl.store(row + 3, current.to(dtype), mask=mask)
    tl.store(row + 4, write_back.to(dtype), mask=mask)
    row += SAMPLING_COLUMNS
    tl.store(row, tl.where(due, w, 1.0).to(dtype), mask=mask)
    tl.store(row + 1, tl.zeros(w.shape, dtype), mask=mask)
    tl.store(row + 2, tl.zeros(w.shape, dtype), mask=mask)
    tl.store(row + 3, tl.zeros(w.shape, dtype), mask=mask)
    tl.store(row + 4, tl.zeros(w.shape, dtype), mask=mask)


@triton.jit
def count(counts, policies, samplings32, samplings64, samplers, SAMPLERS: tl.constexpr):
    """Counts the step just taken and packs the samplings of the next."""
    sampler = tl.arange(0, SAMPLERS)
    mask = sampler < samplers
    policy = policies + sampler * POLICY_COLUMNS
    step = tl.load(counts) + 1
    n = tl.load(counts + 1 + sampler, mask=mask, other=0)
    n, _, _, _, _ = sample(policy, n, step, mask)
    tl.store(counts, step)
    tl.store(counts + 1 + sampler, n, mask=mask)

    _, w, due, current, write_back = sample(policy, n, step + 1, mask)
    pack(samplings32, sampler, w, due, current, write_back, mask)
    pack(samplings64, sampler, w, due, current, write_back, mask)


@triton.jit
def grow(marks, segment, segments):
    """Makes segments older by what the step just taken has marked."""
    mask = segment < segments
    age = tl.load(marks + 2 * segment, mask=mask, other=0)
    age += tl.load(marks + 2 * segment + 1, mask=mask, other=0)
    tl.store(marks + 2 * segment, age, mask=mask)
    tl.store(marks + 2 * segment + 1, tl.zeros(segment.shape, tl.int32), mask=mask)


@triton.jit(do_not_specialize=["samplers", "segments", "groups"])
def advance_kernel(
    counts,
    policies,
    samplings32,
    samplings64,
    marks,
    found_inf,
    schedules,
    samplers,
    segments,
    groups,
    SAMPLERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the step just taken, if it was; see `Sampler` in engine/samplers.py.

    The first program counts and the others advance the marks, by functions of their own: what both
    branches of an `if` assign must have one shape. One warp runs it: all lanes have read a counter
    when one of them writes it.
    """
    taken = True
    if found_inf is not None:
        taken = tl.load(found_inf) == 0
    if taken:
        program = tl.program_id(0)
        if program == 0:
            count(counts, policies, samplings32, samplings64, samplers, SAMPLERS)
        else:
            number = (program - 1) * BLOCK + tl.arange(0, BLOCK)
            grow(marks, number, segments)
            if schedules is not None:
                move_on(schedules, number, groups)
