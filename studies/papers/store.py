"""results.json: what was run with what, and every finished run; nothing finished is ever lost."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rbwa_fused
from studies.digits import durable
from studies.digits.results import cpu_name, finite
from studies.papers.settings import Setting
from studies.papers.systems import SYSTEMS

FORMAT = 1
SECTIONS = ("sweep", "runs", "flatness")
Record = dict[str, Any]


class StoreError(Exception):
    """A results file that this command cannot go on with."""


class Key(NamedTuple):
    """What tells one finished run from another; ``lr`` is that of SGD without momentum."""

    section: str
    setting: str
    system: str
    lr: float
    seed: int


class Store:
    """The file in memory, written whole after each run: on the disk there is always a whole one."""

    def __init__(
        self, path: Path, command: str, settings: Sequence[Setting], device: str, **extra: Any
    ) -> None:
        """Takes over what an earlier run of the same settings left at ``path``.

        Raises:
            StoreError: for a file of other settings, which is left as it is.
        """
        self.path = path
        self.head: Record = {
            "format": FORMAT,
            "command": command,
            "settings": {setting.name: asdict(setting) for setting in settings},
            "device": device,
            "versions": {"torch": torch.__version__, "rbwa_fused": rbwa_fused.__version__},
            **extra,
        }
        self.cpu = cpu_name()
        self.python = platform.python_version()
        self.records: dict[Key, Record] = {}
        self.order = {setting.name: place for place, setting in enumerate(settings)}
        if path.exists():
            self._take_over()

    def _take_over(self) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            head = {name: found[name] for name in self.head}
            for section in SECTIONS:
                for record in found[section]:
                    self.records[key_of(section, record)] = record
        except (ValueError, KeyError, TypeError):
            raise StoreError(
                f"{str(self.path)!r} is no results file of this command: move it away or choose "
                f"another --out"
            ) from None
        # In JSON a tuple is a list.
        wanted = json.loads(json.dumps(self.head))
        difference = next(different("", head, wanted), None)
        if difference is not None:
            where, there, here = difference
            raise StoreError(
                f"{str(self.path)!r} holds another experiment ({where}: {there!r} there, {here!r} "
                f"here): choose another --out"
            )
        self.cpu, self.python = found["cpu"], found["python"]

    def add(self, key: Key, record: Record) -> None:
        """Keeps the record and writes the file: synced, then put in place in one piece."""
        self.records[key] = finite(key._asdict() | record)
        self.records[key].pop("section")
        self.save()

    def save(self) -> None:
        """Writes the file."""
        body: Record = {"cpu": self.cpu, "python": self.python}
        keys = sorted(self.records, key=self._place)
        for section in SECTIONS:
            body[section] = [self.records[k] for k in keys if k.section == section]
        durable.write(self.path, as_text(self.head | body).encode())

    def _place(self, key: Key) -> tuple[int, int, str, float, int]:
        system = list(SYSTEMS).index(key.system) if key.system in SYSTEMS else len(SYSTEMS)
        return self.order[key.setting], system, key.system, key.lr, key.seed


def key_of(section: str, record: Record) -> Key:
    return Key(section, record["setting"], record["system"], record["lr"], record["seed"])


def different(where: str, there: Any, here: Any) -> Any:
    """The first leaves at which two JSON values differ: where, and both values."""
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        for name in here:
            yield from different(f"{where}.{name}" if where else name, there[name], here[name])
    elif isinstance(there, dict) and isinstance(here, dict):
        yield where, ", ".join(there), ", ".join(here)
    elif there != here:
        yield where, there, here


def as_text(results: Record) -> str:
    """JSON with a run in each line."""
    lines = []
    for name, value in results.items():
        if name in SECTIONS and value:
            runs = ",\n".join(json.dumps(record, allow_nan=False) for record in value)
            lines.append(f'"{name}": [\n{runs}\n]')
        else:
            lines.append(f'"{name}": {json.dumps(value, ensure_ascii=False, allow_nan=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
