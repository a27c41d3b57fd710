"""What an Averager averages: parameters as they are given, named and followed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from rbwa_fused.engine.sharded import is_sharded, reshard

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Group]


class Followed:
    """What a module has by its names, and whether that is still what it was at the last look.

    Args:
        exclude: patterns of names to leave out.
        parameters, buffers: whether parameters are followed, and floating buffers.

    Raises:
        ValueError: for a pattern that no name fits.
    """

    def __init__(
        self, module: nn.Module, exclude: Sequence[str], *, buffers: bool, parameters: bool = True
    ) -> None:
        self.module: nn.Module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        self._exclude = exclude
        self._with_parameters, self._with_buffers = parameters, buffers
        reshard(self.module)
        self._sharded = parameters and any(map(is_sharded, self.module.parameters()))
        self.look()
        check_patterns(exclude, list(chain(*self._all())))

    def look(self) -> None:
        """Remembers what there is. A module is asked for its own dicts, which costs a third of
        going through named_parameters()."""
        dicts: list[dict[str, Any]] = []
        for m in self.module.modules():
            dicts.append(m._modules)
            if self._with_parameters:
                dicts.append(m._parameters)
            if self._with_buffers:
                dicts.append(m._buffers)
        self._seen = [(d, tuple(d.values())) for d in dicts if d], [d for d in dicts if not d]

    def changed(self) -> bool:
        """Whether something was exchanged, added or removed since the last look. A forward pass
        under FSDP2 may leave what it has gathered in the parameters' places; that is freed."""
        if self._sharded:
            reshard(self.module)
        full, empty = self._seen
        return any(empty) or not all(
            len(members) == len(seen) and all(map(is_, members.values(), seen))
            for members, seen in full
        )

    def groups(self, averages: Sequence[Any]) -> list[Group]:
        """The parameters and the buffers, as far as they are followed, each with its policy. What
        has several names is called by the first."""
        kept = [_without(named, self._exclude) for named in self._all()]
        return [
            {"params": list(named.values()), "average": average, "param_names": list(named)}
            for named, average in zip(kept, averages, strict=True)
        ]

    def heirs(self, groups: Sequence[Group]) -> dict[Tensor, Tensor]:
        """Of what these groups have and the module no longer: what has its name and its shape."""
        if self._sharded:
            reshard(self.module)
        now = dict(chain.from_iterable(named.items() for named in self._all()))
        there = set(now.values())
        gone = [(n, p) for group in groups for n, p in _by_name(group) if p not in there]
        return {p: now[name] for name, p in gone if name in now and now[name].shape == p.shape}

    def names(self) -> list[str]:
        """What a state dict of the module may have, averaged or not."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        buffers = self.module.named_buffers(remove_duplicate=False)
        return [name for name, _ in chain(parameters, buffers)]

    def _all(self) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = []
        if self._with_parameters:
            found.append(dict(self.module.named_parameters()))
        if self._with_buffers:
            named = self.module.named_buffers()
            found.append({name: b for name, b in named if b.is_floating_point()})
        return found


def grouped(params: Params, average: Any, exclude: Sequence[str]) -> list[Group]:
    """Param groups, each with its parameters, its policy, and their names where they have some."""
    if isinstance(params, Tensor):
        raise TypeError(f"Invalid params: a {type(params).__name__} (expected an iterable of them)")
    members: list[Any] = list(params)
    if not members:
        raise ValueError("Invalid params: none to average")
    found = []
    for group in members if isinstance(members[0], dict) else [{"params": members}]:
        held = group["params"]
        own = _named([held] if isinstance(held, Tensor) else held, exclude)
        found.append({"average": average, **group, **own})
    everything = [id(p) for group in found for p in group["params"]]
    if len(set(everything)) != len(everything):
        raise ValueError("Invalid params: a parameter is named twice")
    return found


def _named(params: Iterable[Any], exclude: Sequence[str]) -> Group:
    members = list(params)
    if members and all(isinstance(member, tuple) for member in members):
        check_patterns(exclude, [name for name, _ in members])
        named = _without(dict(members), exclude)
        return {"params": list(named.values()), "param_names": list(named)}
    if exclude:
        raise ValueError(f"Invalid exclude: {exclude!r} (expected parameters with names)")
    for p in members:
        if not isinstance(p, Tensor):
            raise TypeError(f"Invalid params: {type(p).__name__} (expected a torch.Tensor)")
    return {"params": members}


def inherited(
    before: Sequence[Group], now: Sequence[Group], state: Mapping[Tensor, Any]
) -> defaultdict[Tensor, Any]:
    """The state of what groups have now. A parameter keeps its own, under whatever name; one that
    is new takes over that of the parameter of its name, which is gone."""
    old = {name: p for group in before for name, p in _by_name(group)}
    new = {p for group in now for p in group["params"]}
    mine = {p for group in before for p in group["params"]}
    kept = defaultdict(dict, {p: held for p, held in state.items() if p in new or p not in mine})
    for name, p in chain.from_iterable(map(_by_name, now)):
        gone = old.get(name)
        if gone is not None and gone not in new and gone in state:
            kept.setdefault(p, state[gone])
    return kept


def _by_name(group: Group) -> Iterable[tuple[str, Tensor]]:
    return zip(group["param_names"], group["params"], strict=True)


def check_patterns(exclude: Sequence[str], names: Sequence[str]) -> None:
    """Raises ValueError for a pattern that no name fits."""
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"Invalid exclude: {pattern!r} fits no name")


def _without(named: dict[str, Tensor], exclude: Sequence[str]) -> dict[str, Tensor]:
    return {n: p for n, p in named.items() if not any(fnmatchcase(n, x) for x in exclude)}
