"""The mathematics of profiles, against integrals and figures that were published or measured."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from rbwa_fused.posthoc.profiles import Profile, density, products, solve
from rbwa_fused.power import gamma_of, sigma_rel_of

PAIR = [gamma_of(0.05), gamma_of(0.10)]
SOME = [Profile(t, gamma) for t, gamma in product((3.0, 7.0, 10.0), (-0.2, 0.0, 1.0, *PAIR))]


def members(count: int, t: float = 10_000.0) -> list[Profile]:
    """Of so many snapshots of the pair, evenly spaced."""
    return [Profile(t * k / count, gamma) for k in range(1, count + 1) for gamma in PAIR]


def asked(sigma_rel: float, t: float = 10_000.0) -> Profile:
    return Profile(t, gamma_of(sigma_rel))


@pytest.mark.parametrize("a", SOME)
def test_inner_products_are_the_integrals_of_two_profiles(a: Profile) -> None:
    for b in SOME:
        least = min(a.t, b.t)
        # tau = least u^4 takes away the pole that a negative power has at 0
        u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        tau = least * u**4
        both = density([a], [1.0], tau) * density([b], [1.0], tau)
        integral = (both * 4 * least * u**3).mean().item()
        assert products([a], [b]).item() == pytest.approx(integral, rel=1e-5)
        assert products([b], [a]).item() == pytest.approx(products([a], [b]).item(), rel=1e-14)


@pytest.mark.parametrize("profile", SOME)
def test_a_density_holds_one_whole_and_is_as_long_as_its_power_says(profile: Profile) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    tau, width = profile.t * u**4, 4 * profile.t * u**3
    held = density([profile], [1.0], tau) * width
    mean = (held * tau).mean().item()
    square = (held * tau**2).mean().item()
    assert held.mean().item() == pytest.approx(1.0, rel=1e-6)
    deviation = math.sqrt(square - mean**2) / profile.t
    assert deviation == pytest.approx(sigma_rel_of(profile.gamma), rel=1e-5)


@pytest.mark.parametrize(
    ("count", "sigma_rel", "residual"),
    [
        (10, 0.075, 0.0084),
        (10, 0.15, 0.0221),
        (10, 0.25, 0.1396),
        (5, 0.075, 0.0262),
        (5, 0.15, 0.0750),
        (100, 0.25, 0.0085),
    ],
)
def test_the_residuals_are_those_of_the_documents(
    count: int, sigma_rel: float, residual: float
) -> None:
    assert solve(members(count), asked(sigma_rel)).residual == pytest.approx(residual, abs=5e-5)


@pytest.mark.parametrize("count", [10, 300])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.075, 0.10, 0.15, 0.2])
def test_what_is_made_is_as_far_and_as_long_as_is_said(count: int, sigma_rel: float) -> None:
    solved = solve(members(count), asked(sigma_rel))
    tau = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 5
    made = density(members(count), solved.weights, tau)
    wanted = density([asked(sigma_rel)], [1.0], tau)
    measured = ((made - wanted).norm() / wanted.norm()).item()
    assert solved.residual == pytest.approx(measured, rel=1e-3, abs=1e-6)
    mean = (made * tau).sum() / made.sum()
    deviation = math.sqrt(((made * (tau - mean) ** 2).sum() / made.sum()).item()) / 10_000
    assert solved.sigma_rel == pytest.approx(deviation, rel=1e-4)
    assert math.fsum(solved.weights) == pytest.approx(1.0, abs=1e-12)
    assert max(map(abs, solved.weights)) < 1.5  # clean, whatever the condition


def test_a_member_is_made_of_itself_alone() -> None:
    solved = solve(members(10), asked(0.10))
    assert solved.residual < 1e-6
    assert solved.weights[-1] == pytest.approx(1.0, abs=1e-9)
    assert max(map(abs, solved.weights[:-1])) < 1e-9


def test_the_weights_are_the_nearest_but_for_their_sum() -> None:
    found = members(10)
    solved = solve(found, asked(0.15))
    weights = torch.tensor(solved.weights, dtype=torch.float64)
    slope = products(found, found) @ weights - products(found, [asked(0.15)])[:, 0]
    other = weights + 1e-3 * torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    other = other / other.sum()

    def far(row: torch.Tensor) -> float:
        matrix, wanted = products(found, found), products(found, [asked(0.15)])[:, 0]
        return (row @ matrix @ row - 2 * row @ wanted).item()

    assert far(weights) < far(other)
    scale = (weights @ products(found, found) @ weights).item()
    # before the division by the sum all slopes were 0; it moves them along the weights alone
    along = slope / (products(found, found) @ weights)
    assert along.max() - along.min() < 1e-6 and scale > 0


def test_two_snapshots_of_one_profile_are_no_error() -> None:
    doubled = [*members(10), *members(10)]
    assert solve(doubled, asked(0.075)).residual == pytest.approx(0.0084, abs=5e-5)


@pytest.mark.parametrize("bad", [Profile(1.0, -0.5), Profile(0.0, 1.0), Profile(math.inf, 1.0)])
def test_a_profile_without_a_finite_norm_is_refused(bad: Profile) -> None:
    with pytest.raises(ValueError, match="Invalid profile"):
        solve([Profile(1.0, 1.0)], bad)
