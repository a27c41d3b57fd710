"""docs/posthoc.md quotes what studies.posthoc has measured, and what the mathematics say today."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from rbwa_fused.posthoc.profiles import Profile, products, solve
from rbwa_fused.power import gamma_of
from studies.posthoc import __main__ as study
from studies.posthoc import paths

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "posthoc.md"
RESULTS = json.loads(study.RESULTS.read_text())


def members(count: int) -> list[Profile]:
    return [
        Profile(paths.STEPS * k / count, gamma_of(s))
        for k in range(1, count + 1)
        for s in paths.PAIR
    ]


def target(sigma_rel: float) -> Profile:
    return Profile(paths.STEPS, gamma_of(sigma_rel))


def test_the_page_has_the_tables_of_the_results() -> None:
    text = PAGE.read_text()
    assert study.updated(text, RESULTS) == text
    assert text.count("error, random walk") == len(study.COUNTS)


@pytest.mark.parametrize("count", study.COUNTS)
def test_the_residuals_are_those_of_today(count: int) -> None:
    for length, residual in zip(RESULTS["lengths"], RESULTS["residuals"][str(count)], strict=True):
        assert solve(members(count), target(length)).residual == pytest.approx(residual, abs=1e-6)


def test_what_the_page_says_of_the_errors_is_so() -> None:
    text = " ".join(PAGE.read_text().split())
    lengths = RESULTS["lengths"]
    errors = RESULTS["errors"].values()
    inner = [e for of in errors for s, e in zip(lengths, of["10"], strict=True) if s <= 0.10]
    assert "within 0.4 % of the true average" in text and max(inner) < 0.004
    at = lengths.index(0.15)
    assert "and 0.15 within 1.7 %" in text and max(of["10"][at] for of in errors) < 0.017
    ratios = [
        e / r
        for of in errors
        for count in ("10", "5")
        for e, r in zip(of[count], RESULTS["residuals"][count], strict=True)
        if r > 1e-6
    ]
    (low, high), told = (min(ratios), max(ratios)), re.search(r"were (\S+) to (\S+) times it", text)
    assert told is not None
    assert (f"{low:.2f}", f"{high:.1f}") == (told[1], told[2])
    far = [
        e
        for of in errors
        for e, r in zip(of["10"], RESULTS["residuals"]["10"], strict=True)
        if r > 0.1
    ]
    assert "were off by up to a fifth" in text and 0.1 < max(far) < 0.2


def test_the_division_by_the_sum_costs_what_the_page_says() -> None:
    found, wanted = members(10), target(0.25)
    b = products(found, [wanted])
    best = (b.T @ products(found, found).inverse() @ b / products([wanted], [wanted])).item()
    before, after = math.sqrt(1 - best), solve(found, wanted).residual
    assert f"{before:.1%}, {after:.1%}" == "13.2%, 14.0%"
    assert "13.2 % before and 14.0 % after the division" in " ".join(PAGE.read_text().split())


def test_a_short_path_is_followed_to_its_true_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "STEPS", 40)
    monkeypatch.setattr(paths, "ELEMENTS", 7)
    true, weights = paths.followed("random walk", {4: tmp_path}, [0.05, 0.10], lambda: None)
    assert true.shape == (2, 7) and weights.shape == (7,)
    assert len(list(tmp_path.iterdir())) == 8
    from rbwa_fused.posthoc import synthesize

    made = synthesize(tmp_path, sigma_rel=0.10).state_dict
    assert made is not None
    assert (made["0"] - true[1]).abs().max() < 1e-5
