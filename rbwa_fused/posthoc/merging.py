"""Merges of checkpoints: weighted means of those of one run, or of several that began alike."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch

from rbwa_fused.numbers import number
from rbwa_fused.posthoc.checkpoints import SAFE, opened, refuse_differences
from rbwa_fused.posthoc.tensors import NAMES, part_of
from rbwa_fused.posthoc.weighted import Source, sums_in_memory, write_sums

DECAYS = ("linear", "sqrt", "cosine")


def decay_weights(decay: str, count: int) -> list[float]:
    """The weights of checkpoints in their order with which their mean imitates a learning rate that
    decays over them, c_j = f_(j-1) - f_j for factors f that fall from 1 to 0. Their sum is 1.

    ``"linear"`` makes equal weights, ``"sqrt"`` (f = 1 - sqrt(j / count)) the larger first ones,
    ``"cosine"`` (f = (1 + cos(pi j / count)) / 2) the largest in the middle.
    """
    if decay not in DECAYS:
        raise ValueError(f"Invalid decay: {decay!r} (expected one of {DECAYS})")
    if decay == "linear":
        return [1.0 / count] * count
    if decay == "sqrt":
        return [(math.sqrt(j) - math.sqrt(j - 1)) / math.sqrt(count) for j in range(1, count + 1)]
    half = math.pi / (2 * count)  # differences of cosines would cancel
    return [math.sin((2 * j - 1) * half) * math.sin(half) for j in range(1, count + 1)]


def merge_files(
    files: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    decay: str = "linear",
    key: str = "",
    done: Callable[[int], object] = lambda count: None,
) -> list[float]:
    """Writes the weighted mean of checkpoints, in float64 and then in their dtypes.

    What has no fractions, such as a count of batches, is that of the last. A safetensors file is
    written a piece of a tensor at a time, whatever is read; one of torch.save, which any other
    ending asks for, takes the memory of one model.

    Args:
        files: safetensors or torch.save's, of which the tensors alone are read, in the order of the
            steps where ``decay`` says the weights.
        out: file to write or replace.
        weights: of the files; they are divided by their sum (default: what ``decay`` says).
        decay (str): "linear" (equal weights), "sqrt" or "cosine" (default: "linear").
        key (str): of the state dict in torch.save's files, such as "model" or "state_dict", with
            dots for dicts in dicts (default: "", all of the file).
        done: is told how many elements were read.

    Returns:
        The weights, whose sum is 1.

    Raises:
        ValueError, TypeError: for no files or weights, another number of them, a sum that is not
            above 0, a file that is torn or has no state dict, and tensors that not all have in one
            shape and dtype, which are listed.
        OSError: for what cannot be read or written.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("Invalid files: [] (expected at least one)")
    given = decay_weights(decay, len(paths)) if weights is None else list(weights)
    row = [number(f"weights[{i}]", weight) for i, weight in enumerate(given)]
    if len(row) != len(paths):
        raise ValueError(f"Invalid weights: {len(row)} (expected {len(paths)}, one for each file)")
    finite = all(map(math.isfinite, row))
    largest = max(map(abs, row)) if finite else 0.0
    scaled = [weight / largest for weight in row] if largest > 0.0 else [0.0]
    total = math.fsum(scaled)  # of the row itself it may be infinite
    if not total > 0.0:
        raise ValueError(f"Invalid weights: {row} (expected finite ones with a sum above 0)")
    row = [weight / total for weight in scaled]
    sources: list[Source] = [opened(path, key) for path in paths]
    refuse_differences(paths, sources)
    kinds = sources[-1].kinds
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"Invalid out: {out} (expected a file, not a folder)")
    if out.suffix == SAFE:
        for name, kind in kinds.items():
            if kind.dtype not in NAMES:
                raise ValueError(
                    f"Invalid out: {out} (expected another ending: safetensors has no "
                    f"{kind.dtype}, which {name} is of)"
                )
        write_sums(sources, [row], [out], [{"format": "pt"}], kinds, done)
    else:
        part = part_of(out)
        try:
            torch.save(sums_in_memory(sources, row, kinds, done), part)
            os.replace(part, out)
        except RuntimeError as error:  # as torch.save says that a disk is full
            raise OSError(f"{part} cannot be written: {str(error).splitlines()[0]}") from error
        finally:
            part.unlink(missing_ok=True)
    return row
