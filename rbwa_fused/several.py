"""Several averages of one parameter, numbered or named, which one pass over memory samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rbwa_fused.average import Average
from rbwa_fused.streams import AVERAGES

Which = int | str  # of several averages: a number, from 0, or a name


@dataclass(frozen=True, repr=False)
class Several:
    """Averages of one parameter: what ``average=[...]`` or ``average={...}`` becomes.

    The first may be written back, or be the parameter itself; all others sample the weights as the
    step leaves them.

    Attributes:
        policies: at most 16, in the order of their state keys ``average``, ``average_1``, ….
        names: of a dict, in the same order; else None.
    """

    policies: tuple[Average, ...]
    names: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        """As it was given."""
        if self.names is None:
            return repr(list(self.policies))
        return repr(dict(zip(self.names, self.policies, strict=True)))


Averaging = Average | Several | None  # of a param group
Averages = Sequence[Average] | Mapping[str, Average]  # as a user gives several


def averaging(value: Any) -> Averaging:
    """What a user gives as ``average``: a policy, several in a list, a tuple or a dict of names, or
    None or False for none. A list of one is that policy.

    Raises:
        TypeError: for what is no policy, and for a name that is no text.
        ValueError: for no or more than 16 policies, an empty name, or a further one that is written
            back.
    """
    if value is None or value is False:
        return None
    if isinstance(value, Average | Several):
        return value
    if not isinstance(value, list | tuple | Mapping):
        raise TypeError(
            f"Invalid average: {value!r} (expected an rbwa_fused policy, None or False)"
        )
    names = tuple(value) if isinstance(value, Mapping) else None
    policies = tuple(value.values() if isinstance(value, Mapping) else value)
    for policy in policies:
        if not isinstance(policy, Average):
            raise TypeError(f"Invalid average: {policy!r} among several (expected a policy)")
    for name in names or ():
        if not isinstance(name, str) or not name:
            raise TypeError(f"Invalid average: the name {name!r} (expected a text)")
    if not 1 <= len(policies) <= len(AVERAGES):
        raise ValueError(
            f"Invalid average: {len(policies)} policies (expected 1 to {len(AVERAGES)})"
        )
    for i, policy in enumerate(policies[1:], 1):
        if policy.write_back_every > 0:
            raise ValueError(
                f"Invalid average: {policy!r} at place {i} (expected it first: only the first of "
                "several averages is written back to the weights)"
            )
    if names is None and len(policies) == 1:
        return policies[0]
    return Several(policies, names)


def policies_of(average: Any) -> tuple[Average, ...]:
    """The policies of a param group's ``average``, in the order of their state keys."""
    if isinstance(average, Several):
        return average.policies
    return (average,) if isinstance(average, Average) else ()


def names_of(average: Any) -> tuple[str, ...]:
    """The names of a param group's averages, where they have some."""
    return (average.names or ()) if isinstance(average, Several) else ()


def number_of(average: Any, which: Which) -> int | None:
    """Which of a group's averages a number or a name means, or None where it has no such."""
    if isinstance(which, str):
        names = names_of(average)
        return names.index(which) if which in names else None
    return which if which < len(policies_of(average)) else None


def check_which(which: Any, averages: list[Any]) -> None:
    """Raises for a ``which`` that is none of these groups' averages; 0 is one everywhere.

    Raises:
        TypeError: for what is neither a number nor a text.
        ValueError: where no group has such an average.
    """
    if isinstance(which, bool) or not isinstance(which, int | str):
        raise TypeError(f"Invalid which: {which!r} (expected a number or a name)")
    negative = isinstance(which, int) and which < 0
    if which != 0 and (negative or all(number_of(a, which) is None for a in averages)):
        most = max((len(policies_of(a)) for a in averages), default=0)
        names = dict.fromkeys(name for average in averages for name in names_of(average))
        known: list[Which] = [*range(max(most, 1)), *names]
        raise ValueError(f"Invalid which: {which!r} (expected one of {known})")
