"""What a checkpoint says of a function: a digest by which another one of its name is told apart.

A state dict holds tensors and primitives, so a policy's own weight function is remembered by name.
The digest beside the name is to a function what its numbers are to a named policy: where it has
changed, loading warns.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from types import CodeType, FunctionType, MethodType
from typing import Any

# Bytecode differs between interpreters, so digests of two of them say nothing of each other.
INTERPRETER = f"{sys.implementation.name}{sys.version_info.major}{sys.version_info.minor}"
MOST = 2_000  # values that are read, in some 10 ms
DEEPEST = 50  # of these one in the other

NUMBERS = (int, float, complex, str, bytes)


class _TooMuchError(Exception):
    """There is more to read than a state dict may wait for."""


def fingerprint(function: Callable[..., Any]) -> str:
    """The interpreter and eight digits, such as ``cpython311-0a1b2c3d``.

    They follow the code, and the numbers and texts that it reads: constants, defaults, globals,
    what it closes over, the arguments of a functools.partial, the attributes of an instance that is
    called. Other objects count by their type alone. Empty where these are more than MOST.
    """
    try:
        parts = repr(_parts(function, (), iter(range(MOST))))
    except _TooMuchError:
        return ""
    digest = hashlib.sha256(parts.encode())
    return f"{INTERPRETER}-{digest.hexdigest()[:8]}"


def alike(left: str, right: str) -> bool:
    """Whether two fingerprints may be of one function; an empty one is of any."""
    same_interpreter = left.partition("-")[0] == right.partition("-")[0]
    return left == right or not (left and right and same_interpreter)


def where(function: Any) -> str:
    """The module and the name in it of a function, or of the class of what has none."""
    kind = type(function)
    name = _text(function, "__qualname__") or kind.__qualname__
    return f"{_text(function, '__module__') or kind.__module__}.{name}"


def _text(value: Any, attribute: str) -> str:
    """An attribute that is a text, else an empty one: some objects have any attribute that they
    are asked for, others raise what they like."""
    try:
        text = getattr(value, attribute, "")
    except Exception:
        return ""
    return text if type(text) is str else ""


def _parts(value: Any, above: tuple[int, ...], left: Iterator[int]) -> Any:
    """What a value is made of, in primitives; `above` are the ids of what it is part of.

    Nothing here depends on ids, on the order in a set, or on what a class of the user's does when
    it is asked: a digest is to be the same in another process.
    """
    if next(left, None) is None or len(above) > DEEPEST:
        raise _TooMuchError
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    base = next((base for base in type(value).__mro__ if base in NUMBERS), None)
    if base is not None:  # in hexadecimal digits, as Python writes no long number in decimal ones
        return [kind, hex(int(value)) if base is int else base.__repr__(value)]
    if id(value) in above:  # a function may close over itself
        return kind
    above = (*above, id(value))

    def parts(values: Iterable[Any]) -> list[Any]:
        return [_parts(item, above, left) for item in values]

    for listed in (list, tuple):
        if _is(value, listed):
            return [kind, parts(listed.__iter__(value))]
    for gathered in (set, frozenset):
        if _is(value, gathered):
            return [kind, sorted(map(repr, parts(gathered.__iter__(value))))]
    if _is(value, dict):
        return [kind, parts(chain.from_iterable(dict.items(value)))]
    if _is(value, partial):
        return parts((value.func, value.args, value.keywords))
    if _is(value, CodeType):
        return [value.co_code, value.co_names, value.co_freevars, parts(value.co_consts)]
    if _is(value, FunctionType):
        return parts(_read_by(value))
    if _is(value, MethodType):  # its object goes on changing, as a trainer does that counts epochs
        return parts((value.__func__,))
    call = getattr(type(value), "__call__", None) if len(above) == 1 else None  # noqa: B004
    if isinstance(call, FunctionType):
        return [kind, *parts((call, _attributes(value)))]
    return [kind, _text(value, "__qualname__")]


def _is(value: Any, *classes: type) -> bool:
    """isinstance, but for what an object says itself of its class."""
    return issubclass(type(value), classes)


def _read_by(function: FunctionType) -> Iterator[Any]:
    """The code of a function, and the values that it reads."""
    yield function.__code__
    yield function.__defaults__
    yield function.__kwdefaults__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield "empty"
    known = function.__globals__
    yield _plain({name: known[name] for name in _names(function.__code__) if name in known})


def _names(code: CodeType) -> set[str]:
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*nested)


def _attributes(value: Any) -> dict[str, Any]:
    try:
        return _plain(vars(value))
    except Exception:  # it has none, or a class that has a word in it
        return {}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers and texts among values, and what lists of them there are."""
    kinds = (*NUMBERS, list, tuple)
    return {key: values[key] for key in sorted(values) if _is(values[key], *kinds)}
