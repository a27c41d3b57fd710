"""A model's floating buffers, averaged beside the parameters of an optimizer in the same launch."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from torch import Tensor, nn

from rbwa_fused import checkpoint, form
from rbwa_fused.average import Average
from rbwa_fused.engine import checks
from rbwa_fused.members import Followed, inherited
from rbwa_fused.streams import AVERAGE, DTYPES

Group = dict[str, Any]
KEY = "buffers"  # of a state dict


class LoadedBuffers(NamedTuple):
    """What a state dict says of buffers: samples, and averages by name."""

    n_averaged: int
    averages: dict[str, Tensor]


class Buffers:
    """What an engine averages beside the parameters (engine/tables.py, Beside).

    Averages go with the names: where a program puts another tensor in a buffer's place, it takes
    over the average, unless it has another shape; then it starts as a copy at its next sample.

    Args:
        module: whose buffers; those that are created, replaced or removed later are so here.
        average: the policy.

    Raises:
        ValueError, TypeError: for no module, no policy, or a buffer that cannot be averaged.
    """

    def __init__(self, module: nn.Module, average: Average | None, capturable: bool) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Invalid buffers: {type(module).__name__} (expected a module or None)")
        if not isinstance(average, Average):
            raise ValueError(f"Invalid buffers: average={average!r} (expected a policy for them)")
        self._followed = Followed(module, (), parameters=False, buffers=True)
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.group: Group = {"params": [], "param_names": [], "average": average}
        checks.average(self.group, capturable)
        self.follow()

    def changed(self) -> bool:
        """Whether a buffer was created, replaced or removed since the last look."""
        return self._followed.changed()

    def follow(self) -> None:
        """Takes over what has become of the buffers."""
        [group] = self._followed.groups([self.group["average"]])
        checks.params(group, master_weights=False)
        state = inherited([self.group], [group], self.state)
        for buffer in group["params"]:  # done again from any line on, it comes to the same
            fits = AVERAGE in state[buffer] and state[buffer][AVERAGE].shape == buffer.shape
            self.state[buffer] = state[buffer] if fits else {}
        self.group.update(group)
        for buffer in self.state.keys() - set(group["params"]):
            del self.state[buffer]
        self._followed.look()

    def named(self) -> dict[str, dict[str, Any]]:
        """The state by the buffers' names."""
        pairs = zip(self.group["param_names"], self.group["params"], strict=True)
        return {name: self.state.get(buffer, {}) for name, buffer in pairs}

    def heirs(self) -> dict[Tensor, Tensor]:
        """What stands in the places of buffers that are gone."""
        return self._followed.heirs([self.group])

    # ---- checkpoints ---------------------------------------------------------------------------

    def export(self, n_averaged: int) -> dict[str, Any]:
        """For a state dict: the policy's text, the count of samples, live averages by name."""
        held = self.named().items()
        averages = {name: own[AVERAGE] for name, own in held if AVERAGE in own}
        policy = self.group["average"].describe()
        return {"average": policy, "n_averaged": n_averaged, "averages": averages}

    def read(self, state_dict: Mapping[str, Any], notes: list[str]) -> LoadedBuffers:
        """What a state dict has for these buffers, in copies.

        Raises:
            ValueError, TypeError: for other names, shapes, or another kind of policy.
        """
        saved = state_dict.get(KEY)
        if saved is None:
            if any(group.get("n_averaged") for group in state_dict["param_groups"]):
                notes.append("the checkpoint has no averages of buffers, which start again")
            return LoadedBuffers(0, {})
        form.mapping(f"{KEY} in the checkpoint", saved)
        n = saved.get("n_averaged")
        form.count(f"n_averaged of {KEY}", n)
        said: dict[str, None] = {}
        checkpoint.check_policy(self.group["average"], dict(saved), said)
        averages = saved.get("averages")
        form.mapping(f"averages of {KEY} in the checkpoint", averages)
        self._check_names(averages.keys(), complete=bool(n))
        for name, buffer in zip(self.group["param_names"], self.group["params"], strict=True):
            _check(name, averages.get(name), buffer)
        notes += [note for note in said if note not in notes]
        copies = {name: value.detach().clone() for name, value in averages.items()}
        return LoadedBuffers(n or 0, copies)

    def _check_names(self, names: Set[str], *, complete: bool) -> None:
        own = set(self.group["param_names"])
        missing, further = (own - names if complete else set()), names - own
        if missing or further:
            raise ValueError(
                f"the checkpoint's averages of buffers lack {sorted(missing)} and have "
                f"{sorted(further)}, which the model lacks"
            )

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Takes over loaded averages, in the tensors that there are where they fit."""
        for name, held in self.named().items():
            new = {AVERAGE: averages[name]} if name in averages else {}
            checkpoint.keep_tensors({None: new}, {None: held})
            held.clear()
            held.update(new)


def _check(name: str, value: Any, buffer: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        what = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"Invalid average of buffer {name} in the checkpoint: {what}")
    if value.shape != buffer.shape:
        raise ValueError(
            f"the checkpoint's average of buffer {name} has shape {tuple(value.shape)} (expected "
            f"{tuple(buffer.shape)})"
        )
