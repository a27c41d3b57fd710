"""What a checkpoint says of a function: a digest by which another one of its name is told apart.

A state dict holds tensors and primitives, so a policy's own weight function is remembered by name.
The digest beside the name is to a function what its numbers are to a named policy: where it has
changed, loading warns.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType
from typing import Any

# Bytecode differs between interpreters, so digests of two of them say nothing of each other.
INTERPRETER = f"{sys.implementation.name}{sys.version_info.major}{sys.version_info.minor}"


def fingerprint(function: Callable[..., Any]) -> str:
    """The interpreter and eight digits, such as ``cpython311-0a1b2c3d``.

    They follow the code, and the numbers and texts that it reads: constants, defaults, globals,
    what it closes over, the arguments of a functools.partial, the attributes of an instance that is
    called. Other objects count by their type alone.
    """
    digest = hashlib.sha256(repr(_parts(function, ())).encode()).hexdigest()
    return f"{INTERPRETER}-{digest[:8]}"


def alike(left: str, right: str) -> bool:
    """Whether two fingerprints may be of one function; an empty one is of any."""
    same_interpreter = left.partition("-")[0] == right.partition("-")[0]
    return left == right or not (left and right and same_interpreter)


def _parts(value: Any, above: tuple[int, ...]) -> Any:
    """What a value is made of, in primitives; `above` are the ids of what it is part of."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in above:  # a function may close over itself
        return kind
    above = (*above, id(value))
    if isinstance(value, list | tuple):
        return [kind, [_parts(item, above) for item in value]]
    if isinstance(value, set | frozenset):
        return [kind, sorted(repr(_parts(item, above)) for item in value)]
    if isinstance(value, dict):
        return [kind, [(repr(key), _parts(item, above)) for key, item in value.items()]]
    if isinstance(value, partial):
        return [_parts(part, above) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, CodeType):
        constants = [_parts(constant, above) for constant in value.co_consts]
        return [value.co_code, value.co_names, value.co_freevars, constants]
    if isinstance(value, FunctionType):
        return [_parts(part, above) for part in _read_by(value)]
    method = getattr(value, "__func__", None)
    if method is not None:  # its object goes on changing, as a trainer does that counts epochs
        return _parts(method, above)
    call = getattr(type(value), "__call__", None)  # noqa: B004
    if len(above) == 1 and isinstance(call, FunctionType):
        return [kind, _parts(call, above), _parts(_plain(getattr(value, "__dict__", {})), above)]
    return [kind, getattr(value, "__qualname__", "")]


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
    names = _names(function.__code__)
    yield _plain({k: v for k, v in function.__globals__.items() if k in names})


def _names(code: CodeType) -> set[str]:
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*nested)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers and texts among values, and what lists of them there are."""
    kinds = (bool, int, float, complex, str, bytes, list, tuple)
    return {key: values[key] for key in sorted(values) if isinstance(values[key], kinds)}
