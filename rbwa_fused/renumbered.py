"""Several averages in a checkpoint: how a group says them, and which goes on as which.

A group's first average stands under the keys that a single one has, ``average`` and ``n_averaged``;
the others under ``average_1``, ``n_averaged_1`` and so on, named ones with ``average_name`` and
``average_name_1`` beside them. All are texts and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rbwa_fused.average import Average, same, structure
from rbwa_fused.several import Averaging, Several, policies_of
from rbwa_fused.streams import AVERAGE, AVERAGES

NAME = "average_name"
COUNT = "n_averaged"


def numbered(key: str, number: int) -> str:
    """A key of a group, of its average of that number."""
    return f"{key}_{number}" if number else key


# What groups with several averages have beside the keys of every group.
KEYS = tuple(
    numbered(key, i)
    for i in range(len(AVERAGES))
    for key in (AVERAGE, COUNT, NAME)
    if i or key == NAME
)


def described(average: Averaging, samples: Sequence[int]) -> dict[str, Any]:
    """What a state dict says of a group's averages: policies as texts, names, samples."""
    own: dict[str, Any] = {}
    names = average.names if isinstance(average, Several) else None
    for i, (policy, n) in enumerate(zip(policies_of(average), samples, strict=True)):
        own |= {numbered(AVERAGE, i): policy.describe(), numbered(COUNT, i): n}
        if names is not None:
            own[numbered(NAME, i)] = names[i]
    return own


def keys_of(average: Averaging) -> list[str]:
    """The keys beside those of every group that `described` has."""
    return [key for key in described(average, (0,) * len(policies_of(average))) if key in KEYS]


def forget(saved: dict[str, Any]) -> None:
    """Takes averages and their counts out of a saved group."""
    for key in KEYS:
        saved.pop(key, None)
    saved.update({AVERAGE: None, COUNT: None})


def further_samples(saved: Mapping[str, Any]) -> tuple[int, ...]:
    """The counts that a saved group has for its averages beside the first."""
    return tuple(saved.get(numbered(COUNT, i)) or 0 for i in range(1, len(AVERAGES)))


class Kept(NamedTuple):
    """An average of a saved group, or of a live one."""

    key: str  # in a parameter's state
    name: str | None
    text: str
    samples: int

    def __str__(self) -> str:
        label = self.key if self.name is None else repr(self.name)
        return f"{label}, {self.text}"


def renumber(
    average: Averaging, saved: dict[str, Any], notes: dict[str, None]
) -> dict[str, str | None]:
    """Brings the averages of a saved group into the order of a live one, where either has several.

    Those of one name belong together, of the rest those of one policy, and of what is left then
    those of one kind, in their order. A live one that finds none starts at its next sample, a saved
    one is left out; of both there is a note.

    Returns the key in a parameter's state that each average goes on under; None: it is left out.

    Raises:
        TypeError: for what is no text.
    """
    several = isinstance(average, Several) or any(key in saved for key in KEYS)
    if average is None or saved.get(AVERAGE) is None or not several:
        return {}
    theirs = _of(saved)
    policies = policies_of(average)
    ours = _of(described(average, (0,) * len(policies)))
    found = _found(ours, theirs)
    for i, own in enumerate(ours):
        if i not in found:
            notes[f"the checkpoint has no {own}, which starts at its next sample"] = None
    moved: dict[str, str | None] = dict.fromkeys(one.key for one in theirs)
    for number, one in enumerate(theirs):
        if number not in found.values():
            notes[f"the checkpoint's {one} is left out: the optimizer has no such average"] = None
    forget(saved)
    for i, own in enumerate(ours):
        if i in found:
            one = theirs[found[i]]
            moved[one.key] = own.key
            saved.update({own.key: one.text, numbered(COUNT, i): one.samples})
    return moved


def _of(group: Mapping[str, Any]) -> list[Kept]:
    found = []
    for i, key in enumerate(AVERAGES):
        text = group.get(key)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"Invalid {key} in the checkpoint: {text!r} (expected a repr)")
        if text is not None:
            name = group.get(numbered(NAME, i))
            found.append(Kept(key, name, text, group.get(numbered(COUNT, i)) or 0))
    return found


def _found(ours: Sequence[Kept], theirs: Sequence[Kept]) -> dict[int, int]:
    """Of each average the number of the one that it goes on with, where there is one."""
    found: dict[int, int] = {}

    def alike(own: Kept, one: Kept, rank: int) -> bool:
        named = own.name is not None and one.name is not None
        if rank == 0:
            return named and own.name == one.name
        if rank == 1:
            return same(one.text, own.text)
        return not named and structure(one.text) == structure(own.text)

    for rank in range(3):
        for i, own in enumerate(ours):
            left = [j for j in range(len(theirs)) if j not in found.values()]
            j = next((j for j in left if alike(own, theirs[j], rank)), None)
            if i not in found and j is not None:
                found[i] = j
    return found


def state_of(held: Mapping[str, Any], moved: Mapping[str, str | None]) -> dict[str, Any]:
    """A parameter's state with its averages under the keys that they go on under."""
    renamed = {moved.get(key, key): value for key, value in held.items()}
    return {key: value for key, value in renamed.items() if key is not None}


def policies(average: Averaging) -> list[tuple[str, Average]]:
    """A group's policies by the keys of their averages."""
    return list(zip(AVERAGES, policies_of(average), strict=False))
