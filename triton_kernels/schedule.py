"""What a schedule-free group's own count makes of its row: csrc/schedule.h mirrored, for steps that
the host does not count."""

# Constants are in capitals.
# ruff: noqa: N803
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from rbwa_fused.progress import COUNTED as COUNTED_KEYS

from .update import PREPARED, SCHEDULE_COLUMNS, power

COUNTED = tl.constexpr(len(COUNTED_KEYS))  # what a step leaves stands behind it
SETTING_COLUMNS = tl.constexpr(6)


@triton.jit
def to_the(base, exponent):
    """A power. Small whole exponents and halves are as on the host; what others make is rounded
    otherwise in the last places."""
    size = tl.abs(exponent)
    whole = tl.floor(size)
    half = size - whole == 0.5
    exact = (size <= 16) & (half | (size == whole))
    result = power(base, tl.where(exact, whole, 0).to(tl.int64), 5)
    result = tl.where(half, result * tl.sqrt(base), result)
    inverse = exponent < 0
    result = tl.where(inverse, 1 / tl.where(inverse, result, 1), result)
    # Of what is exact any other number will do; 1 keeps the logarithm quiet.
    return tl.where(exact, result, tl.exp2(exponent * tl.log2(tl.where(exact, 1, base))))


@triton.jit(do_not_specialize=["groups"], do_not_specialize_on_alignment=["settings", "schedules"])
def prepare_kernel(settings, schedules, groups, BLOCK: tl.constexpr):
    """Makes the numbers of the step to come, and what it leaves, for all groups."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = group < groups
    said = settings + group * SETTING_COLUMNS
    taken = tl.load(said, mask=mask, other=0)
    beta = tl.load(said + 1, mask=mask, other=0)
    warmup_steps = tl.load(said + 2, mask=mask, other=0)
    r = tl.load(said + 3, mask=mask, other=0)
    weight_lr_power = tl.load(said + 4, mask=mask, other=0)
    eta = tl.load(said + 5, mask=mask, other=0)
    at = schedules + group * SCHEDULE_COLUMNS
    k = tl.load(at, mask=mask, other=0)
    weight_sum = tl.load(at + 1, mask=mask, other=0)
    lr_max = tl.load(at + 2, mask=mask, other=0)
    scheduled_lr = tl.load(at + 3, mask=mask, other=0)

    warms = k < warmup_steps
    # Where it does not warm up, any divisor will do; 1 keeps the division quiet.
    eta = tl.where(warms, eta * ((k + 1) / tl.where(warms, warmup_steps, 1)), eta)
    largest = tl.where(lr_max > eta, lr_max, eta)
    weight = to_the(k + 1, r) * to_the(largest, weight_lr_power)
    total = weight_sum + weight
    c = tl.where(total != 0, weight / tl.where(total != 0, total, 1), 0)

    taken = taken != 0
    left = at + COUNTED
    tl.store(left, tl.where(taken, k + 1, k), mask=mask)
    tl.store(left + 1, tl.where(taken, total, weight_sum), mask=mask)
    tl.store(left + 2, tl.where(taken, largest, lr_max), mask=mask)
    tl.store(left + 3, tl.where(taken, eta, scheduled_lr), mask=mask)
    prepared = at + PREPARED
    tl.store(prepared, -eta, mask=mask)
    tl.store(prepared + 1, eta * (1 - c) * (1 - beta), mask=mask)
    tl.store(prepared + 2, -c, mask=mask)
    tl.store(prepared + 3, c, mask=mask)


@triton.jit
def move_on(schedules, group, groups):
    """Makes groups what the step just taken leaves of them."""
    mask = group < groups
    at = schedules + group * SCHEDULE_COLUMNS
    for column in tl.static_range(COUNTED):
        tl.store(at + column, tl.load(at + COUNTED + column, mask=mask), mask=mask)
