"""The weights of samples: against literal loops, against other libraries, and what windows do."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SCHEDULES
from torch import Tensor, nn

import rbwa_fused as rf
from rbwa_fused import papers
from rbwa_fused.power import gamma_of, sigma_rel_of
from rbwa_fused.weights import PowerEma

F64 = torch.float64
STEPS = 60


def walk(steps: int = STEPS) -> list[Tensor]:
    """The gradients of a run, and with a rate of 1 its weights: minus their sums."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, generator=generator, dtype=F64) for _ in range(steps)]


def run(average: rf.Average, steps: int = STEPS, **options: Any) -> tuple[Any, list[Tensor]]:
    p = nn.Parameter(torch.zeros(5, dtype=F64))
    opt = rf.FusedSGD([p], lr=1.0, average=average, **options)
    path = []
    for g in walk(steps):
        p.grad = g.clone()
        opt.step()
        path.append(p.detach().clone())
    return opt, path


def average_of(opt: Any) -> Tensor:
    (p,) = opt.param_groups[0]["params"]
    held: Tensor = opt.state[p]["average"]
    return held


ZERO = torch.zeros(5, dtype=F64)
LITERAL: dict[str, tuple[rf.Average, Callable[[list[Tensor]], Tensor]]] = {
    "half-life": (rf.ema(half_life=7), lambda path: papers.half_life_ema(path, 7, 1)),
    "half-life, seldom": (
        rf.ema(half_life=7, every=4),
        lambda path: papers.half_life_ema(path, 7, 4),
    ),
    "power": (rf.power_ema(0.1), lambda path: papers.power_ema(path, gamma_of(0.1), 0, 1)),
    "power by itself": (
        rf.power_ema(gamma=2.5, start=5, every=3),
        lambda path: papers.power_ema(path, 2.5, 5, 3),
    ),
    "linear window": (
        rf.merge(10, 40, every=3),
        lambda path: papers.merged(path[12:40:3], papers.decays(10, "linear")),
    ),
    "sqrt window": (
        rf.merge(10, 40, "sqrt", every=3),
        lambda path: papers.merged(path[12:40:3], papers.decays(10, "sqrt")),
    ),
    "sqrt without an end": (
        rf.merge(20, decay="sqrt"),
        lambda path: papers.merged(path[20:], papers.decays(STEPS - 20, "sqrt")),
    ),
    "cosine window": (
        rf.merge(10, 41, "cosine", every=3),
        lambda path: papers.merged(path[12:40:3], papers.decays(10, "cosine")),
    ),
    "given weights": (
        rf.merge(10, decay=[2, 0, 5, 1], every=2),
        lambda path: (2 * path[11] + 5 * path[15] + path[17]) / 8,
    ),
    "table": (rf.table([0.9, 0.5, 0.25, 0.1]), lambda path: papers.tabled(path, TABLE, None)),
    "table from the weights before": (
        rf.table([0.9, 0.5, 0.25, 0.1], initial="current"),
        lambda path: papers.tabled(path, TABLE, ZERO),
    ),
    "YOLO's": (
        rf.ema(0.97, ramp=rf.ramp.exponential(20), initial="now"),
        lambda path: papers.yolo_ema(path, ZERO, 0.97, 20),
    ),
}
TABLE = [0.9, 0.5, 0.25, 0.1]


@pytest.mark.parametrize("name", LITERAL)
def test_an_average_is_its_literal_loop(name: str) -> None:
    policy, literal = LITERAL[name]
    opt, path = run(policy)
    assert (average_of(opt) - literal(path)).abs().max() <= 1e-12


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_a_power_ema_is_as_long_as_it_was_asked_to_be(sigma_rel: float, every: int) -> None:
    """Its profile, from the weights of 150 samples, has the standard deviation sigma_rel."""
    policy = rf.power_ema(sigma_rel, start=7, every=every)
    steps = range(7 + every, 7 + 151 * every, every)
    profile: list[float] = []
    for n, step in enumerate(steps):
        w = policy.weight_of(n, step)
        profile = [*(c * (1 - w) for c in profile), w]
    # A sample stands for the steps since the one before.
    times = [(step - 7 - every / 2) / (150 * every) for step in steps]
    mean = sum(c * t for c, t in zip(profile, times, strict=True))
    variance = sum(c * (t - mean) ** 2 for c, t in zip(profile, times, strict=True))
    assert abs(math.sqrt(variance + 1 / 12 / 150**2) - sigma_rel) <= 1e-3
    assert sum(profile) == pytest.approx(1, abs=1e-12)


def test_one_step_in_place_of_ten_makes_an_average_five_times_as_long() -> None:
    """What docs/equivalences.md says of another library: 0.246 where 0.05 was asked for."""
    gamma, profile = gamma_of(0.05), [1.0]
    steps = range(10, 3001, 10)
    for step in steps[1:]:
        w = 1 - (1 - 1 / step) ** (gamma + 1)
        profile = [*(c * (1 - w) for c in profile), w]
    times = [step / steps[-1] for step in steps]
    mean = sum(c * t for c, t in zip(profile, times, strict=True))
    variance = sum(c * (t - mean) ** 2 for c, t in zip(profile, times, strict=True))
    assert math.sqrt(variance) == pytest.approx(0.246, abs=1e-3)


def test_the_weight_of_a_long_run_is_no_difference_of_near_numbers() -> None:
    """1 - (1 - 1/t)^(gamma + 1) at t = 1e7 loses nine digits, and so does 1 - decay."""
    w = rf.power_ema(gamma=0.5).weight_of(10**7 - 1, 10**7)
    assert w == pytest.approx(1.5e-7 - 0.375e-14, rel=1e-15, abs=0)  # its series
    w = rf.ema(half_life=1e12).weight_of(1, 1)
    assert w == pytest.approx(math.log(2) * 1e-12, rel=1e-12, abs=0)


def test_the_time_of_a_power_begins_with_its_start_wherever_samples_lie() -> None:
    policy = rf.power_ema(gamma=1, start=5, every=3, offset=1)  # samples behind steps 6, 9, 12
    weights = [policy.weight_of(n, step) for n, step in ((0, 6), (1, 9), (2, 12))]
    assert weights == pytest.approx([1, 1 - (1 - 3 / 4) ** 2, 1 - (1 - 3 / 7) ** 2])


def test_of_a_decay_and_a_half_life_a_ramp_ends_at_the_larger_weight() -> None:
    ramp = rf.ramp.inverse()
    for decay, half_life in ((0.9, 30.0), (0.99, 3.0)):
        alone = [1 - decay, 1 - 0.5 ** (1 / half_life)]
        w = rf.ema(decay, half_life=half_life, ramp=ramp).weight_of(10**9, 10**9)
        assert w == pytest.approx(max(alone))


@pytest.mark.parametrize("decay", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_window_is_sgd_with_that_decay_on_the_same_gradients(decay: Any, every: int) -> None:
    samples = STEPS // every
    opt, _ = run(rf.merge(0, samples * every, decay, every=every))
    factors = papers.decays(samples, decay)
    by_step = [factors[i // every] for i in range(STEPS)]
    wanted = papers.decayed(ZERO, walk(), 1.0, by_step)
    assert (average_of(opt) - wanted).abs().max() <= 1e-12


def test_windows_end_and_their_averages_stay() -> None:
    opt, path = run(rf.merge(10, 20), steps=20)
    ended = average_of(opt).clone()
    later, _ = run(rf.merge(10, 20))
    assert torch.equal(average_of(later), ended) and later.n_averaged == opt.n_averaged == 10
    assert (ended - torch.stack(path[10:]).mean(0)).abs().max() <= 1e-12


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def test_ramps_are_diffusers() -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    theirs = training_utils.EMAModel([nn.Parameter(ZERO)], decay=0.99, min_decay=0.3)
    ours = rf.ema(0.99, ramp=rf.ramp.count(floor=0.3))
    warm = training_utils.EMAModel(
        [nn.Parameter(ZERO)], decay=0.99, use_ema_warmup=True, inv_gamma=3.0, power=0.75
    )
    inverse = rf.ema(0.99, ramp=rf.ramp.inverse(3, 0.75))
    for n in range(1, 2000):  # theirs begins as a copy of the model, and its first sample is one
        assert relative(1 - ours.weight_of(n, n + 1), theirs.get_decay(n + 1)) <= 3e-16, n
        assert relative(1 - inverse.weight_of(n, n + 1), warm.get_decay(n + 1)) <= 3e-16, n
    assert 1 - ours.weight_of(0, 1) == theirs.get_decay(1) == 0


def test_ramps_are_timms() -> None:
    utils = pytest.importorskip("timm.utils")
    theirs = utils.ModelEmaV3(
        nn.Linear(1, 1), decay=0.999, use_warmup=True, warmup_gamma=2.0, warmup_power=2 / 3
    )
    ours = rf.ema(0.999, ramp=rf.ramp.inverse(2.0))
    for n in range(1, 2000):
        assert relative(1 - ours.weight_of(n, n + 1), theirs.get_decay(n + 1)) <= 3e-16, n


@pytest.mark.parametrize("every", [1, 10])
def test_ramps_are_ema_pytorchs(every: int) -> None:
    """Its `update_every` counts steps, from the first one on: gamma / every samples, offset=1."""
    package = pytest.importorskip("ema_pytorch")
    model = nn.Linear(3, 2, dtype=F64)
    theirs = package.EMA(
        model, beta=0.99, inv_gamma=4.0, power=0.7, update_after_step=0, update_every=every
    )
    ours = rf.Averager(
        model,
        rf.ema(0.99, every=every, offset=1, ramp=rf.ramp.inverse(4.0 / every, 0.7)),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=generator, dtype=F64)
        theirs.update()
        ours.update()
    for p, q in zip(theirs.ema_model.parameters(), ours.averages(model).values(), strict=True):
        assert (p - q).abs().max() <= 1e-6  # theirs takes its decay in float32


def test_a_power_ema_is_edm2s() -> None:
    """beta = (1 - 1 / t)^(gamma + 1), in steps; an independent formula for gamma, by its roots."""
    numpy = pytest.importorskip("numpy")
    for sigma_rel in (0.05, 0.1, 0.2):
        t = sigma_rel**-2
        gamma = numpy.roots([1, 7, 16 - t, 12 - t]).real.max()
        assert gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-12)
        for step in (2, 10, 1000):
            beta = (1 - 1 / step) ** (gamma + 1)
            assert 1 - rf.power_ema(sigma_rel).weight_of(step - 1, step) == pytest.approx(beta)
    assert gamma_of(0.05) == pytest.approx(16.972, abs=1e-3)
    assert gamma_of(0.10) == pytest.approx(6.937, abs=1e-3)


@pytest.mark.parametrize("sigma_rel", [1e-6, 0.01, 0.05, 0.2, 0.288])
def test_a_length_and_its_power_are_one_anothers_inverse(sigma_rel: float) -> None:
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_policy_prints_pickles_and_loads_as_what_it_is(name: str) -> None:
    policy = SCHEDULES[name]
    for made in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert made == policy and repr(made) == repr(policy)
        assert made.describe() == policy.describe()
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == policy
    written = eval(repr(policy), {**vars(rf), "rf": rf})
    assert written == policy


def test_a_long_table_prints_in_one_line_and_is_told_from_another() -> None:
    long, other = rf.table([0.5] * 5000), rf.table([0.5] * 4999 + [0.25])
    assert repr(long) == "table(<5000 weights>)"
    assert len(long.describe()) < 200 and long.describe() != other.describe()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [4, 9, 30])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name: str, stop: int) -> None:
    """In a window, behind it and before it: what has been sampled is counted."""
    policy = SCHEDULES[name]
    whole, _ = run(policy)
    opt, path = run(policy, steps=stop)
    saved = copy.deepcopy(opt.state_dict())
    p = nn.Parameter(path[-1].clone())
    again = rf.FusedSGD([p], lr=1.0, average=copy.deepcopy(policy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(saved)
    for g in walk()[stop:]:
        p.grad = g.clone()
        again.step()
    assert again.n_averaged == whole.n_averaged
    assert torch.equal(average_of(again), average_of(whole))


def test_another_length_warns_and_another_kind_is_refused() -> None:
    opt, path = run(rf.power_ema(0.1), steps=9)
    saved = opt.state_dict()
    with pytest.warns(UserWarning, match="PowerEma"):
        rf.FusedSGD([nn.Parameter(path[-1])], 1.0, average=rf.power_ema(0.2)).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"average.*PowerEma"):
        rf.FusedSGD([nn.Parameter(path[-1])], 1.0, average=rf.ema(0.2)).load_state_dict(saved)


def test_a_checkpoint_knows_where_its_window_ends() -> None:
    opt, path = run(rf.merge(2, 20), steps=9)
    again = rf.FusedSGD([nn.Parameter(path[-1])], 1.0, average=rf.merge(2, 30))
    with pytest.warns(UserWarning, match="stop=20"):
        again.load_state_dict(opt.state_dict())


def test_a_power_that_goes_by_steps_asks_where_torchs_run_stands() -> None:
    assert rf.power_ema().by_step and rf.merge(0, 5).by_step and rf.merge(0, decay="sqrt").by_step
    assert not rf.ema(half_life=5).by_step and not rf.table([0.5]).by_step
    assert not rf.ema(ramp=rf.ramp.count()).by_step


def test_the_square_root_window_is_a_power() -> None:
    assert rf.merge(3, 9, "sqrt").weight == PowerEma(-0.5)
    assert rf.merge(3, 9).weight == rf.Mean()


def test_large_weights_and_short_lengths_do_not_overflow() -> None:
    assert rf.merge(0, None, [1e308] * 3).weight == rf.table([1, 1 / 2, 1 / 3]).weight
    assert gamma_of(1e-200) == pytest.approx(1e200)
    assert rf.power_ema(1e-200).weight_of(1, 2) == 1.0


def test_weights_may_come_as_an_array_or_a_tensor() -> None:
    numpy = pytest.importorskip("numpy")
    for given in (TABLE, tuple(TABLE), numpy.array(TABLE), torch.tensor(TABLE, dtype=F64)):
        assert rf.table(given) == rf.table(TABLE)


def test_a_table_is_airbenchs_lookahead() -> None:
    """Every 5 steps the weights become their EMA, of decay 0.95^5 (t / T)^3."""
    decays = [0.95**5 * (t / STEPS) ** 3 for t in range(5, STEPS + 1, 5)]
    opt, path = run(
        rf.table([1 - d for d in decays], every=5, write_back_every=5, initial="current")
    )
    slow = w = ZERO
    for t, g in enumerate(walk(), start=1):
        w = w - g
        if t % 5 == 0:
            slow = w = decays[t // 5 - 1] * slow + (1 - decays[t // 5 - 1]) * w
    assert (path[-1] - w).abs().max() <= 1e-12 and (average_of(opt) - slow).abs().max() <= 1e-12
