"""The files of one process among those of a folder of snapshots: which they are, which go."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rbwa_fused.posthoc.folder import BEGIN, END, About, Snapshot, rank_text, snapshots_in
from rbwa_fused.posthoc.tensors import PART


class Own(NamedTuple):
    """A process's files in a folder. What cannot be read or removed stays."""

    folder: Path
    rank: int
    world: int

    def snapshots(self) -> list[Snapshot]:
        """By step; none for a folder that cannot be read."""
        with suppress(OSError, ValueError):
            return [s for s in snapshots_in(self.folder) if s.about.rank == self.rank]
        return []

    def clear_parts(self) -> None:
        """Takes away what an earlier life has left half written."""
        with suppress(OSError):
            for part in self.folder.glob(f"{BEGIN}*{rank_text(self.rank, self.world)}{END}*{PART}"):
                if self.world > 1 or ".rank-" not in part.name:
                    part.unlink()

    def clear_behind(self, step: int, but: Container[str] = ()) -> None:
        """Takes away the snapshots of later steps, but those of some names."""
        with suppress(OSError):
            for snapshot in self.snapshots():
                if snapshot.about.step > step and snapshot.reader.file.name not in but:
                    snapshot.reader.file.unlink()

    def hold(self, keep: int, about: About) -> None:
        """Takes away all but the newest of one profile."""
        end = f"gamma-{about.gamma:.9g}{rank_text(self.rank, self.world)}{END}"
        with suppress(OSError):
            for file in sorted(self.folder.glob(f"{BEGIN}*.{end}"))[:-keep]:
                file.unlink()
