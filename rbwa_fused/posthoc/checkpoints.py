"""Checkpoints of other programs, read a tensor at a time: of safetensors and of torch.save."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rbwa_fused.posthoc.tensors import Kind, Reader
from rbwa_fused.posthoc.weighted import Source

SAFE = ".safetensors"
ENDINGS = (SAFE, ".pt", ".pth", ".ckpt", ".bin")
# Where a folder for each checkpoint holds the model, as transformers' has it.
INSIDE = ("model.safetensors", "pytorch_model.bin")


class Torchs:
    """A state dict in a file of torch.save, which stays on the disk: its pages are mapped.

    Args:
        key: of the state dict in what the file holds, with dots for dicts in dicts; "" for all.

    Raises:
        ValueError: for a file that holds no dict of tensors there, naming the keys that do, or that
            is none of torch.save, or torn.
    """

    def __init__(self, file: Path, key: str) -> None:
        try:
            held: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except OSError:
            raise
        except Exception as error:
            what = str(error).splitlines()[0]
            raise ValueError(
                f"Invalid file: {file} (expected a whole checkpoint): {what}"
            ) from None
        found: Any = held
        for part in filter(None, key.split(".")):
            found = found.get(part) if isinstance(found, Mapping) else None
        found = found if isinstance(found, Mapping) else None
        if not _is_state_dict(found):
            keys = [k for k, v in held.items() if _is_state_dict(v)] if _mapping(held) else []
            such = f", such as {' or '.join(keys)}" if keys else ""
            others = {n: v for n, v in found.items() if not isinstance(v, Tensor)} if found else {}
            other = next((f"{n} is of {type(v).__name__}; " for n, v in others.items()), "")
            raise ValueError(
                f"Invalid key: {key!r} of {file} holds no state dict ({other}expected one that "
                f"does{such})"
            )
        self._tensors: dict[str, Tensor] = dict(found)
        for name, tensor in self._tensors.items():
            if tensor.layout != torch.strided or tensor.is_quantized:
                raise ValueError(
                    f"Invalid file: {file} has {name}, which is sparse or quantized (expected "
                    "dense tensors of numbers)"
                )
        self._flat: tuple[str, Tensor] | None = None  # the tensor that was read last
        self.kinds = {n: Kind(t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}

    def read(self, name: str, first: int, count: int) -> Tensor:
        """As Reader's."""
        if self._flat is None or self._flat[0] != name:  # made contiguous once, not for each piece
            self._flat = name, self._tensors[name].detach().reshape(-1)
        return self._flat[1][first : first + count]


def _mapping(held: Any) -> bool:
    return isinstance(held, Mapping) and all(isinstance(key, str) for key in held)


def _is_state_dict(held: Any) -> bool:
    return _mapping(held) and bool(held) and all(isinstance(v, Tensor) for v in held.values())


def opened(file: Path, key: str = "") -> Source:
    """A checkpoint, of which no tensor was read.

    Raises:
        ValueError: for one that is torn, or has no state dict under that key.
        OSError: for one that cannot be read.
    """
    if file.suffix == SAFE:
        if key:
            raise ValueError(f"Invalid key: {key!r} (expected none: {file} has no dicts in dicts)")
        return Reader(file)
    return Torchs(file, key)


def latest(folder: Path, count: int, out: Path | None = None) -> list[Path]:
    """The last checkpoints of a folder by the numbers in their names: files, or else folders of one
    that are named with a step. Where some have numbers those without are left out, such as
    Lightning's last.ckpt, and ``out`` is in any case.

    Raises:
        ValueError: for a folder that has fewer.
        OSError: for one that cannot be read.
    """
    inside = sorted(folder.iterdir())
    files = [file for file in inside if file.suffix in ENDINGS and not file.name.startswith(".")]
    if not files:
        files = [sub / name for sub in inside for name in INSIDE if (sub / name).is_file()]
    files = [file for file in files if out is None or file.resolve() != out.resolve()]
    numbered = [file for file in files if re.search(r"\d", str(file.relative_to(folder)))]
    files = numbered or files
    if len(files) < count:
        raise ValueError(f"Invalid count: {count} of {folder} (expected at most {len(files)})")
    return sorted(files, key=lambda file: _natural(file.relative_to(folder)))[-count:]


def _natural(file: Path) -> list[tuple[int, int | str]]:
    """Numbers in a name by their values."""
    parts = re.split(r"(\d+)", str(file))
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def refuse_differences(files: Sequence[Path], sources: Sequence[Source]) -> None:
    """Raises ValueError for tensors that not all have, or have in another shape or dtype."""
    first = sources[0].kinds
    said = []
    for file, source in zip(files[1:], sources[1:], strict=True):
        missing = [name for name in first if name not in source.kinds]
        further = [name for name in source.kinds if name not in first]
        other = [
            f"{name} {_text(first[name])} and {_text(kind)}"
            for name, kind in source.kinds.items()
            if name in first and kind != first[name]
        ]
        told = (("lacks", missing), ("alone has", further), ("differs in", other))
        parts = [f"{what} {', '.join(names)}" for what, names in told if names]
        if parts:
            said.append(f"{file} {' and '.join(parts)}")
    if said:
        raise ValueError(f"{files[0]} cannot be merged: {'; '.join(said)}")


def _text(kind: Kind) -> str:
    return f"{str(kind.dtype).removeprefix('torch.')}{list(kind.shape)}"
