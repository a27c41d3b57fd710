"""Arguments that are numbers: checks that raise with the argument's name and the value; powers."""

from __future__ import annotations

import math
import operator
from typing import Any


def number(name: str, value: Any) -> float:
    """A number as a float, or TypeError with the argument's name."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"Invalid {name}: {value!r} (expected a number)")


def integer(name: str, value: int, *, least: int) -> int:
    """An integer of at least so much, or TypeError or ValueError with the argument's name."""
    if isinstance(value, bool):
        raise TypeError(f"Invalid {name}: {value!r} (expected an integer)")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"Invalid {name}: {value!r} (expected an integer)") from None
    if value < least:
        raise ValueError(f"Invalid {name}: {value} (expected at least {least})")
    return value


def fraction(name: str, value: float) -> float:
    """A number of at least 0 and below 1, or TypeError or ValueError with the argument's name."""
    fraction = number(name, value)
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"Invalid {name}: {value} (expected 0 <= {name} < 1)")
    return fraction


def positive(name: str, value: float) -> float:
    """A finite number above 0, or TypeError or ValueError with the argument's name."""
    known = number(name, value)
    if not 0.0 < known < math.inf:
        raise ValueError(f"Invalid {name}: {value} (expected 0 < {name} < inf)")
    return known


def power(base: float, exponent: int) -> float:
    """By squaring, as `power` of csrc/update.h multiplies it: the same bits everywhere."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def flag(name: str, value: Any) -> None:
    """Raise for what is true in Python and means nothing here, such as "no" and nan."""
    if value is None or value is True or value is False:
        return
    try:
        known = number(name, value) in (0.0, 1.0)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"Invalid {name}: {value!r} (expected True or False)")
