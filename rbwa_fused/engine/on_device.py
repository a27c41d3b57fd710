"""Steps that the devices count, because only they know whether one was skipped (counters.py).

All counters are handed over when the first such step is taken, stay for as long as the tables do,
and are read back where somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch
from torch import Tensor

from rbwa_fused import rules
from rbwa_fused.engine.counters import DeviceCounters
from rbwa_fused.engine.doors import Call, Grads
from rbwa_fused.engine.schedules import Schedules
from rbwa_fused.engine.sharded import local
from rbwa_fused.engine.tables import Served, Tables

Launching = Callable[[Served, Grads, DeviceCounters | None], list[Call]]


class OnDevice:
    """The counters of some tables, on each of their devices."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        plan = tables.plan
        plan.sample()
        ages: dict[torch.device, list[int]] = {}
        for table, _ in tables.launches:
            ages.setdefault(table.params[0].device, []).extend(table.ages)
        self._counters = {
            device: DeviceCounters.of(plan.samplers, plan.tensors[1], plan.counts, own, device)
            for device, own in ages.items()
        }
        self._schedules = Schedules(plan.groups, ages) if tables.scheduled else None

    def calls(
        self,
        gathered: Sequence[tuple[Served, Grads]],
        launch: Launching,
        capturable: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        taking_part: AbstractSet[int] = frozenset(),
    ) -> list[Call]:
        """What steps all tables and lets each device count, or not: nothing waits for it here.

        Args:
            launch: what steps one table.
            capturable: whether kernels read learning rates that lie on their device.
            taking_part: the groups with a gradient, where their rule counts that.
        """
        groups = self._tables.plan.groups
        lrs: list[Tensor | None] = [None] * len(groups)
        if capturable:
            lrs = [rules.lr_on_device(group.group) for group in groups]
        first = dict.fromkeys(self._counters, 0)  # segment of a device's next table
        counting = {}
        calls: list[Call] = []
        schedules = self._schedules
        if schedules is not None:
            calls += schedules.before(taking_part, lrs)
            lrs = [None] * len(groups)  # eta of their rows is 1
        for device, counters in self._counters.items():
            counting[device] = counters.for_step(lrs, grad_scale, found_inf)
            if schedules is not None:
                own = schedules.settings[device], schedules.tables[device]
                counting[device] = replace(counting[device], settings=own[0], schedules=own[1])
        for one, grads in gathered:
            params = one[0].params
            device, count = params[0].device, len(params)
            calls += launch(one, grads, counting[device].of_segments(first[device], count))
            first[device] += count
            if grad_scale is not None:
                calls.append((_bring_back, grads, params))
        for device, counters in counting.items():
            advance = next(
                b.advance for t, b in self._tables.launches if t.params[0].device == device
            )
            assert advance is not None
            calls.append((advance, counters))
        return calls

    def read_back(self) -> None:
        """Brings the counters back into the tables; waits for the devices."""
        plan = self._tables.plan
        plan.counts[:] = next(iter(self._counters.values())).counts.tolist()
        ages = {device: d.marks[:, 0].tolist() for device, d in self._counters.items()}
        for table, _ in self._tables.launches:
            own, n = ages[table.params[0].device], len(table.params)
            table.set_ages(own[:n])
            del own[:n]
        if self._schedules is not None:
            self._schedules.read_back()


def _bring_back(grads: Grads, params: list[Tensor]) -> None:
    """Unscaled gradients, from copies in the parameters' layouts to those that users see."""
    for g, p in zip(grads, params, strict=True):
        if g is not None and p.grad is not None:
            seen = local(p.grad)
            if g is not seen:
                seen.copy_(g)
