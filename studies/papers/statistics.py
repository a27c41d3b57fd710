"""What several seeds say: mean, spread, and paired differences with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95
ROUNDING = 1e-5  # relative, of float32 in training; an image of 10,000 is 1e-4


class Summary(NamedTuple):
    """Mean and sample standard deviation, which is nan of one value."""

    mean: float
    deviation: float
    runs: int


class Difference(NamedTuple):
    """Mean of paired differences, its 95 % interval and p-value (Student's t, two-sided)."""

    mean: float
    low: float
    high: float
    p: float


def summary(values: Sequence[float]) -> Summary:
    deviation = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return Summary(mean(values), deviation, len(values))


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Of values and others of the same seeds, in the same order.

    The mean alone (the rest is nan) of one pair, and where all differences are the same to
    rounding: accuracies of few images often are, and say nothing about their spread then.
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    middle = mean(differences)
    same = max(differences) - min(differences) <= ROUNDING * max(map(abs, [*values, *others]))
    if len(differences) < 2 or same or not all(map(math.isfinite, differences)):
        return Difference(middle, math.nan, math.nan, math.nan)
    error = stdev(differences) / math.sqrt(len(differences))
    width = error * float(stats.t.ppf(0.5 + CONFIDENCE / 2.0, len(differences) - 1))
    p = float(stats.ttest_rel(values, others).pvalue)
    return Difference(middle, middle - width, middle + width, p)
