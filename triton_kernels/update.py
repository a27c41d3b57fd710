"""The device code: `update`, which mirrors csrc/update.h line by line, and the kernels around it.

Compiled without fused multiply-adds, it gives the bits of the CPU kernels. Each program takes one
block of elements, or a constant few in turn: a loaded bound breaks Triton 3.6's interpreter.
"""

# A branch that is decided at compile time needs an `if` of its own, tuples are added by +, and
# constants are in capitals.
# ruff: noqa: N803, RUF005, SIM102, SIM108, SIM109
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from rbwa_fused.rules import COLUMNS, Aging, Kind, Sampling
from rbwa_fused.streams import KEPT

# A segment with momentum comes as one with a decoupled decay of 0 (rules.served_by).
SAMPLE = tl.constexpr(int(Kind.SAMPLE))
PLAIN = tl.constexpr(int(Kind.PLAIN))
DECOUPLED = tl.constexpr(int(Kind.DECOUPLED))
DIFFERENCE = tl.constexpr(int(Kind.DIFFERENCE))
ADAM = tl.constexpr(int(Kind.ADAM))
AMSGRAD = tl.constexpr(int(Kind.AMSGRAD))
SCHEDULE_FREE = tl.constexpr(int(Kind.SCHEDULE_FREE))

ENTRY_COLUMNS = tl.constexpr(10 + len(KEPT))  # of the launch table, see step.py
BEHIND_KEPT = tl.constexpr(3 + len(KEPT))  # theta, g and a stand before
ROW_COLUMNS = tl.constexpr(len(COLUMNS))  # of the coefficient tables
SAMPLING_COLUMNS = tl.constexpr(len(Sampling._fields))
AGING_COLUMNS = tl.constexpr(len(Aging._fields))
SCHEDULE_COLUMNS = tl.constexpr(12)  # of a group, see csrc/schedule.h
PREPARED = tl.constexpr(8)  # where the numbers of the step to come stand


@triton.jit
def followed(master, rounded, param):
    """A parameter that somebody has written to is its own master from then on."""
    return tl.where(rounded == param, master, param)


@triton.jit
def divided(x, by):
    """A quotient, rounded to nearest; in float32 / is an approximation."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, by)
    else:
        return x / by


@triton.jit
def root(x):
    """A square root, rounded to nearest; in float32 sqrt is an approximation."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def toward(w, a, x):
    """Lines (4) and (6): an average and its sample."""
    return tl.where(w == 1, x, tl.where(w != 0, a + w * (x - a), a))


@triton.jit
def update(k, theta, g, m, z, previous, v, v_max, a, KIND: tl.constexpr, AVERAGED: tl.constexpr):
    """Lines (1)-(5): the new theta, m, z, previous, v, v_max, a.

    A zero coefficient drops its term, so that an infinity spreads as far as in torch.optim.SGD.
    """
    s, lambda_, mu, c, kappa, alpha, gamma, delta, nu, q, epsilon, rho, eta = k[:13]
    bias, w, current, write_back = k[13:17]
    x = theta
    if KIND != SAMPLE:
        g = s * g
        if KIND == SCHEDULE_FREE:
            v = nu * v + (q * g) * g  # (2)
            g = divided(g, root(v) * bias + epsilon)
        g = tl.where(lambda_ != 0, g + lambda_ * theta, g)  # (1)
        direction = g
        if KIND >= DECOUPLED:
            m = mu * m + c * g  # (2)
            direction = gamma * m
        if KIND == DECOUPLED or KIND == SCHEDULE_FREE:
            direction = tl.where(alpha != 0, alpha * g + direction, direction)
        if KIND == DIFFERENCE:
            z = mu * z + kappa * (g - previous)  # (2) for the gradient's difference
            previous = g
            direction = direction + delta * z
        if KIND == ADAM or KIND == AMSGRAD:
            v = nu * v + (q * g) * g  # (2)
            largest = v
            if KIND == AMSGRAD:
                v_max = tl.where(v <= v_max, v_max, v)
                largest = v_max
            direction = divided(direction, root(largest) * bias + epsilon)
        if KIND == DECOUPLED or KIND >= ADAM:
            direction = tl.where(rho != 0, direction + rho * theta, direction)
        x = theta - eta * direction  # (3)
    if AVERAGED:
        a = toward(w, tl.where(current, theta, a), x)  # (4)
        x = tl.where(write_back, a, x)  # (5)
    return x, m, z, previous, v, v_max, a


@triton.jit
def lanes(BLOCK: tl.constexpr, FULL: tl.constexpr):
    """The elements of a block. A block that is not full is a matrix of one row, because Triton lays
    out all loads of one shape alike: as vectors, which elements off the alignment cannot be."""
    lane = tl.arange(0, BLOCK)
    if not FULL:
        lane = lane[None, :]
    return lane


@triton.jit
def elements(stream, begin, lane, FULL: tl.constexpr):
    """Pointers to a block of a stream; those of a full block are promised to be aligned."""
    start = stream + begin
    if FULL:
        start = tl.multiple_of(start, 16)  # bytes
    return start + lane


@triton.jit
def load(at, mask, wide, FULL: tl.constexpr):
    """A block, widened to the arithmetic's dtype. What is masked off is never stored."""
    if FULL:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=mask)
    return block.to(wide)


@triton.jit
def store(at, block, mask, FULL: tl.constexpr):
    """Stores a block, rounded to nearest even."""
    if FULL:
        tl.store(at, block.to(at.dtype.element_ty))
    else:
        tl.store(at, block.to(at.dtype.element_ty), mask=mask)


@triton.jit
def step_block(
    k,
    streams,
    unscale,
    begin,
    length,
    sampled,
    further,
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    FURTHER: tl.constexpr,
):
    """Loads one block of a segment, updates it, stores it; and so with each average beside its
    first, for which `further` has an address, whether it is sampled, w and current."""
    wide: tl.constexpr = k[0].dtype
    lane = lanes(BLOCK, FULL)
    left = tl.minimum(length - begin, BLOCK).to(tl.int32)
    mask = lane < left
    theta_at = elements(streams[0], begin, lane, FULL)
    theta = load(theta_at, mask, wide, FULL)
    if MASTER:
        param_at = elements(streams[8], begin, lane, FULL)
        param = load(param_at, mask, wide, FULL)
        rounded = theta.to(param_at.dtype.element_ty).to(wide)
        theta = followed(theta, rounded, param)
    g = theta  # stands for every stream that the kind lacks
    m = theta
    z = theta
    previous = theta
    v = theta
    v_max = theta
    a = theta
    if KIND != SAMPLE:
        g_at = elements(streams[1], begin, lane, FULL)
        g = load(g_at, mask, wide, FULL)
        if unscale is not None:
            store(g_at, g * unscale, mask, FULL)
    if KIND >= DECOUPLED:
        m_at = elements(streams[2], begin, lane, FULL)
        m = load(m_at, mask, wide, FULL)
        if len(k) > 17:  # begins
            m = tl.where(k[17], theta, m)
    if KIND == DIFFERENCE:
        z_at = elements(streams[3], begin, lane, FULL)
        z = load(z_at, mask, wide, FULL)
        previous_at = elements(streams[4], begin, lane, FULL)
        previous = load(previous_at, mask, wide, FULL)
    if KIND >= ADAM:
        v_at = elements(streams[5], begin, lane, FULL)
        v = load(v_at, mask, wide, FULL)
    if KIND == AMSGRAD:
        v_max_at = elements(streams[6], begin, lane, FULL)
        v_max = load(v_max_at, mask, wide, FULL)
    if AVERAGED:
        a_mask = lane < left * sampled
        if FULL:  # a mask that is uniform leaves the access a vector's
            a_mask = tl.broadcast_to(sampled, lane.shape) != 0
        a_at = elements(streams[7], begin, lane, FULL)
        a = load(a_at, a_mask, wide, False)

    before = theta
    theta, m, z, previous, v, v_max, a = update(
        k, theta, g, m, z, previous, v, v_max, a, KIND, AVERAGED
    )

    if KIND >= DECOUPLED:
        store(m_at, m, mask, FULL)
    if KIND == DIFFERENCE:
        store(z_at, z, mask, FULL)
        store(previous_at, previous, mask, FULL)
    if KIND >= ADAM:
        store(v_at, v, mask, FULL)
    if KIND == AMSGRAD:
        store(v_max_at, v_max, mask, FULL)
    if AVERAGED:
        store(a_at, a, a_mask, False)
    for i in tl.static_range(FURTHER):
        own_mask = lane < left * further[4 * i + 1]
        if FULL:
            own_mask = tl.broadcast_to(further[4 * i + 1], lane.shape) != 0
        own_at = elements(further[4 * i], begin, lane, FULL)
        own = tl.where(further[4 * i + 3], before, load(own_at, own_mask, wide, False))
        store(own_at, toward(further[4 * i + 2], own, theta), own_mask, False)
    weights_at = theta_at
    if MASTER:
        store(theta_at, theta, mask, FULL)
        weights_at = param_at
    if KIND == SAMPLE:
        if k[16]:  # write_back, or another process may write them at this time
            store(weights_at, theta, mask, FULL)
    else:
        store(weights_at, theta, mask, FULL)


@triton.jit
def step_by_kind(
    k,
    streams,
    unscale,
    begin,
    length,
    sampled,
    further,
    kind,
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    FURTHER: tl.constexpr,
):
    """One branch per program on the segment's kind, among those that go with the launch's KIND
    (csrc/dispatch.h)."""
    if AVERAGED or FURTHER > 0:
        any_sampled = sampled
        for i in tl.static_range(FURTHER):
            any_sampled = any_sampled | further[4 * i + 1]
        if (kind == SAMPLE) & (any_sampled != 0):
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                SAMPLE,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )
    if KIND < ADAM:
        if kind == PLAIN:
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                PLAIN,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )
    if KIND == DECOUPLED or KIND == DIFFERENCE:
        if kind == DECOUPLED:
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                DECOUPLED,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )
    if KIND == DIFFERENCE:
        if kind == DIFFERENCE:
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                DIFFERENCE,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )
    if KIND == ADAM or KIND == AMSGRAD:
        if kind == ADAM:
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                ADAM,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )
    if KIND == AMSGRAD:
        if kind == AMSGRAD:
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                AMSGRAD,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )
    if KIND == SCHEDULE_FREE:
        if kind == SCHEDULE_FREE:
            step_block(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                further,
                SCHEDULE_FREE,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
                FURTHER,
            )


TABLES = ["chunks", "table", "rows", "samplings", "marks", "agings", "grad_scale", "found_inf"]
TABLES += ["clip", "schedules", "further"]


@triton.jit(do_not_specialize_on_alignment=TABLES)
def step_kernel(
    chunks,
    table,
    rows,
    samplings,
    marks,
    agings,
    grad_scale,
    found_inf,
    clip,
    schedules,
    further,
    DTYPE: tl.constexpr,
    THETA_DTYPE: tl.constexpr,
    KEPT_DTYPE: tl.constexpr,
    AVERAGE_DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    FURTHER: tl.constexpr,
):
    """One chunk of one segment, which has at most `FURTHER` averages beside its first. step.py says
    what the tables hold.

    `marks` is None where the host counts steps; `grad_scale`, `found_inf` and `clip` may be
    None. `agings` has what a segment's age makes of its row, for the kinds that it matters to, and
    `schedules` what a group's own count does (schedule.py), or is None.
    """
    chunk = chunks + 2 * tl.program_id(0)
    index = tl.load(chunk + 1)
    entry = table + tl.load(chunk).to(tl.int64) * ENTRY_COLUMNS
    theta = tl.load(entry)
    g = tl.load(entry + 1)
    a = tl.load(entry + 2)
    m = tl.load(entry + 3)
    z = tl.load(entry + 4)
    previous = tl.load(entry + 5)
    v = tl.load(entry + 6)
    v_max = tl.load(entry + 7)
    behind = entry + BEHIND_KEPT
    length = tl.load(behind)
    row = tl.load(behind + 1)
    sampling = samplings + tl.load(behind + 2) * SAMPLING_COLUMNS
    kind = tl.load(behind + 3)
    lr_at = tl.load(behind + 4)
    number = tl.load(behind + 5)
    param = tl.load(behind + 6)

    if marks is not None:
        if found_inf is not None:
            kind = tl.where(tl.load(found_inf) == 0, kind, -1)
        mark = marks + 2 * number
        keeps = kind >= DECOUPLED
        if KIND < ADAM:
            row = tl.where(keeps & (tl.load(mark) == 0), row + 1, row)
        tl.store(mark + 1, 1, mask=keeps & (index == 0))

    row_at = rows + row * ROW_COLUMNS
    s = tl.load(row_at + 1)  # behind its kind, which the table of segments has
    c = tl.load(row_at + 4)
    alpha = tl.load(row_at + 6)
    gamma = tl.load(row_at + 7)
    rho = tl.load(row_at + ROW_COLUMNS - 2)
    eta = tl.load(row_at + ROW_COLUMNS - 1)
    unscale = None
    if marks is not None:
        given = lr_at != 0
        lr = tl.load(lr_at.to(tl.pointer_type(tl.float32)), mask=given, other=0)
        eta = tl.where(given, lr.to(eta.dtype), eta)
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(s.dtype)
            unscale = divided(scale * 0 + 1, scale)
            s = s * unscale
    if clip is not None:
        s = s * tl.load(clip).to(s.dtype)
    bias = eta
    if KIND >= ADAM:
        aging = agings + number * AGING_COLUMNS
        bias = tl.load(aging)
        eta = tl.load(aging + 1)
        rho = tl.load(aging + 2)
    if schedules is not None:
        prepared = schedules + (row // 2) * SCHEDULE_COLUMNS + PREPARED
        c = tl.load(prepared).to(c.dtype)
        alpha = tl.load(prepared + 1).to(c.dtype)
        gamma = tl.load(prepared + 2).to(c.dtype)
        rho = tl.load(prepared + 3).to(c.dtype)
    sampled = ((a != 0) & (tl.load(sampling + 2) != 0)).to(tl.int32)
    k = (
        s,
        tl.load(row_at + 2),  # lambda
        tl.load(row_at + 3),  # mu
        c,
        tl.load(row_at + 5),  # kappa
        alpha,
        gamma,
        tl.load(row_at + 8),  # delta
        tl.load(row_at + 9),  # nu
        tl.load(row_at + 10),  # q
        tl.load(row_at + 11),  # epsilon
        rho,
        eta * tl.load(sampling),
        bias,
        tl.where(sampled != 0, tl.load(sampling + 1), 0),  # w
        tl.load(sampling + 3) != 0,  # current
        (sampled != 0) & (tl.load(sampling + 4) != 0),  # write_back
    )
    if schedules is not None:
        k = k + (tl.load(marks + 2 * number) == 0,)  # m begins at theta
    aligned = ((theta | g | m | z | previous | v | v_max | a | param) & 15) == 0
    others = ()
    for i in tl.static_range(FURTHER):
        other = further + (tl.load(chunk).to(tl.int64) * FURTHER + i) * 2
        at = tl.load(other)
        own = samplings + tl.load(other + 1) * SAMPLING_COLUMNS
        aligned = aligned & ((at & 15) == 0)
        others = others + (
            at.to(tl.pointer_type(AVERAGE_DTYPE)),
            ((at != 0) & (tl.load(own + 2) != 0)).to(tl.int32),
            tl.load(own + 1),  # w
            tl.load(own + 3) != 0,  # current
        )
    streams = (
        theta.to(tl.pointer_type(THETA_DTYPE)),
        g.to(tl.pointer_type(DTYPE)),
        m.to(tl.pointer_type(KEPT_DTYPE)),
        z.to(tl.pointer_type(KEPT_DTYPE)),
        previous.to(tl.pointer_type(KEPT_DTYPE)),
        v.to(tl.pointer_type(KEPT_DTYPE)),
        v_max.to(tl.pointer_type(KEPT_DTYPE)),
        a.to(tl.pointer_type(AVERAGE_DTYPE)),
        param.to(tl.pointer_type(DTYPE)),
    )
    for part in range(PARTS):
        begin = (index.to(tl.int64) * PARTS + part) * BLOCK
        if aligned & (begin + BLOCK <= length):
            step_by_kind(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                others,
                kind,
                KIND,
                AVERAGED,
                DTYPE != THETA_DTYPE,  # a master
                BLOCK,
                True,
                FURTHER,
            )
        else:
            step_by_kind(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                others,
                kind,
                KIND,
                AVERAGED,
                DTYPE != THETA_DTYPE,
                BLOCK,
                False,
                FURTHER,
            )


@triton.jit
def power(base, exponent, BITS: tl.constexpr):
    """A power of float64, as `power` of csrc/update.h multiplies it."""
    result = base * 0 + 1
    for _ in range(BITS):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = tl.where(exponent > 1, base * base, base)
        exponent = exponent >> 1
    return result


@triton.jit(
    do_not_specialize=["segments"],
    do_not_specialize_on_alignment=["table", "bases", "marks", "agings"],
)
def age_kernel(table, bases, marks, agings, segments, BLOCK: tl.constexpr):
    """Before a step that the device counts: `aging_of` of csrc/update.h for a launch's segments.

    `bases` are eta, rho, mu and nu of each row in float64; the rest is as in `step_kernel`.
    """
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = segment < segments
    behind = table + segment * ENTRY_COLUMNS + BEHIND_KEPT
    row = tl.load(behind + 1, mask=mask, other=0)
    number = tl.load(behind + 5, mask=mask, other=0)
    lr_at = tl.load(behind + 4, mask=mask, other=0)
    t = tl.load(marks + 2 * number, mask=mask, other=0) + 1
    base = bases + 4 * row
    eta = tl.load(base, mask=mask, other=0)
    given = lr_at != 0
    lr = tl.load(lr_at.to(tl.pointer_type(tl.float32)), mask=given, other=0)
    eta = tl.where(given, lr.to(tl.float64), eta)
    rho = tl.load(base + 1, mask=mask, other=0)
    grown = 1 - power(tl.load(base + 2, mask=mask, other=0), t, 31)
    kind = tl.load(behind + 3, mask=mask, other=0)
    grown = tl.where(kind == SCHEDULE_FREE, 1, grown)
    bias = 1 / tl.sqrt(1 - power(tl.load(base + 3, mask=mask, other=0), t, 31))
    aging = agings + number * AGING_COLUMNS
    tl.store(aging, bias.to(agings.dtype.element_ty), mask=mask)
    tl.store(aging + 1, (eta / grown).to(agings.dtype.element_ty), mask=mask)
    tl.store(aging + 2, (rho * grown).to(agings.dtype.element_ty), mask=mask)
