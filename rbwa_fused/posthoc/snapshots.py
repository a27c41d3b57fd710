"""Snapshots: averages of a run in files, from which others are made when the run is over."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, distributed, nn

from rbwa_fused.averages import Averages
from rbwa_fused.engine.backends import user_level
from rbwa_fused.engine.sharded import kind_of_shard, local
from rbwa_fused.numbers import integer
from rbwa_fused.posthoc.folder import About, Snapshot, model_digest, rank_text, snapshots_in
from rbwa_fused.posthoc.joined import places_of
from rbwa_fused.posthoc.kept import (
    Kept,
    all_kept,
    gamma_of_policy,
    owners_of,
    policies_of,
    weights_of,
)
from rbwa_fused.posthoc.tensors import PART, Kind, Writer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
log = logging.getLogger("rbwa_fused.posthoc")


class Snapshots:
    """Writes averages into a folder while they are trained, for ``posthoc.synthesize``.

    Say ``update(opt, model)`` behind each step. Where a multiple of ``every`` has been passed it
    writes each average that has a power profile (``rf.power_ema``, and ``rf.mean``, whose power is
    0), and where a window has ended (``rf.merge``) its average, whatever ``every`` is. An average
    is not written before its first sample, and again only after another one.

    A file is whole or not there: a run may be killed at any moment. One that is resumed from a
    checkpoint replaces what it comes by again, and takes away what an earlier life wrote of later
    steps. Where a write fails, as on a full disk, training goes on, the files that were there stay,
    one warning says so, and the next multiple is tried again.

    Sharded parameters (FSDP2, FSDP1, tensor parallel) are written by each rank, as its own shards,
    without communication; of replicas (DDP) rank 0 writes.

    Args:
        folder: that gets a safetensors file for each step, average and rank; it is made.
        every (int, steps, >= 1): how often.
        keep (int, optional): how many of each average to hold, the newest; averages of windows stay
            in any case. Few reach less far back: of the pair 0.05 and 0.10 the last 5 of 10 make
            0.15 with a residual of 3.5 %, all 10 with 2.2 %. None is all (default: None).
        dtype (torch.dtype): of the files: float32, float64, bfloat16 or float16. 16 bits round off
            more than averages differ once the weights have settled; ``synthesize`` says how much
            (default: torch.float32).

    Raises:
        ValueError, TypeError: naming the argument and the value received.
        OSError: for a folder that cannot be made.

    Example:
        >>> average = rbwa_fused.power_ema(0.05)
        >>> opt = rbwa_fused.FusedAdamW(model.parameters(), average=average)
        >>> snapshots = rbwa_fused.posthoc.Snapshots("averages", every=1000)
        >>> for batch in loader:
        ...     train(model, opt, batch)
        ...     snapshots.update(opt, model)
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        every: int,
        keep: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.every = integer("every", every, least=1)
        self.keep = None if keep is None else integer("keep", keep, least=1)
        if dtype not in DTYPES:
            raise ValueError(f"Invalid dtype: {dtype!r} (expected one of {DTYPES})")
        self.dtype = dtype
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._steps: int | None = None  # taken when update() was called last
        self._unread = 0  # calls since a device's counters were read
        self._stops: list[int] = []  # where windows end
        self._about = ("", "", 0, 1)  # run, model, rank, world
        self._writes = True  # this process, and not a replica of it
        self._written: set[str] = set()  # names, in this life
        self._failed = False  # a write, of which it was warned

    def update(
        self, opt: Averages | Sequence[Averages], model: nn.Module | None = None
    ) -> list[Path]:
        """Writes what is due behind a step; most calls only look at the step.

        Args:
            opt: one of this package's optimizers, an Averager, or several of one model, whose steps
                the first counts. Those of one policy have parts of one average.
            model: whose parameters have the averages; an Averager of a module knows it.

        Returns:
            The files written by this process.

        Raises:
            ValueError, TypeError: at the first call, for averages of which none has a profile or an
                end, for two with one profile, for param groups with different policies, and for a
                folder with snapshots of another run, model or number of shards.
        """
        owners = owners_of(opt)
        before, engine = self._steps, owners[0].engine
        self._unread += 1
        counting = before is not None and engine.device_counters is not None
        if counting and self._unread < self._until_due():
            return []  # so many steps were not taken, whatever the device has counted
        engine.read_back()
        steps, self._unread = engine.steps, 0
        if before is None or steps < before:  # an earlier checkpoint was loaded
            self._begin(owners, model, steps)
            before = max(0, steps - 1)
        self._steps = steps
        passed = steps // self.every > before // self.every
        ended = any(before < stop <= steps for stop in self._stops)
        if not self._writes or not (passed or ended):
            return []
        return self._write(all_kept(owners, model), passed)

    def bytes_of(self, opt: Averages | Sequence[Averages], model: nn.Module | None = None) -> int:
        """What one snapshot of all averages with a profile takes on this process's disk."""
        elements = 0
        for owner in owners_of(opt):
            profiles = [p for p in policies_of(owner) if gamma_of_policy(p) is not None]
            own = sum(local(p).numel() for p in weights_of(owner, model).values())
            elements += own * len(profiles)
        return elements * self.dtype.itemsize

    # ---- the first call ------------------------------------------------------------------------

    def _begin(self, owners: Sequence[Averages], model: nn.Module | None, steps: int) -> None:
        policies = list({repr(p): p for owner in owners for p in policies_of(owner)}.values())
        stops = [policy.stop for policy in policies if policy.stop is not None]
        profiles = [p for p in policies if gamma_of_policy(p) is not None]
        if not (profiles or stops):
            raise ValueError(
                f"Invalid averages: {policies} (expected one with a profile, such as "
                "power_ema(0.05), or with an end, such as a merge)"
            )
        if len({p.start for p in profiles}) > 1:
            raise ValueError(f"Invalid averages: {profiles} (expected all to start at one step)")
        if len(set(map(gamma_of_policy, profiles))) < len(profiles):
            raise ValueError(f"Invalid averages: {profiles} (expected one for each profile)")
        weights = {n: p for owner in owners for n, p in weights_of(owner, model).items()}
        digest = model_digest({n: Kind(self.dtype, tuple(p.shape)) for n, p in weights.items()})
        rank, world, self._writes = _shard(list(weights.values()))
        there = snapshots_in(self.folder) if self._writes else []
        for snapshot in there:
            if snapshot.about.world != world:
                raise ValueError(
                    f"Invalid folder: {snapshot.reader.file} is one of {snapshot.about.world} "
                    f"shards, and this run has {world} (expected an empty folder)"
                )
        there = [s for s in there if s.about.rank == rank]
        run = self._gone_on_with(there, digest, fresh=steps <= 1)
        self._about = (run, digest, rank, world)
        self._stops = stops
        self._written.clear()
        self._say_cost(self.bytes_of(owners, model), there)

    def _gone_on_with(self, there: list[Snapshot], digest: str, *, fresh: bool) -> str:
        """The id of the run whose snapshots are there already."""
        if not there:
            return uuid4().hex
        if fresh:
            raise ValueError(
                f"Invalid folder: {self.folder} has snapshots, and this run has only begun "
                "(expected an empty one, or the run gone on with from a checkpoint)"
            )
        for snapshot in there:
            if snapshot.about.model != digest:
                raise ValueError(
                    f"Invalid folder: {snapshot.reader.file} is of another model (expected an "
                    "empty folder)"
                )
        return there[-1].about.run

    def _say_cost(self, each: int, there: list[Snapshot]) -> None:
        """Before anything is written."""
        held = sum(s.reader.file.stat().st_size for s in there)
        free = shutil.disk_usage(self.folder).free
        whole = each * (self.keep or 1)
        upto = f", at most {whole / 1e6:,.1f} MB" if self.keep else ", without a limit (keep=None)"
        said = (
            f"{self.folder}: {each / 1e6:,.1f} MB a snapshot every {self.every} steps{upto}; "
            f"{free / 1e6:,.1f} MB are free"
        )
        log.info(said)
        if self._writes and whole > free + held:
            warnings.warn(f"the disk is too small for snapshots: {said}", stacklevel=user_level())

    def _until_due(self) -> int:
        """Steps from those that are known until something is due."""
        known = self._steps or 0
        stops = [stop - known for stop in self._stops if stop > known]
        return min([self.every - known % self.every, *stops])

    # ---- writing -------------------------------------------------------------------------------

    def _write(self, kept: list[Kept], passed: bool) -> list[Path]:
        if not self._written:
            self._clear()
        done = []
        for average in kept:
            gamma = gamma_of_policy(average.policy)
            if not (passed and gamma is not None) and not (gamma is None and average.over):
                continue
            about = self._describe(average, gamma)
            if about.name in self._written:
                continue  # no sample since then
            try:
                self._save(average, about)
            except OSError as error:
                self._warn(error)
                continue
            self._written.add(about.name)
            done.append(self.folder / about.name)
            if gamma is not None:
                self._forget(about)
        return done

    def _describe(self, average: Kept, gamma: float | None) -> About:
        run, digest, rank, world = self._about
        norm, distance = average.lengths()
        return About(
            step=average.step,
            origin=average.policy.start,
            gamma=gamma,
            policy=repr(average.policy),
            rank=rank,
            world=world,
            run=run,
            model=digest,
            norm=norm,
            distance=distance,
            places={} if world == 1 else places_of({**average.tensors, **average.weights}),
        )

    def _save(self, average: Kept, about: About) -> None:
        """An average that has not begun is the weight, which was never trained."""
        held = {**average.weights, **average.tensors}
        shards = {name: local(t).detach() for name, t in held.items()}
        kinds = {name: Kind(self.dtype, tuple(t.shape)) for name, t in shards.items()}
        with Writer(self.folder / about.name, kinds, about.metadata()) as writer:
            for name in writer.names:
                writer.append(shards[name].to(self.dtype))

    def _own(self, end: str = "*") -> list[Path]:
        """This process's files by step."""
        _, _, rank, world = self._about
        return sorted(self.folder.glob(f"step-*.{end}{rank_text(rank, world)}.safetensors"))

    def _clear(self) -> None:
        """Takes away what an earlier life has left half written, or written of later steps."""
        _, _, rank, world = self._about
        with suppress(OSError):
            for part in self.folder.glob(f"step-*{rank_text(rank, world)}.safetensors{PART}"):
                if world > 1 or ".rank-" not in part.name:
                    part.unlink()
            for snapshot in snapshots_in(self.folder):
                about = snapshot.about
                if about.rank == rank and about.step > (self._steps or 0):
                    snapshot.reader.file.unlink()

    def _forget(self, about: About) -> None:
        """Holds the newest."""
        if self.keep is not None:
            with suppress(OSError):
                for file in self._own(f"gamma-{about.gamma:.9g}")[: -self.keep]:
                    file.unlink()

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            warnings.warn(
                f"no snapshot was written ({error}); training goes on, and the next one is tried",
                stacklevel=user_level(),
            )


def _shard(weights: list[Tensor]) -> tuple[int, int, bool]:
    """Rank and world of what this process has of the weights, and whether it writes them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1, True
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if kind_of_shard(weights) is None:
        return 0, 1, rank == 0
    return rank, world, True
