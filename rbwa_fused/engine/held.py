"""What an optimizer's state held when tables were made for it, and whether it holds that still.

`opt.state` is everybody's: a program may put another tensor into it, take one out, replace it
whole, or give a tensor in it other memory. What stands there at the time of a step is what the step
reads and writes, so each step begins with the question whether anything is new. The compiled module
asks it (csrc/held.h); without it, or for a state that is no dict, Python does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rbwa_fused import compiled
from rbwa_fused.engine.sharded import is_sharded, local

_C, _ = compiled.load("_C")


class Standing(Protocol):
    """Knows a state, and whether it is what it was."""

    empty: bool

    def stands(self, state: Any) -> bool:
        """Whether this is the same state, with the same in it."""


class Nothing:
    """Of tables that were never finished: no state is theirs."""

    empty = True

    def stands(self, state: Any) -> bool:
        """Never."""
        return False


NOTHING = Nothing()


class Held:
    """The objects in a state and the memory of its tensors, as they are now."""

    def __init__(self, state: Mapping[Tensor, Any]) -> None:
        self.empty = not state
        self._shards = [(t, local(t)) for t in _tensors(state) if is_sharded(t)]
        self._ask = None
        if _C is not None and isinstance(state, dict):
            plain = list(filter(_has_memory, _tensors(state)))
            number = torch.ops.rbwa_fused.hand_over.default(plain) if plain else 0
            self._ask = _C.HeldState(state, plain, number).stands
            if not self._shards:
                self.stands = self._ask  # type: ignore[method-assign]  # a call less in each step
        else:
            self._state = state
            self._kept = list(_objects(state))

    def stands(self, state: Any) -> bool:
        """Whether this is the same mapping, with the same objects in it and the same memory in
        its tensors."""
        if self._ask is not None:
            if not self._ask(state):
                return False
        elif state is not self._state or not _same(self._kept, list(_objects(state))):
            return False
        return not self._shards or all(local(t) is shard for t, shard in self._shards)


def _tensors(state: Mapping[Tensor, Any]) -> Iterator[Tensor]:
    for held in state.values():
        if isinstance(held, Mapping):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def _objects(state: Mapping[Tensor, Any]) -> Iterator[tuple[Any, ...]]:
    """Each parameter with its state's keys and values, and the memory of these."""
    for param, held in state.items():
        values = held.items() if isinstance(held, Mapping) else ()
        yield param, [(key, value, *_memory(value)) for key, value in values]


def _memory(value: Any) -> tuple[int, int]:
    return (value.data_ptr(), value.numel()) if _has_memory(value) else (0, 0)


def _has_memory(value: Any) -> bool:
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return plain and value.layout == torch.strided and not value.is_meta


def _same(before: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> bool:
    return len(before) == len(now) and all(
        p is q
        and len(values) == len(others)
        and all(
            key is name and value is thing and memory == place
            for (key, value, *memory), (name, thing, *place) in zip(values, others, strict=True)
        )
        for (p, values), (q, others) in zip(before, now, strict=True)
    )
