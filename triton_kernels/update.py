"""The device code: `update`, which mirrors csrc/update.h line by line, and the kernels around it.

Compiled without fused multiply-adds, it gives the bits of the CPU kernels. Each program takes one
block of elements, or a constant few in turn: a loaded bound breaks Triton 3.6's interpreter.
"""

# A branch that is decided at compile time needs an `if` of its own; constants are in capitals.
# ruff: noqa: N803, SIM102, SIM108, SIM109
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from rbwa_fused.rules import COLUMNS, Kind, Sampling
from rbwa_fused.streams import KEPT

SAMPLE = tl.constexpr(int(Kind.SAMPLE))
PLAIN = tl.constexpr(int(Kind.PLAIN))
MOMENTUM = tl.constexpr(int(Kind.MOMENTUM))
DIFFERENCE = tl.constexpr(int(Kind.DIFFERENCE))

ENTRY_COLUMNS = tl.constexpr(10 + len(KEPT))  # of the launch table, see step.py
BEHIND_KEPT = tl.constexpr(3 + len(KEPT))  # theta, g and a stand before
ROW_COLUMNS = tl.constexpr(len(COLUMNS))  # of the coefficient tables
SAMPLING_COLUMNS = tl.constexpr(len(Sampling._fields))


@triton.jit
def followed(master, rounded, param):
    """A parameter that somebody has written to is its own master from then on."""
    return tl.where(rounded == param, master, param)


@triton.jit
def update(k, theta, g, m, z, previous, a, KIND: tl.constexpr, AVERAGED: tl.constexpr):
    """Lines (1)-(5): the new theta, m, z, previous, a.

    A zero coefficient drops its term, so that an infinity spreads as far as in torch.optim.SGD.
    """
    s, lambda_, mu, c, kappa, alpha, gamma, delta, eta, w, current, write_back = k
    x = theta
    if KIND != SAMPLE:
        g = s * g
        g = tl.where(lambda_ != 0, g + lambda_ * theta, g)  # (1)
        direction = g
        if KIND == MOMENTUM or KIND == DIFFERENCE:
            m = mu * m + c * g  # (2)
            direction = tl.where(alpha != 0, alpha * g + gamma * m, gamma * m)
        if KIND == DIFFERENCE:
            z = mu * z + kappa * (g - previous)  # (2) for the gradient's difference
            previous = g
            direction = direction + delta * z
        x = theta - eta * direction  # (3)
    if AVERAGED:
        a = tl.where(current, theta, a)
        a = tl.where(w == 1, x, tl.where(w != 0, a + w * (x - a), a))  # (4)
        x = tl.where(write_back, a, x)  # (5)
    return x, m, z, previous, a


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
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Loads one block of a segment, updates it, stores it."""
    wide: tl.constexpr = k[0].dtype
    lane = lanes(BLOCK, FULL)
    left = tl.minimum(length - begin, BLOCK).to(tl.int32)
    mask = lane < left
    theta_at = elements(streams[0], begin, lane, FULL)
    theta = load(theta_at, mask, wide, FULL)
    if MASTER:
        param_at = elements(streams[6], begin, lane, FULL)
        param = load(param_at, mask, wide, FULL)
        rounded = theta.to(param_at.dtype.element_ty).to(wide)
        theta = followed(theta, rounded, param)
    g = theta  # stands for every stream that the kind lacks
    m = theta
    z = theta
    previous = theta
    a = theta
    if KIND != SAMPLE:
        g_at = elements(streams[1], begin, lane, FULL)
        g = load(g_at, mask, wide, FULL)
        if unscale is not None:
            store(g_at, g * unscale, mask, FULL)
    if KIND == MOMENTUM or KIND == DIFFERENCE:
        m_at = elements(streams[2], begin, lane, FULL)
        m = load(m_at, mask, wide, FULL)
    if KIND == DIFFERENCE:
        z_at = elements(streams[3], begin, lane, FULL)
        z = load(z_at, mask, wide, FULL)
        previous_at = elements(streams[4], begin, lane, FULL)
        previous = load(previous_at, mask, wide, FULL)
    if AVERAGED:
        a_mask = lane < left * sampled
        if FULL:  # a mask that is uniform leaves the access a vector's
            a_mask = tl.broadcast_to(sampled, lane.shape) != 0
        a_at = elements(streams[5], begin, lane, FULL)
        a = load(a_at, a_mask, wide, False)

    theta, m, z, previous, a = update(k, theta, g, m, z, previous, a, KIND, AVERAGED)

    if KIND == MOMENTUM or KIND == DIFFERENCE:
        store(m_at, m, mask, FULL)
    if KIND == DIFFERENCE:
        store(z_at, z, mask, FULL)
        store(previous_at, previous, mask, FULL)
    if AVERAGED:
        store(a_at, a, a_mask, False)
    weights_at = theta_at
    if MASTER:
        store(theta_at, theta, mask, FULL)
        weights_at = param_at
    if KIND == SAMPLE:
        if k[11]:  # write_back, or another process may write them at this time
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
    kind,
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """One branch per program on the segment's kind, among those that the launch has."""
    if AVERAGED:
        if (kind == SAMPLE) & (sampled != 0):
            step_block(
                k, streams, unscale, begin, length, sampled, SAMPLE, True, MASTER, BLOCK, FULL
            )
    if kind == PLAIN:
        step_block(
            k, streams, unscale, begin, length, sampled, PLAIN, AVERAGED, MASTER, BLOCK, FULL
        )
    if KIND == MOMENTUM or KIND == DIFFERENCE:
        if kind == MOMENTUM:
            step_block(
                k, streams, unscale, begin, length, sampled, MOMENTUM, AVERAGED, MASTER, BLOCK, FULL
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
                DIFFERENCE,
                AVERAGED,
                MASTER,
                BLOCK,
                FULL,
            )


TABLES = ["chunks", "table", "rows", "samplings", "marks", "grad_scale", "found_inf", "clip"]


@triton.jit(do_not_specialize_on_alignment=TABLES)
def step_kernel(
    chunks,
    table,
    rows,
    samplings,
    marks,
    grad_scale,
    found_inf,
    clip,
    DTYPE: tl.constexpr,
    THETA_DTYPE: tl.constexpr,
    AVERAGE_DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    AVERAGED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One chunk of one segment. step.py says what the tables hold.

    `marks` is None where the host counts steps; `grad_scale`, `found_inf` and `clip` may be
    None.
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
        keeps = kind >= MOMENTUM
        row = tl.where(keeps & (tl.load(mark) == 0), row + 1, row)
        tl.store(mark + 1, 1, mask=keeps & (index == 0))

    row_at = rows + row * ROW_COLUMNS
    s = tl.load(row_at + 1)  # behind its kind, which the table of segments has
    eta = tl.load(row_at + 9)
    unscale = None
    if marks is not None:
        given = lr_at != 0
        lr = tl.load(lr_at.to(tl.pointer_type(tl.float32)), mask=given, other=0)
        eta = tl.where(given, lr.to(eta.dtype), eta)
        if grad_scale is not None:
            scale = tl.load(grad_scale).to(s.dtype)
            if s.dtype == tl.float32:  # where / is an approximation
                unscale = tl.div_rn(1.0, scale)
            else:
                unscale = 1.0 / scale
            s = s * unscale
    if clip is not None:
        s = s * tl.load(clip).to(s.dtype)
    sampled = ((a != 0) & (tl.load(sampling + 2) != 0)).to(tl.int32)
    k = (
        s,
        tl.load(row_at + 2),  # lambda
        tl.load(row_at + 3),  # mu
        tl.load(row_at + 4),  # c
        tl.load(row_at + 5),  # kappa
        tl.load(row_at + 6),  # alpha
        tl.load(row_at + 7),  # gamma
        tl.load(row_at + 8),  # delta
        eta * tl.load(sampling),
        tl.where(sampled != 0, tl.load(sampling + 1), 0),  # w
        tl.load(sampling + 3) != 0,  # current
        (sampled != 0) & (tl.load(sampling + 4) != 0),  # write_back
    )
    aligned = ((theta | g | m | z | previous | a | param) & 15) == 0
    streams = (
        theta.to(tl.pointer_type(THETA_DTYPE)),
        g.to(tl.pointer_type(DTYPE)),
        m.to(tl.pointer_type(THETA_DTYPE)),
        z.to(tl.pointer_type(THETA_DTYPE)),
        previous.to(tl.pointer_type(THETA_DTYPE)),
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
                kind,
                KIND,
                AVERAGED,
                DTYPE != THETA_DTYPE,  # a master
                BLOCK,
                True,
            )
        else:
            step_by_kind(
                k,
                streams,
                unscale,
                begin,
                length,
                sampled,
                kind,
                KIND,
                AVERAGED,
                DTYPE != THETA_DTYPE,
                BLOCK,
                False,
            )
