"""How the property tests draw what program.py describes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from program import (
    ALL,
    CUSTOM,
    DTYPES,
    LAYOUTS,
    AddGroup,
    Averaged,
    Case,
    Change,
    Clear,
    Convert,
    Copy,
    Event,
    Freeze,
    GroupSpec,
    Load,
    Mode,
    Move,
    Step,
    TensorSpec,
    Unfreeze,
    Write,
    admits,
)
from rules import ALGORITHMS, Domain

import rbwa_fused as rf

some = st.integers(0, ALL - 1)
chosen = some | st.just(ALL)
seeds = st.integers(0, 2**16)
counts = st.integers(0, 3)
lengths = st.integers(1, 3)
layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from(DTYPES)
decays = st.sampled_from([0.5, 0.0, 0.9, 0.999]) | st.floats(0.0, 1.0, exclude_max=True)


def _average(
    weight: Any,
    start: int,
    every: int,
    back: int,
    initial: Any,
    offset: int,
    dtype: torch.dtype | None = None,
) -> rf.Average:
    itself = back * every == 1 and start > 0
    return rf.Average(
        weight,
        start=start,
        every=every,
        write_back_every=back * every,
        initial="current" if itself and initial == "now" else initial,
        dtype=dtype,
        offset=min(offset, every),
    )


def _window(start: int, samples: int, decay: Any, every: int) -> rf.Average:
    return rf.merge(start, start + every * (samples + 1), decay, every)


initial = st.sampled_from(["first_sample", "current", "now"])
ramps = st.builds(rf.ramp.count) | st.builds(rf.ramp.inverse) | st.just(rf.ramp.exponential(3))
shares = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=4)
own_dtype = dtypes | st.none()
named = st.builds(rf.Mean) | st.builds(rf.Ema, decays)
custom = st.sampled_from(CUSTOM)
NAMED: tuple[SearchStrategy[rf.Average], ...] = (
    st.builds(lambda s, every, back: rf.mean(s, every, back * every), counts, lengths, counts),
    st.builds(rf.ema, decays, counts, lengths),
    st.builds(rf.swa, counts, lengths, initial),
    st.builds(rf.rswa, lengths, counts),
    st.builds(rf.rbwa, lengths, counts),
    *[st.builds(rf.rbwa, lengths, st.integers(0, 1), st.just("algorithm2"))] * 3,
    st.builds(rf.rbwa_e, decays, steps_per_epoch=lengths, start_epoch=counts),
    st.builds(rf.lookahead, lengths, st.sampled_from([0.5, 0.3, 1.0])),
    st.builds(rf.switch_ema, decays, steps_per_epoch=lengths),
    st.builds(rf.ema, start=counts, every=lengths, half_life=st.just(3.0), ramp=ramps | st.none()),
    st.builds(rf.power_ema, st.sampled_from([0.05, 0.2]), counts, lengths, initial=initial),
    st.builds(rf.table, shares, counts, lengths, initial=initial),
    st.builds(_window, counts, counts, st.sampled_from(["linear", "sqrt", "cosine"]), lengths),
    st.builds(_average, named, counts, lengths, counts, initial, counts),
    *[st.builds(_average, named, counts, lengths, counts, initial, counts, dtypes)] * 3,
)
ANY = (
    *NAMED,
    *[st.builds(_average, custom, counts, lengths, counts, initial, counts, own_dtype)] * 5,
)


sizes = (
    st.just(())
    | st.tuples(st.integers(0, 70))
    | st.lists(st.integers(0, 5), min_size=2, max_size=4).map(tuple)
    | st.sampled_from([(3,), (2, 3), (1023,), (1025,), (33, 65), (2, 3, 16, 17)])
)
alone = st.builds(TensorSpec, sizes, dtypes, layouts, seeds)


def shared(dtype: torch.dtype) -> SearchStrategy[TensorSpec]:
    """Views of one base, most of which overlap; the long one is long enough for two threads."""
    shapes = st.sampled_from([(8,), (3, 4), (), (8,), (2, 3, 2), (36_000,)])

    def view(shape: tuple[int, ...], layout: str, offset: int) -> TensorSpec:
        length = 64 if len(shape) != 1 or shape[0] < 64 else 40_000 + 36_000
        return TensorSpec(shape, dtype, layout, base=length, offset=offset)

    return st.builds(view, shapes, st.sampled_from(["contiguous", "gaps"]), st.integers(0, 15))


# Those with modes have more to try.
DRAWN = [name for name, rule in ALGORITHMS.items() for _ in range(1 + rule.modes)]


def among(domain: Domain) -> SearchStrategy[Any]:
    named = st.sampled_from([*domain.usual, *domain.others])
    return named if domain.up_to is None else named | st.floats(0.0, domain.up_to)


@st.composite
def hyperparameters(draw: st.DrawFn, rule: str) -> dict[str, Any]:
    options = {name: draw(among(domain)) for name, domain in ALGORITHMS[rule].domain.items()}
    if draw(st.integers(0, 4)) == 4:
        options["lr"] = torch.tensor(options["lr"])
    return ALGORITHMS[rule].allowed(options)


@st.composite
def param_groups(
    draw: st.DrawFn,
    rule: str,
    policies: SearchStrategy[rf.Average],
    default: rf.Average | None,
    base: torch.dtype,
    master_weights: bool,
) -> GroupSpec:
    average = draw(st.sampled_from([None, False, True]))
    if average:
        average = draw(policies)
    policy = default if average is None else average
    least = draw(st.sampled_from([1, 1, 1, 0]))
    tensors = draw(st.lists(alone | alone | shared(base), min_size=least, max_size=5))
    if draw(st.sampled_from([*[False] * 20, True])):  # up to 200 tensors
        tensors = 40 * [tensor for tensor in tensors if tensor.base == 0]
    allowed = [dtype for dtype in DTYPES if admits(policy, dtype, master_weights)]
    fitting = (t if t.dtype in allowed else replace(t, dtype=allowed[0]) for t in tensors)
    return GroupSpec(tuple(fitting), draw(hyperparameters(rule)), average)


def events(rule: str, groups: SearchStrategy[GroupSpec]) -> SearchStrategy[Event]:
    masks = st.just(0) | some
    step = st.builds(Step, seeds, masks, st.sampled_from(["like", "expanded", *LAYOUTS]))
    scaled = st.builds(
        Step,
        seeds,
        masks,
        st.sampled_from(["like", *LAYOUTS]),
        st.sampled_from([1000.0, 4.0, 1.0, None]),
        st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0]),
    )
    others = (
        st.builds(Step, seeds, st.just(ALL)),
        st.builds(Freeze, some),
        st.builds(Unfreeze),
        st.builds(Averaged, st.booleans(), st.booleans(), st.booleans()),
        st.builds(Write, some, seeds),
        st.builds(Load, layouts, st.booleans()),
        st.builds(AddGroup, groups),
        st.builds(Change, counts, hyperparameters(rule)),
        st.builds(Convert, chosen, dtypes),
        st.builds(Move, chosen, layouts),
        st.builds(Copy, st.booleans()),
        st.builds(Clear),
    )
    steps = [*[step] * 8, *[scaled] * 5]
    if ALGORITHMS[rule].modes:
        modes = st.builds(Mode, st.sampled_from([False, False, True]), st.booleans())
        steps = [*[step] * 4, *[scaled] * 2, *[modes] * 5]
    kinds = st.sampled_from([*steps, *others])  # not flattened, as one_of is
    return kinds.flatmap(lambda kind: kind)


@st.composite
def cases(draw: st.DrawFn, device: bool = False) -> Case:
    """With `device`, cases in which a device may count (engine/counters.py)."""
    # Where a device counts, z begins as its segment is stepped: of parameters that share memory the
    # second one's behind the first one's step.
    rules = [name for name in DRAWN if not (device and ALGORITHMS[name].counts)]
    rule = draw(st.sampled_from(rules))
    capturable = device and draw(st.booleans())
    master_weights = draw(st.booleans())
    policies = st.one_of(NAMED if capturable else ANY)
    if not ALGORITHMS[rule].writes_back:
        policies = policies.map(lambda policy: replace(policy, write_back_every=0))
    policies = policies.filter(
        lambda policy: any(admits(policy, dtype, master_weights) for dtype in DTYPES)
    )
    average = None
    if draw(st.sampled_from([True, True, False])):
        average = draw(policies.filter(lambda policy: policy.dtype is None))
    groups = param_groups(rule, policies, average, draw(dtypes), master_weights)
    length = draw(st.integers(1, 16))  # lists that hypothesis sizes by itself have few elements
    return Case(
        rule,
        average,
        tuple(draw(st.lists(groups, min_size=1, max_size=3))),
        tuple(draw(st.lists(events(rule, groups), min_size=length, max_size=length))),
        draw(st.booleans()),
        capturable,
        master_weights,
        not device and draw(st.sampled_from([False, False, True])),
    )
