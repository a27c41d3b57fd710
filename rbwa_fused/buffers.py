"""A model's floating buffers, averaged beside the parameters of an optimizer in the same launch."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from torch import Tensor, nn

from rbwa_fused import checkpoint, form, renumbered
from rbwa_fused.engine import checks
from rbwa_fused.engine.tables import Counts
from rbwa_fused.members import Followed, inherited
from rbwa_fused.several import Averaging, policies_of
from rbwa_fused.streams import AVERAGE, AVERAGES, DTYPES

Group = dict[str, Any]
KEY = "buffers"  # of a state dict


class LoadedBuffers(NamedTuple):
    """What a state dict says of buffers: samples, and averages by their keys and by name."""

    counts: Counts
    averages: dict[str, dict[str, Tensor]]


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

    def __init__(self, module: nn.Module, average: Averaging, capturable: bool) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Invalid buffers: {type(module).__name__} (expected a module or None)")
        if not policies_of(average):
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
            averages = [state[buffer][key] for key in AVERAGES if key in state[buffer]]
            fits = all(average.shape == buffer.shape for average in averages)
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

    def export(self, counts: Counts) -> dict[str, Any]:
        """For a state dict: the policies' texts, the counts of samples, live averages by name."""
        held, average = self.named().items(), self.group["average"]
        saved: dict[str, Any] = {}
        for i, key in enumerate(AVERAGES[: len(policies_of(average))]):
            live = {name: own[key] for name, own in held if key in own}
            saved[renumbered.numbered("averages", i)] = live
        samples = (counts.n_averaged, *counts.further, *[0] * len(saved))[: len(saved)]
        return {**renumbered.described(average, samples), **saved}

    def read(self, state_dict: Mapping[str, Any], notes: list[str]) -> LoadedBuffers:
        """What a state dict has for these buffers, in copies.

        Raises:
            ValueError, TypeError: for other names, shapes, or another kind of policy.
        """
        saved = state_dict.get(KEY)
        if saved is None:
            if any(group.get("n_averaged") for group in state_dict["param_groups"]):
                notes.append("the checkpoint has no averages of buffers, which start again")
            return LoadedBuffers(Counts(), {})
        form.mapping(f"{KEY} in the checkpoint", saved)
        said: dict[str, None] = {}
        theirs = dict(saved)
        for key in [key for key in theirs if key.startswith("n_averaged")]:
            form.count(f"{key} of {KEY}", theirs[key])
        moved = checkpoint.check_averages(self.group["average"], theirs, said)
        copies: dict[str, dict[str, Tensor]] = {}
        for i, key in enumerate(AVERAGES):
            its = renumbered.numbered("averages", i)
            own = moved.get(key, key if key == AVERAGE else None)
            if own is None or (its not in saved and own != AVERAGE):
                continue
            averages, n = saved.get(its), saved.get(renumbered.numbered("n_averaged", i))
            form.mapping(f"{its} of {KEY} in the checkpoint", averages)
            self._check_names(averages.keys(), complete=bool(n))
            for name, buffer in zip(self.group["param_names"], self.group["params"], strict=True):
                _check(name, averages.get(name), buffer)
            copies[own] = {name: value.detach().clone() for name, value in averages.items()}
        notes += [note for note in said if note not in notes]
        return LoadedBuffers(checkpoint.counted(theirs), copies)

    def _check_names(self, names: Set[str], *, complete: bool) -> None:
        own = set(self.group["param_names"])
        missing, further = (own - names if complete else set()), names - own
        if missing or further:
            raise ValueError(
                f"the checkpoint's averages of buffers lack {sorted(missing)} and have "
                f"{sorted(further)}, which the model lacks"
            )

    def load(self, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over loaded averages, in the tensors that there are where they fit."""
        for name, held in self.named().items():
            new = {key: own[name] for key, own in averages.items() if name in own}
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
