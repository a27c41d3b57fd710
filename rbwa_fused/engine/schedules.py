"""What schedule-free groups count, where the devices do (csrc/schedule.h).

Each device has a table of all groups' counts. A kernel before the step makes of it the numbers that
are others at each step, and `advance` behind the step lets it move on, unless the step was skipped.
What the host says of a step is a tensor that nobody writes to, but for learning rates that lie on a
device: a captured graph reads the one that it was captured with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from rbwa_fused import progress, rules
from rbwa_fused.engine import checks
from rbwa_fused.engine.doors import Call
from rbwa_fused.engine.rows import Group, GroupPlan

NUMBERS = 4  # of a row, that a step makes
SCHEDULE_COLUMNS = 2 * len(progress.COUNTED) + NUMBERS  # struct Schedule
SETTING_COLUMNS = 3 + len(progress.HYPERPARAMETERS)  # struct Setting
LR = SETTING_COLUMNS - 1


class Schedules:
    """The counts of some groups on each of their devices.

    Attributes:
        tables: (groups, 12) float64 each: what is counted, what the step to come leaves of it, and
            its c, alpha, gamma and rho.
        settings: (groups, 6) float64 each: whether the group takes part in the step (1 or 0), beta,
            warmup_steps, r, weight_lr_power and lr.
    """

    def __init__(self, plans: Sequence[GroupPlan], devices: Iterable[torch.device]) -> None:
        # Of what is beside the parameters nothing is counted.
        self._groups = {i: p.group for i, p in enumerate(plans) if p.rule.scheduled is not None}
        self._count = len(plans)
        self._told = {i: _counted(group) for i, group in self._groups.items()}
        rows = [[0.0] * SCHEDULE_COLUMNS for _ in plans]
        for i, counted in self._told.items():
            rows[i][: len(counted)] = map(float, counted)
        table = torch.tensor(rows, dtype=torch.float64, device="cpu")
        self.tables = {device: table.to(device, copy=True) for device in devices}
        self.settings: dict[torch.device, Tensor] = {}
        self._said: list[tuple[float, ...]] | None = None  # in `settings`
        self._sent: list[Tensor] = []  # what they were copied from
        self._captured: list[object] = []  # what graphs read at their replays

    def before(self, taking_part: AbstractSet[int], lrs: Sequence[Tensor | None]) -> list[Call]:
        """Brings the settings up to date. Returns what is to be done before the step.

        Args:
            taking_part: the groups with a gradient.
            lrs: of each group its learning rate, where that is read on the devices.
        """
        calls: list[Call] = []
        said = [(0.0,) * SETTING_COLUMNS] * self._count
        for i, group in self._groups.items():
            lr = 0.0 if lrs[i] is not None else float(group["lr"])
            said[i] = (float(i in taking_part), *rules.settings(group), lr)
            calls += self._assigned(i, group)
        capturing = checks.capturing()
        if said != self._said:
            sent = {device: _sent(said, device) for device in self.tables}
            self.settings = {device: table for device, (_, table) in sent.items()}
            self._sent = [staging for staging, _ in sent.values()]
            # What is sent while a graph is captured comes at its replays only.
            self._said = None if capturing else said
        if capturing:
            self._captured.append((self._sent, self.settings))
        for settings in self.settings.values():
            for i in self._groups:
                lr_there = lrs[i]
                if lr_there is not None:
                    calls.append((settings[i, LR : LR + 1].copy_, lr_there.detach().reshape(1)))
        return calls

    def _assigned(self, i: int, group: Group) -> list[Call]:
        """What tells the devices of counts that somebody has written to a group."""
        counted = _counted(group)
        if counted == self._told[i]:
            return []
        own = torch.tensor(list(map(float, counted)), dtype=torch.float64, device="cpu")
        calls: list[Call] = [(table[i, : len(own)].copy_, own) for table in self.tables.values()]
        return [*calls, (self._told.__setitem__, i, counted)]

    def read_back(self) -> None:
        """Brings the counts into the groups, but for those that somebody has written to since;
        waits for a device."""
        rows = next(iter(self.tables.values())).tolist()
        for i, group in self._groups.items():
            if _counted(group) == self._told[i]:
                k, *others = rows[i][: len(progress.COUNTED)]
                group.update(zip(progress.COUNTED, (int(k), *others), strict=True))
                self._told[i] = _counted(group)


def _counted(group: Group) -> tuple[float, ...]:
    return tuple(group[key] for key in progress.COUNTED)


def _sent(rows: Sequence[Sequence[float]], device: torch.device) -> tuple[Tensor, Tensor]:
    """A table in memory from which it can be copied while the host goes on, and on the device."""
    pinned = device.type != "cpu"
    staging = torch.tensor(rows, dtype=torch.float64, device="cpu", pin_memory=pinned)
    return staging, staging.to(device, non_blocking=True)
