"""Averages of any length, made of a run's snapshots when it is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from rbwa_fused.numbers import number
from rbwa_fused.posthoc.folder import Snapshot, rank_text
from rbwa_fused.posthoc.joined import join, whole_kinds
from rbwa_fused.posthoc.members import Members, members_of
from rbwa_fused.posthoc.profiles import Profile, Solution, solve
from rbwa_fused.posthoc.tensors import Kind, Reader
from rbwa_fused.posthoc.weighted import sums_in_memory, write_sums
from rbwa_fused.power import gamma_of, sigma_rel_of

MOST = 0.1  # the residual, and the error by rounding, above which nothing is made unasked
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Synthesis:
    """An average that was made, or can be.

    Attributes:
        residual: the distance of its profile from the one asked for, relative to that one's norm.
            Errors, relative to the true average's distance from the weights, were 0.15 to 2.4 times
            it where it was not 0 (docs/posthoc.md).
        sigma_rel, gamma: asked for.
        realised: the sigma_rel of the profile that was made.
        rounding: the error that 16-bit snapshots add, relative to the average's distance from the
            weights; 0 of wider ones.
        step: behind which the average would have taken its last sample.
        profiles, weights: of the snapshots that make it, whose sum is 1.
        files: that were written: one, or of flat shards one for each rank.
        state_dict: the average by name, where no file was asked for.
    """

    residual: float
    sigma_rel: float
    gamma: float
    realised: float
    rounding: float
    step: int
    profiles: tuple[Profile, ...] = field(repr=False)
    weights: tuple[float, ...] = field(repr=False)
    files: tuple[Path, ...] = ()
    state_dict: dict[str, Tensor] | None = field(default=None, repr=False)


def planned(
    members: Members, *, sigma_rel: float | None = None, gamma: float | None = None
) -> Synthesis:
    """What a synthesis would come to; no tensor is read.

    Raises:
        ValueError, TypeError: for lengths out of range, and for both arguments or none.
    """
    if (sigma_rel is None) == (gamma is None):
        raise TypeError("synthesize needs sigma_rel or gamma (expected one of the two)")
    if gamma is None:
        sigma_rel = number("sigma_rel", sigma_rel)
        gamma = gamma_of(sigma_rel)
    else:
        sigma_rel = sigma_rel_of(gamma)
    profiles = members.profiles
    solved = solve(profiles, Profile(members.t, gamma))
    if not math.isfinite(solved.residual):
        raise ValueError(f"Invalid gamma: {gamma} (expected a power whose profile has a length)")
    return Synthesis(
        residual=solved.residual,
        sigma_rel=sigma_rel,
        gamma=gamma,
        realised=solved.sigma_rel,
        rounding=_rounding(members, solved, sigma_rel),
        step=members.step,
        profiles=tuple(profiles),
        weights=solved.weights,
    )


def synthesize(
    folder: str | PathLike[str],
    *,
    sigma_rel: float | None = None,
    gamma: float | None = None,
    step: int | None = None,
    out: str | PathLike[str] | None = None,
    most: float = MOST,
) -> Synthesis:
    """Makes the average of a length of the snapshots of a run; see ``sweep`` for several.

    Args:
        folder: of ``Snapshots``.
        sigma_rel (float, 0 to 0.2887): the length asked for, the standard deviation of its profile
            relative to the steps since the averages' start.
        gamma (float): its power instead, above -1/2.
        step (int, optional): a snapshot's; later ones are left out (default: the last).
        out (optional): the safetensors file to write; it has whole tensors, also of
            FSDP2's and tensor parallel shards. FSDP1's flat shards make a file for each rank, with
            ``.rank-0-of-4`` before the ending. Without it the average is in the memory (default:
            None).
        most (float): the largest residual, and error by rounding, to go on with (default: 0.1).

    Raises:
        ValueError, TypeError: for a folder of snapshots that do not belong together or are torn, a
            step without one, naming its neighbours, a length out of range or that the snapshots do
            not span, and for sharded snapshots without ``out``.
        OSError: for what cannot be read or written.
    """
    members = members_of(folder, step)
    plan = planned(members, sigma_rel=sigma_rel, gamma=gamma)
    refuse_too_far([plan], most)
    if out is not None and Path(out).is_dir():
        raise ValueError(f"Invalid out: {out} (expected a file, not a folder)")
    if out is not None:
        return written(members, [plan], [Path(out)])[0]
    if len(members.ranks[0]) > 1:
        raise ValueError("Invalid out: None (expected a file, since the snapshots are sharded)")
    readers = [row[0].reader for row in members.ranks]
    return replace(plan, state_dict=sums_in_memory(readers, plan.weights, made_of(readers)))


def sweep(
    folder: str | PathLike[str],
    sigma_rels: Sequence[float],
    out: str | PathLike[str],
    *,
    step: int | None = None,
    most: float = MOST,
) -> list[Synthesis]:
    """Makes averages of several lengths, which reads the snapshots once. Files in ``out``, a folder
    that is made, are named by length and step. Arguments and errors are those of ``synthesize``.
    """
    members = members_of(folder, step)
    plans = [planned(members, sigma_rel=sigma_rel) for sigma_rel in sigma_rels]
    refuse_too_far(plans, most)
    files = files_of(plans, Path(out))
    Path(out).mkdir(parents=True, exist_ok=True)
    return written(members, plans, files)


def files_of(plans: Sequence[Synthesis], out: Path) -> list[Path]:
    """The files of a sweep, in a folder.

    Raises:
        ValueError: for no lengths, and for two whose files would have one name.
    """
    if not plans:
        raise ValueError("Invalid sigma_rels: [] (expected at least one)")
    files: dict[Path, Synthesis] = {}
    for plan in plans:
        file = out / f"sigma-{plan.sigma_rel:.6g}.step-{plan.step:09d}.safetensors"
        if file in files:
            raise ValueError(
                f"Invalid sigma_rel: {files[file].sigma_rel!r} and {plan.sigma_rel!r} have both "
                f"the file {file.name} (expected lengths that differ in six digits)"
            )
        files[file] = plan
    return list(files)


def refuse_too_far(plans: Sequence[Synthesis], most: float) -> None:
    """Raises ValueError, naming each length that the snapshots do not span and why."""
    if not number("most", most) >= 0.0:
        raise ValueError(f"Invalid most: {most} (expected at least 0)")
    far = [
        f"{plan.sigma_rel:.6g} has {what} of {value:.2g}"
        for plan in plans
        for what, value in (("a residual", plan.residual), ("a rounding error", plan.rounding))
        if not value <= most
    ]
    if far:
        raise ValueError(
            f"Invalid sigma_rel: {', '.join(far)} (expected at most most={most:g}; more or wider "
            "snapshots span more)"
        )


def written(
    members: Members,
    plans: Sequence[Synthesis],
    files: Sequence[Path],
    done: Callable[[int], object] = lambda count: None,
) -> list[Synthesis]:
    """Reads the snapshots once and writes the averages, rank by rank.

    Args:
        done: is told how many elements were read.
    """
    made: list[list[Path]] = [[] for _ in plans]
    world = len(members.ranks[0])
    for rank in range(world):
        own = [f.with_name(f"{f.stem}{rank_text(rank, world)}{f.suffix}") for f in files]
        sources: list[Reader] = [row[rank].reader for row in members.ranks]
        rows = [plan.weights for plan in plans]
        metadata, kinds = [_metadata(plan) for plan in plans], made_of(sources)
        write_sums(sources, rows, own, metadata, kinds, done)
        for paths, file in zip(made, own, strict=True):
            paths.append(file)
    if world > 1:
        made = [_whole(members, paths, file) for paths, file in zip(made, files, strict=True)]
    return [replace(plan, files=tuple(paths)) for plan, paths in zip(plans, made, strict=True)]


def made_of(readers: Sequence[Reader]) -> dict[str, Kind]:
    """What is made of snapshots: the widest of their dtypes, and float32 of 16 bits, which were
    rounded enough."""
    kinds = {}
    for name, kind in readers[-1].kinds.items():
        dtype = kind.dtype
        for reader in readers:
            dtype = torch.promote_types(dtype, reader.kinds[name].dtype)
        kinds[name] = Kind(torch.float32 if dtype in ROUNDING else dtype, kind.shape)
    return kinds


def _whole(members: Members, parts: list[Path], out: Path) -> list[Path]:
    """One file in the place of one for each rank, where it is known how they belong together."""
    places = [snapshot.about.places for snapshot in members.ranks[-1]]
    kinds = whole_kinds([Reader(part).kinds for part in parts], places)
    if kinds is None:
        return parts
    join(parts, places, kinds, out)
    for part in parts:
        part.unlink()
    return [out]


def _metadata(plan: Synthesis) -> dict[str, str]:
    told = {
        "sigma_rel": plan.sigma_rel,
        "residual": plan.residual,
        "realised": plan.realised,
        "step": plan.step,
    }
    return {"format": "pt", **{name: f"{value:.9g}" for name, value in told.items()}}


def _rounding(members: Members, solved: Solution, sigma_rel: float) -> float:
    """The error that rounded snapshots add: sqrt(sum of (w |S - rounded S|)^2) / |a - theta|. It
    was within 10 % of what was measured."""
    norms = [math.hypot(*map(_lost, row)) for row in members.ranks]
    off = math.hypot(*(w * norm for w, norm in zip(solved.weights, norms, strict=True)))
    if off == 0.0:
        return 0.0
    distance = _distance(members, sigma_rel)
    return off / distance if distance > 0.0 else math.inf


def _lost(snapshot: Snapshot) -> float:
    """The norm of what a snapshot's dtype has lost. Where an older file does not say it, it is
    estimated: u / sqrt 6 of the average's norm with u = 2^-11 of float16 and 2^-8 of bfloat16."""
    if snapshot.about.rounded is not None:
        return snapshot.about.rounded
    kinds = snapshot.reader.kinds.values()
    unit = max((ROUNDING.get(kind.dtype, 0.0) for kind in kinds), default=0.0)
    return unit / math.sqrt(6.0) * snapshot.about.norm


def _distance(members: Members, sigma_rel: float) -> float:
    """Of the average from the weights of its step: on a line through what the last snapshots of
    each length say, in logarithms; beyond them what the nearest says."""
    last: dict[float, float] = {}
    for row in members.ranks:
        length = sigma_rel_of(row[0].about.profile.gamma)
        last[length] = math.hypot(*(s.about.distance for s in row))
    lengths = sorted(last)
    nearest = min(max(sigma_rel, lengths[0]), lengths[-1])
    for a, b in pairwise(lengths):
        if a <= nearest <= b and last[a] > 0.0 and last[b] > 0.0:
            share = math.log(nearest / a) / math.log(b / a)
            return math.exp((1 - share) * math.log(last[a]) + share * math.log(last[b]))
    return last[min(lengths, key=lambda length: abs(length - nearest))]
