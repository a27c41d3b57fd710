"""Folders of snapshots: their names, what their metadata say, and which of them belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rbwa_fused.posthoc.joined import Place
from rbwa_fused.posthoc.profiles import Profile
from rbwa_fused.posthoc.tensors import Kind, Reader

BEGIN, END = "step-", ".safetensors"
FORMAT = "rbwa_fused.posthoc 1"


@dataclass(frozen=True)
class About:
    """What a snapshot says of itself.

    Attributes:
        step: behind which the average's last sample was taken.
        origin: the step at which the average starts; t is ``step - origin``.
        gamma: the power of its profile; None for the average of a window that has ended.
        policy: as a checkpoint remembers it.
        rank, world: which of how many shards it is; 0 of 1 where every process has all.
        run, model: a run's id, and a digest of the names and shapes of what is averaged.
        norm, distance: of the average, and between it and the weights at that step.
        places: where a rank's shards are in the whole tensors; empty where all is whole.
        rounded: the norm of what the file's dtype has lost of it; None of older files.
    """

    step: int
    origin: int
    gamma: float | None
    policy: str
    rank: int
    world: int
    run: str
    model: str
    norm: float
    distance: float
    places: dict[str, Place] = field(default_factory=dict)
    rounded: float | None = None

    @property
    def name(self) -> str:
        """The name of its file, one for each step, rank, and profile, or policy of a window."""
        digest = hashlib.sha256(self.policy.encode()).hexdigest()[:8]
        window = f"window-{self.origin}-{digest}"
        end = window if self.gamma is None else f"gamma-{self.gamma:.9g}"
        return f"{BEGIN}{self.step:09d}.{end}{rank_text(self.rank, self.world)}{END}"

    @property
    def profile(self) -> Profile:
        """Of one that has a power."""
        assert self.gamma is not None
        return Profile(self.step - self.origin, self.gamma)

    def metadata(self) -> dict[str, str]:
        """As texts, for the header of its file."""
        return {"format": FORMAT, **{k: json.dumps(v) for k, v in asdict(self).items()}}


def rank_text(rank: int, world: int) -> str:
    """How the name of a file says which shard it has."""
    return "" if world == 1 else f".rank-{rank}-of-{world}"


def about(metadata: Mapping[str, str]) -> About | None:
    """What a file's metadata say; None for a file that is no snapshot."""
    if metadata.get("format") != FORMAT:
        return None
    return About(**{k: json.loads(v) for k, v in metadata.items() if k != "format"})


def model_digest(kinds: Mapping[str, Kind]) -> str:
    """Of names and shapes."""
    told = sorted((name, list(kind.shape)) for name, kind in kinds.items())
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def difference(first: Mapping[str, Kind], other: Mapping[str, Kind]) -> str:
    """What the names and shapes of a file are others in than those of the first; "" for nothing."""
    shapes = {name: (first[name].shape, other[name].shape) for name in first if name in other}
    parts = [
        ("lacks", [name for name in first if name not in other]),
        ("alone has", [name for name in other if name not in first]),
        ("has another shape of", [name for name, (a, b) in shapes.items() if a != b]),
    ]
    said = " and ".join(f"{what} {', '.join(names)}" for what, names in parts if names)
    return said and f": it {said}"


@dataclass(frozen=True)
class Snapshot:
    """A whole file of a folder."""

    about: About
    reader: Reader


def snapshots_in(folder: Path) -> list[Snapshot]:
    """The snapshots of a folder by step, power and rank. What is being written, or was when a run
    was killed, has another name, and a torn file of another name is another program's.

    Raises:
        ValueError: naming a file that is not whole.
        OSError: for a folder that cannot be read.
    """
    found = []
    for file in folder.iterdir():
        if not file.name.endswith(END):
            continue
        own = file.name.startswith(BEGIN) and file.is_file()
        try:
            reader = Reader(file)
        except FileNotFoundError:  # another rank has removed it meanwhile
            continue
        except (ValueError, OSError):
            if own:
                raise
            continue
        told = about(reader.metadata)
        if told is not None:
            found.append(Snapshot(told, reader))
    return sorted(found, key=lambda s: (s.about.step, s.about.gamma or 0.0, s.about.rank))


def agreeing(found: list[Snapshot], folder: Path) -> list[Snapshot]:
    """The snapshots with a profile, if all are of one run and model, start and number of shards.

    Raises:
        ValueError: naming what differs, or for none.
    """
    members = [s for s in found if s.about.gamma is not None]
    if not members:
        raise ValueError(f"Invalid folder: {folder} has no snapshots of averages with a profile")
    for what, meaning in (
        ("world", "of another number of shards"),
        ("origin", "of averages that start at another step"),
    ):
        first = members[0]
        for other in members:
            if getattr(other.about, what) != getattr(first.about, what):
                raise ValueError(
                    f"Invalid folder: {other.reader.file} is {meaning} than "
                    f"{first.reader.file.name} (expected all alike)"
                )
    for rank in sorted({s.about.rank for s in members}):  # a rank gives its files an id of its own
        of_rank = [s for s in members if s.about.rank == rank]
        first = of_rank[0]
        for what in ("run", "model"):  # shards may have shapes of their own
            for other in of_rank:
                differs = difference(first.reader.kinds, other.reader.kinds)
                own = what == "model" and bool(differs)
                if own or getattr(other.about, what) != getattr(first.about, what):
                    raise ValueError(
                        f"Invalid folder: {other.reader.file} is of another {what} than "
                        f"{first.reader.file.name}{differs} (expected all alike)"
                    )
    return members
