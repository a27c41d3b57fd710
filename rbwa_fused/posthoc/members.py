"""Which snapshots of a folder a synthesis is made of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from rbwa_fused.numbers import integer
from rbwa_fused.posthoc.folder import Snapshot, agreeing, snapshots_in
from rbwa_fused.posthoc.profiles import Profile


@dataclass(frozen=True)
class Members:
    """The snapshots that count at a step, by profile, and of each the files by rank."""

    step: int
    t: int
    ranks: tuple[tuple[Snapshot, ...], ...]  # a row for each member

    @property
    def profiles(self) -> list[Profile]:
        return [row[0].about.profile for row in self.ranks]

    @property
    def elements(self) -> int:
        """In all files together."""
        readers = [snapshot.reader for row in self.ranks for snapshot in row]
        return sum(kind.elements for reader in readers for kind in reader.kinds.values())


def members_of(
    folder: str | PathLike[str], step: int | None = None, keep: int | None = None
) -> Members:
    """The members of a synthesis: snapshots of a folder until a step, which all ranks have.

    Args:
        step (int, optional): a snapshot's (default: the last).
        keep (int, optional): as if ``Snapshots`` had held so many (default: all there are).

    Raises:
        ValueError: for a folder of snapshots that do not belong together or are torn, a rank of
            which there are none, and a step without one, naming its neighbours.
        TypeError: for a step that is no integer.
        OSError: for a folder that cannot be read.
    """
    if step is not None:
        step = integer("step", step, least=0)
    found = agreeing(snapshots_in(Path(folder)), Path(folder))
    world = found[0].about.world
    by_profile: dict[tuple[int, float], dict[int, Snapshot]] = defaultdict(dict)
    for snapshot in found:
        about = snapshot.about
        by_profile[about.step, about.gamma or 0.0][about.rank] = snapshot
    missing = sorted(set(range(world)) - {s.about.rank for s in found})
    if missing:
        raise ValueError(f"Invalid folder: {folder} has no snapshots of ranks {missing} of {world}")
    # A rank may have been killed before it wrote what others had written.
    whole = {key: row for key, row in by_profile.items() if len(row) == world}
    steps = sorted({step for step, _ in whole})
    if not steps:
        raise ValueError(f"Invalid folder: {folder} has no snapshot that all {world} ranks wrote")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        below = [s for s in steps if s < chosen][-1:]
        above = [s for s in steps if s > chosen][:1]
        raise ValueError(
            f"Invalid step: {chosen} (expected a snapshot's, such as "
            f"{' or '.join(map(str, below + above))}: between two the error is large)"
        )
    keys = [key for key in sorted(whole) if key[0] <= chosen]
    if keep is not None:
        gammas = {gamma for _, gamma in keys}
        keys = sorted(key for g in gammas for key in [k for k in keys if k[1] == g][-keep:])
    rows = tuple(tuple(whole[key][rank] for rank in range(world)) for key in keys)
    return Members(chosen, chosen - found[0].about.origin, rows)
