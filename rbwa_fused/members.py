"""What an Averager averages: parameters as they are given, named and followed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from operator import is_
from typing import Any

from torch import Tensor, nn

from rbwa_fused.average import Average

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]


class Followed:
    """The parameters of a module by their names, and whether they are still those of the last look.

    Args:
        exclude: patterns of names to leave out.
    """

    def __init__(self, module: nn.Module, exclude: Sequence[str]) -> None:
        self.module: nn.Module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        self._exclude = exclude
        self.look()

    def look(self) -> None:
        """Remembers what there is. A module is asked for its own dicts, which costs a third of
        going through named_parameters()."""
        modules = list(self.module.modules())
        dicts = [d for m in modules for d in (m._parameters, m._modules)]
        self._full = [(d, tuple(d.values())) for d in dicts if d]
        self._empty = [d for d in dicts if not d]

    def changed(self) -> bool:
        """Whether some parameter or module was exchanged, added or removed since the last look."""
        return any(self._empty) or not all(
            len(members) == len(seen) and all(map(is_, members.values(), seen))
            for members, seen in self._full
        )

    def named(self) -> dict[str, Tensor]:
        """What is averaged; a parameter with several names by its first."""
        return _without(dict(self.module.named_parameters()), self._exclude)


def grouped(
    params: Params | dict[str, Tensor], average: Average | None, exclude: Sequence[str] = ()
) -> list[Group]:
    """Param groups, each with its parameters, its policy, and their names where they have some."""
    if isinstance(params, Tensor):
        raise TypeError(f"Invalid params: a {type(params).__name__} (expected an iterable of them)")
    if isinstance(params, dict):
        members: list[Any] = list(params.items())
    else:
        members = list(params)
    if not members:
        raise ValueError("Invalid params: none to average")
    groups = members if isinstance(members[0], dict) else [{"params": members}]
    found = []
    for group in groups:
        held = group["params"]
        found.append(
            {
                "average": average,
                **group,
                **_named([held] if isinstance(held, Tensor) else held, exclude),
            }
        )
    everything = [id(p) for group in found for p in group["params"]]
    if len(set(everything)) != len(everything):
        raise ValueError("Invalid params: a parameter is named twice")
    return found


def _named(params: Iterable[Any], exclude: Sequence[str]) -> Group:
    members = list(params)
    if members and all(isinstance(member, tuple) for member in members):
        named = _without(dict(members), exclude)
        return {"params": list(named.values()), "param_names": list(named)}
    if exclude:
        raise ValueError(f"Invalid exclude: {exclude!r} (expected parameters with names)")
    for p in members:
        if not isinstance(p, Tensor):
            raise TypeError(f"Invalid params: {type(p).__name__} (expected a torch.Tensor)")
    return {"params": members}


def _without(named: dict[str, Tensor], exclude: Sequence[str]) -> dict[str, Tensor]:
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"Invalid exclude: {pattern!r} fits no name")
    return {n: p for n, p in named.items() if not any(fnmatchcase(n, x) for x in exclude)}
