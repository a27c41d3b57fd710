"""Rows prove themselves before they are timed; those that cannot are named, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.measure.check import check
from benchmarks.rows.problem import Problem
from benchmarks.rows.provider import Provider, Row

Proven = TypeVar("Proven")


class WrongError(ArithmeticError):
    """A row does not compute what it says."""


@dataclass
class Skipped:
    """Rows that are not timed, and why; `wrong` are those of ours that did not prove themselves."""

    reasons: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def reason(error: BaseException) -> str:
    """The first line of what went wrong first: ending a capture that failed fails once more."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def right(provider: Provider, problem: Problem) -> Provider:
    """The provider, after its first steps were right.

    Raises:
        WrongError: if they were not.
        Exception: if it cannot be captured; of Triton's compiler, which knows no better.
    """
    wrong = check(provider, problem)
    if wrong is not None:
        raise WrongError(wrong)
    return provider


def proven(row: Row, problem: Problem) -> Provider:
    """A row's provider, built and right; raises what `right` does, and what building it may."""
    return right(row.build(problem, row.name), problem)


def all_proven(rows: Sequence[Row], problem: Problem) -> list[Provider]:
    """The providers of all rows, side by side in memory before the first one takes a step."""
    return [right(p, problem) for p in [row.build(problem, row.name) for row in rows]]


def each(
    rows: Sequence[Row],
    prove: Callable[[Row], Proven],
    skipped: Skipped,
    baseline: str | None = None,
) -> list[Proven]:
    """What `prove` makes of those rows that can be timed.

    Args:
        baseline: a row that nothing can be compared without.

    Raises:
        Exception: what the baseline raises.
    """
    kept = []
    for row in rows:
        try:
            kept.append(prove(row))
        except Exception as error:  # each library has its own; a broken device is seen later
            if row.name == baseline:
                raise
            skipped.reasons[row.name] = reason(error)
            if isinstance(error, WrongError) and row.kind == "ours":
                skipped.wrong.append(row.name)
    return kept
