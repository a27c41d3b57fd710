"""What a run finds when it begins to write snapshots: its averages, its shards, and its folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4
from weakref import WeakKeyDictionary

from torch import Tensor, distributed

from rbwa_fused.average import Average
from rbwa_fused.averages import Averages
from rbwa_fused.engine.backends import user_level
from rbwa_fused.engine.engine import Engine
from rbwa_fused.engine.sharded import kind_of_shard
from rbwa_fused.posthoc.folder import Snapshot
from rbwa_fused.posthoc.kept import gamma_of_policy

_noted: WeakKeyDictionary[Engine, tuple[int, str]] = WeakKeyDictionary()


def refuse_averages(policies: Sequence[Average]) -> None:
    """Raises ValueError for averages that snapshots make nothing of."""
    profiles = [p for p in policies if gamma_of_policy(p) is not None]
    if not (profiles or any(policy.stop is not None for policy in policies)):
        raise ValueError(
            f"Invalid averages: {policies} (expected one with a profile, such as "
            "power_ema(0.05), or with an end, such as a merge)"
        )
    if len({p.start for p in profiles}) > 1:
        raise ValueError(f"Invalid averages: {profiles} (expected all to start at one step)")
    if len(set(map(gamma_of_policy, profiles))) < len(profiles):
        raise ValueError(f"Invalid averages: {profiles} (expected one for each profile)")


def refuse_counts(owners: Sequence[Averages]) -> None:
    """Raises ValueError for owners that have counted different steps, each with a t of its own."""
    for owner in owners:
        owner.engine.read_back()
    first = owners[0]
    for number, owner in enumerate(owners):
        if owner.engine.steps != first.engine.steps:
            raise ValueError(
                f"Invalid opt: {type(owner).__name__} at place {number} has counted "
                f"{owner.engine.steps} steps and {type(first).__name__} at place 0 "
                f"{first.engine.steps} (expected all to have counted the same)"
            )


def note(engine: Engine, run: str) -> None:
    """Remembers of which run the snapshots of a life are, for as long as its engine is there."""
    _noted[engine] = engine.builds, run


def began_of(engine: Engine, there: Sequence[Snapshot]) -> int:
    """The steps behind which a life begins: those with which it was loaded, or those before now
    where another Snapshots of the same life has written what is there."""
    builds, run = _noted.get(engine, (0, ""))
    if builds == engine.builds and any(s.about.run == run for s in there):
        return max(0, engine.steps - 1)
    return engine.began


def run_of(
    folder: Path, there: Sequence[Snapshot], world: int, rank: int, digest: str, began: int
) -> str:
    """The id of the run that goes on in a folder, or a new one.

    A run goes on where the steps of a checkpoint were loaded. Where none of its snapshots is of
    these steps or earlier ones, a warning names those of later ones, which will be taken away.

    Args:
        there: the snapshots that the folder has.
        digest: of the names and shapes that are averaged now.
        began: the steps with which the averages were loaded; 0 where they were not.

    Raises:
        ValueError: for snapshots of another number of shards, another model, several runs, and for
            any where nothing was loaded.
    """
    for snapshot in there:
        if snapshot.about.world != world:
            raise ValueError(
                f"Invalid folder: {snapshot.reader.file} is one of {snapshot.about.world} "
                f"shards, and this run has {world} (expected an empty folder)"
            )
    own = [s for s in there if s.about.rank == rank]
    if not own:
        return uuid4().hex
    earlier = [s for s in own if s.about.step <= began]
    nearest = (earlier or own)[-1]
    if nearest.about.model != digest:
        raise ValueError(
            f"Invalid folder: {nearest.reader.file} is of another model (expected an empty folder)"
        )
    if began == 0:
        raise ValueError(
            f"Invalid folder: {folder} has snapshots, and this run has only begun "
            "(expected an empty one, or the run gone on with from a checkpoint)"
        )
    refuse_others(own, nearest.about.run)
    if not earlier:
        names = ", ".join(s.reader.file.name for s in own)
        warnings.warn(
            f"{folder} has snapshots of steps behind {began} alone, with which this run has begun: "
            f"they will be taken away or replaced when it writes its first ({names})",
            stacklevel=user_level(),
        )
    return nearest.about.run


def refuse_others(own: Sequence[Snapshot], run: str) -> None:
    """Raises ValueError for a snapshot of another run, such as of a second Snapshots."""
    for snapshot in own:
        if snapshot.about.run != run:
            raise ValueError(
                f"Invalid folder: {snapshot.reader.file} is of another run, or of another "
                "Snapshots (expected one Snapshots for a folder, whose update() gets all averages)"
            )


def shard_of(weights: list[Tensor]) -> tuple[int, int, bool]:
    """Rank and world of what this process has of the weights, and whether it writes them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1, True
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if kind_of_shard(weights) is None:
        return 0, 1, rank == 0
    return rank, world, True
