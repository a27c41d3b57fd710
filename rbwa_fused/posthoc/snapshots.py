"""Snapshots: averages of a run in files, from which others are made when the run is over."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from rbwa_fused.averages import Averages
from rbwa_fused.engine.backends import user_level
from rbwa_fused.engine.sharded import local
from rbwa_fused.numbers import integer
from rbwa_fused.posthoc.begun import (
    began_of,
    note,
    refuse_averages,
    refuse_counts,
    refuse_others,
    run_of,
    shard_of,
)
from rbwa_fused.posthoc.folder import About, Snapshot, model_digest, snapshots_in
from rbwa_fused.posthoc.joined import places_of
from rbwa_fused.posthoc.kept import (
    Kept,
    all_kept,
    gamma_of_policy,
    owners_of,
    policies_of,
    weights_of,
)
from rbwa_fused.posthoc.own import Own
from rbwa_fused.posthoc.tensors import Kind, Writer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
log = logging.getLogger("rbwa_fused.posthoc")


class Snapshots:
    """Writes averages into a folder while they are trained, for ``posthoc.synthesize``.

    Say ``update(opt, model)`` behind each step. Where a multiple of ``every`` has been passed it
    writes each average that has a power profile (``rf.power_ema``, and ``rf.mean``, whose power is
    0), and where a window has ended (``rf.merge``) its average, whatever ``every`` is. An average
    is not written before its first sample, and again only after another one.

    A file is whole or not there: a run may be killed at any moment. One that is resumed from a
    checkpoint replaces what it comes by again, and takes away what an earlier life wrote behind
    that checkpoint. Where a write fails, as on a full disk or of a value that ``dtype`` does not
    hold, training goes on, the files that were there stay, one warning says so, and the next
    multiple is tried again.

    Sharded parameters (FSDP2, FSDP1, tensor parallel) are written by each rank, as its own shards,
    without communication; of replicas (DDP) rank 0 writes.

    Args:
        folder: that gets a safetensors file for each step, average and rank; it is made.
        every (int, steps, >= 1): how often.
        keep (int, optional): how many of each average to hold, the newest; averages of windows stay
            in any case. Few reach less far back: of the pair 0.05 and 0.10 the last 5 of 10 make
            0.15 with a residual of 3.5 %, all 10 with 2.2 %. None is all (default: None).
        dtype (torch.dtype): of the files: float32, float64, bfloat16 or float16. 16 bits round off
            more than averages differ once the weights have settled, and float16 ends at 65504;
            what is lost is measured, and ``synthesize`` says it (default: torch.float32).

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
        self._life: list[tuple[int, int]] = []  # the owners' engines, and how often they were built
        self._began = 0  # the steps with which that life began
        self._stops: list[int] = []  # where windows end
        self._run, self._model = "", ""  # a run's id, and a digest of names and shapes
        self._own = Own(self.folder, 0, 1)
        self._writes = True  # this process, and not a replica of it
        self._wrote = False  # in this life
        self._written: set[str] = set()  # names, in this life
        self._failed: set[type] = set()  # errors of which it was warned

    def update(
        self, opt: Averages | Sequence[Averages], model: nn.Module | None = None
    ) -> list[Path]:
        """Writes what is due behind a step; most calls only look at the step.

        Args:
            opt: one of this package's optimizers, an Averager, or several of one model that have
                counted the same steps. Those of one policy have parts of one average.
            model: whose parameters have the averages; an Averager of a module knows it.

        Returns:
            The files written by this process.

        Raises:
            ValueError, TypeError: at the first call, for averages of which none has a profile or an
                end, for two with one profile, for param groups with different policies, for several
                that have counted different steps, and for a folder with snapshots of another run,
                model or number of shards; at the first write, for one that another Snapshots has
                written to meanwhile.
            RuntimeError: inside ``averaged()``, where the averages are in the place of the weights.
        """
        owners = owners_of(opt)
        for owner in owners:
            owner.engine.refuse_inside_averaged("Snapshots.update")
        before, engine = self._steps, owners[0].engine
        life = [(id(owner.engine), owner.engine.builds) for owner in owners]
        begins = life != self._life
        self._unread += 1
        counting = not begins and engine.device_counters is not None
        if counting and self._unread < self._until_due():
            return []  # so many steps were not taken, whatever the device has counted
        engine.read_back()
        steps, self._unread = engine.steps, 0
        if before is None or begins:
            before = self._begin(owners, model, life)
        self._steps = steps
        passed = steps // self.every > before // self.every
        ended = any(before < stop <= steps for stop in self._stops)
        owed = begins and any(stop <= before for stop in self._stops)
        if not self._writes or not (passed or ended or owed):
            return []
        files = self._write(all_kept(owners, model), passed)
        if files:
            note(engine, self._run)
        return files

    def bytes_of(self, opt: Averages | Sequence[Averages], model: nn.Module | None = None) -> int:
        """What one snapshot of all averages with a profile takes on this process's disk."""
        elements = 0
        for owner in owners_of(opt):
            profiles = [p for p in policies_of(owner) if gamma_of_policy(p) is not None]
            own = sum(local(p).numel() for p in weights_of(owner, model).values())
            elements += own * len(profiles)
        return elements * self.dtype.itemsize

    # ---- the first call ------------------------------------------------------------------------

    def _begin(
        self, owners: Sequence[Averages], model: nn.Module | None, life: list[tuple[int, int]]
    ) -> int:
        """The steps that a life begins behind. Where a checkpoint was loaded into the averages that
        there were, the folder is this run's."""
        if [engine for engine, _ in life] != [engine for engine, _ in self._life]:
            began, there = self._meet(owners, model)
        else:
            began, there = owners[0].engine.began, self._own.snapshots()
        self._life, self._began, self._wrote = life, began, False
        self._written = {
            s.reader.file.name for s in there if s.about.gamma is None and s.about.step <= began
        }
        return began

    def _meet(
        self, owners: Sequence[Averages], model: nn.Module | None
    ) -> tuple[int, list[Snapshot]]:
        """Looks at averages and a folder for the first time. The steps that the life begins behind,
        and this process's snapshots there."""
        policies = list({p.describe(): p for owner in owners for p in policies_of(owner)}.values())
        refuse_averages(policies)
        refuse_counts(owners)
        weights = {n: p for owner in owners for n, p in weights_of(owner, model).items()}
        rank, world, self._writes = shard_of(list(weights.values()))
        self.folder.mkdir(parents=True, exist_ok=True)
        there = snapshots_in(self.folder) if self._writes else []
        digest = _digest(weights)
        began = began_of(owners[0].engine, there)
        self._run = run_of(self.folder, there, world, rank, digest, began)
        self._own, self._model = Own(self.folder, rank, world), digest
        self._stops = [policy.stop for policy in policies if policy.stop is not None]
        there = [s for s in there if s.about.rank == rank]
        self._say_cost(self.bytes_of(owners, model), there)
        return began, there

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
        """What a life that was given up has written behind the step that this one began behind goes
        once this one has written."""
        if not self._wrote:
            refuse_others(self._own.snapshots(), self._run)
            self._own.clear_parts()
        done = []
        for average in kept:
            gamma = gamma_of_policy(average.policy)
            if not (passed and gamma is not None) and not (gamma is None and average.over):
                continue
            try:
                about = self._describe(average, gamma)
                if about.name in self._written:
                    continue  # no sample since then
                self._save(average, about)
            except (OSError, OverflowError) as error:
                self._warn(error)
                continue
            self._written.add(about.name)
            done.append(self.folder / about.name)
            if gamma is not None and self.keep is not None:
                self._own.hold(self.keep, about)
        if done and not self._wrote:
            self._wrote = True
            self._own.clear_behind(self._began, self._written)
        return done

    def _describe(self, average: Kept, gamma: float | None) -> About:
        norm, distance = average.lengths()
        model = _digest({**average.weights, **average.tensors})
        if model != self._model:
            self._model = model
            warnings.warn(
                f"{self.folder}: the parameters that are averaged are others than before step "
                f"{average.step}: nothing is made of snapshots from both sides of it",
                stacklevel=user_level(),
            )
        return About(
            step=average.step,
            origin=average.policy.start,
            gamma=gamma,
            policy=average.policy.describe(),
            rank=self._own.rank,
            world=self._own.world,
            run=self._run,
            model=model,
            norm=norm,
            distance=distance,
            places=(
                {} if self._own.world == 1 else places_of({**average.tensors, **average.weights})
            ),
            rounded=average.rounded(self.dtype),
        )

    def _save(self, average: Kept, about: About) -> None:
        shards = average.shards()
        kinds = {name: Kind(self.dtype, tuple(t.shape)) for name, t in shards.items()}
        with Writer(self.folder / about.name, kinds, about.metadata()) as writer:
            for name in writer.names:
                writer.append(shards[name].to(self.dtype))

    def _warn(self, error: Exception) -> None:
        if type(error) not in self._failed:
            self._failed.add(type(error))
            warnings.warn(
                f"no snapshot was written ({error}); training goes on, and the next one is tried",
                stacklevel=user_level(),
            )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return model_digest({n: Kind(t.dtype, tuple(t.shape)) for n, t in tensors.items()})
