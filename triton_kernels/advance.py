"""The counters on the device: csrc/policy.h mirrored, for steps that the host does not count."""

# Constants are in capitals.
# ruff: noqa: N803
# mypy: ignore-errors

from __future__ import annotations

import math

import triton
import triton.language as tl

from rbwa_fused.ramp import Count, Exponential, Inverse
from rbwa_fused.rules import Sampling
from rbwa_fused.weights import Algorithm2, Cosine, Ema, HalfLife, PowerEma, Table

from .schedule import move_on

SAMPLING_COLUMNS = tl.constexpr(len(Sampling._fields))
POLICY_COLUMNS = tl.constexpr(10)  # see csrc/policy.h
NUMBERS = tl.constexpr(6)  # where a policy's weight begins
EMA = tl.constexpr(Ema.on_device)  # kinds of weight; 0 is none, 1 the mean
ALGORITHM2 = tl.constexpr(Algorithm2.on_device)
HALF_LIFE = tl.constexpr(HalfLife.on_device)
COUNT_RAMP = tl.constexpr(Count.on_device)
INVERSE_RAMP = tl.constexpr(Inverse.on_device)
EXPONENTIAL_RAMP = tl.constexpr(Exponential.on_device)
POWER_EMA = tl.constexpr(PowerEma.on_device)
COSINE = tl.constexpr(Cosine.on_device)
TABLE = tl.constexpr(Table.on_device)
PI = tl.constexpr(math.pi)


@triton.jit
def number(policy, column, mask):
    """An integer of a policy."""
    return tl.load(policy + column, mask=mask, other=0).to(tl.int64)


@triton.jit
def log1p(x):
    """Of x > -1, as exact as the logarithm (Kahan): Triton has none of its own."""
    u = 1.0 + x
    loses = u == 1.0
    return tl.where(loses, x, tl.log(u) * (x / tl.where(loses, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """Of x <= 0, as exact as the exponential (Kahan)."""
    u = tl.exp(x)
    plain = (u == 1.0) | (u == 0.0)
    exact = (u - 1.0) * (x / tl.log(tl.where(plain, 0.5, u)))
    return tl.where(plain, tl.where(u == 0.0, -1.0, x), exact)


@triton.jit
def ramp(kind, policy, n, mask):
    """The weights of ramp.py. Of what is no ramp any numbers will do, here and below."""
    cap = tl.load(policy + NUMBERS, mask=mask, other=0)
    most = tl.load(policy + NUMBERS + 1, mask=mask, other=0)
    third = tl.load(policy + NUMBERS + 2, mask=mask, other=1)
    power = tl.load(policy + NUMBERS + 3, mask=mask, other=1)
    third = tl.where((kind == INVERSE_RAMP) | (kind == EXPONENTIAL_RAMP), third, 1.0)
    power = tl.where(kind == INVERSE_RAMP, power, 1.0)
    w = 9.0 / (10.0 + n)
    w = tl.where(kind == INVERSE_RAMP, tl.exp(-power * log1p(n / third)), w)
    w = tl.where(kind == EXPONENTIAL_RAMP, cap + (1.0 - cap) * tl.exp(-n / third), w)
    w = tl.where(w < cap, cap, w)
    return tl.where(most < w, most, w)


@triton.jit
def power_ema(kind, policy, step, mask):
    """PowerEma of weights.py."""
    origin = tl.load(policy + 1, mask=mask, other=0)
    every = tl.load(policy + 2, mask=mask, other=1)
    gamma = tl.load(policy + NUMBERS, mask=mask, other=0)
    start = tl.load(policy + NUMBERS + 1, mask=mask, other=0)
    past = (kind == POWER_EMA) & (step - every > origin)
    passed = tl.where(past, every, 1.0) / tl.where(past, step - start, 2.0)
    return tl.where(past, -expm1((gamma + 1.0) * log1p(-passed)), 1.0)


@triton.jit
def cosine(kind, policy, n, mask):
    """Cosine of weights.py."""
    samples = tl.load(policy + NUMBERS, mask=mask, other=1)
    samples = tl.where(kind == COSINE, samples, 1.0)
    j = tl.minimum(n + 1.0, samples)
    twice = 2.0 * samples
    whole = tl.sin(j / twice * PI)
    return tl.sin((2.0 * j - 1.0) / twice * PI) * tl.sin(1.0 / twice * PI) / (whole * whole)


@triton.jit
def table(kind, policies, policy, n, mask):
    """Table of weights.py: the weights stand behind all policies."""
    length = number(policy, NUMBERS, mask)
    first = number(policy, NUMBERS + 1, mask)
    begins = tl.load(policy + 4, mask=mask, other=0)
    at = tl.minimum(n - (begins < float("inf")).to(tl.int64), length - 1)
    return tl.load(policies + first + at, mask=mask & (kind == TABLE) & (at >= 0), other=0)


@triton.jit
def weight_of(kind, policies, policy, n, step, mask):
    """Weight of the sample taken after a step when n samples are averaged already."""
    first = tl.load(policy + NUMBERS, mask=mask, other=0)
    steps_per_epoch = tl.maximum(number(policy, NUMBERS, mask & (kind == ALGORITHM2)), 1)
    start_epoch = number(policy, NUMBERS + 1, mask & (kind == ALGORITHM2))
    epochs = (step - 1) // steps_per_epoch
    batch = (step - 1) % steps_per_epoch
    k = tl.where(kind == ALGORITHM2, (epochs + 1 - start_epoch) * batch, n)
    w = 1.0 / (k + 1).to(tl.float64)
    count = n.to(tl.float64)
    w = tl.where(kind == EMA, 1.0 - first, w)
    w = tl.where(kind == HALF_LIFE, first, w)
    ramps = (kind == COUNT_RAMP) | (kind == INVERSE_RAMP) | (kind == EXPONENTIAL_RAMP)
    w = tl.where(ramps, ramp(kind, policy, count, mask), w)
    w = tl.where(kind == POWER_EMA, power_ema(kind, policy, step.to(tl.float64), mask), w)
    w = tl.where(kind == COSINE, cosine(kind, policy, count, mask), w)
    w = tl.where(kind == TABLE, table(kind, policies, policy, n, mask), w)
    return tl.where(n == 0, 1.0, w)


@triton.jit
def sample(policies, policy, n, step, mask):
    """`Sampler.update` in engine/samplers.py, for all samplers.

    Returns the samples averaged after the step, and of the step w, whether a sample is due, the
    average starts at theta, and is written back.
    """
    kind = number(policy, 0, mask)
    past = step - number(policy, 1, mask)  # origin
    every = tl.maximum(number(policy, 2, mask), 1)
    write_back_every = number(policy, 3, mask)
    begins = tl.load(policy + 4, mask=mask, other=0)
    stop = tl.load(policy + 5, mask=mask, other=0)

    current = (kind != 0) & (n == 0) & (step.to(tl.float64) > begins)
    n = tl.where(current, 1, n)
    due = (kind != 0) & (past > 0) & (past % every == 0) & (step.to(tl.float64) <= stop)
    written = (write_back_every > 0) & (past % tl.maximum(write_back_every, 1) == 0)
    kind = tl.where(due, kind, 0)  # a weight that nobody asks for is kept quiet
    w = tl.where(due, weight_of(kind, policies, policy, n, step, mask), 0.0)
    return n + due.to(tl.int64), w, due, current, due & written


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
    n, _, _, _, _ = sample(policies, policy, n, step, mask)
    tl.store(counts, step)
    tl.store(counts + 1 + sampler, n, mask=mask)

    _, w, due, current, write_back = sample(policies, policy, n, step + 1, mask)
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
