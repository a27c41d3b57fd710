"""Counters on the device: under AMP and in captured graphs only the GPU knows whether it stepped.

GradScaler skips a step if a gradient overflowed, and a captured CUDA graph steps without Python.
Then the steps taken, the samples of each average and the segments' ages live in tensors that a
kernel advances behind the step (csrc/policy.h). The host reads them back only where somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from rbwa_fused.average import Average
from rbwa_fused.engine.samplers import Sampler
from rbwa_fused.rules import Aging
from rbwa_fused.weights import Named, Table

WEIGHT_NUMBERS = 4  # of a policy row, at most
POLICY_COLUMNS = 6 + WEIGHT_NUMBERS


@dataclass
class DeviceCounters:
    """What the kernels need beside the tables of every step; all on the parameters' device.

    Attributes:
        counts: (1 + samplers,) int64, steps taken and the samples of each sampler.
        policies: vector of float64, see `policy_table`.
        samplings64: (2 samplers, 5) float64, rules.Sampling of the step to come.
        samplings32: the same in float32.
        marks: (segments, 2) int32: a segment's age (segments.Table), and what the step under way
            adds to it.
        agings: (segments, 3) float64: room for what its age makes of a segment's row (rules.Aging),
            in the arithmetic of its launch.
        lrs: a float32 learning rate for each param group, in place of its row's; or none at all.
        grad_scale, found_inf: one float32 each, as torch.amp.GradScaler gives them.
        settings, schedules: of schedule-free groups, see Schedules; else None.
    """

    counts: Tensor
    policies: Tensor
    samplings64: Tensor
    samplings32: Tensor
    marks: Tensor
    agings: Tensor
    lrs: Sequence[Tensor | None] = ()
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    settings: Tensor | None = None
    schedules: Tensor | None = None

    @classmethod
    def of(
        cls,
        samplers: Sequence[Sampler],
        samplings: Tensor,
        counts: Sequence[int],
        ages: Sequence[int],
        device: torch.device,
    ) -> DeviceCounters:
        """Moves the host's counters to a device. `samplings` are those of the step to come."""
        policies = policy_table([sampler.policy for sampler in samplers])
        marks = torch.tensor(ages, dtype=torch.int32, device=device).reshape(-1, 1)
        return cls(
            counts=torch.tensor(counts, device=device),
            policies=torch.tensor(policies, dtype=torch.float64, device=device),
            samplings64=samplings.to(device, copy=True),
            samplings32=samplings.to(device, torch.float32, copy=True),
            marks=torch.cat([marks, torch.zeros_like(marks)], dim=1),
            agings=torch.ones(len(ages), len(Aging._fields), dtype=torch.float64, device=device),
        )

    def for_step(
        self, lrs: Sequence[Tensor | None], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> DeviceCounters:
        """The same counters with what belongs to one step, brought to their device."""

        def here(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(self.counts.device, torch.float32)

        return replace(
            self,
            lrs=[here(lr) for lr in lrs],
            grad_scale=here(grad_scale),
            found_inf=here(found_inf),
        )

    def of_segments(self, first: int, count: int) -> DeviceCounters:
        """The same counters with the marks and agings of some of the segments."""
        own = slice(first, first + count)
        return replace(self, marks=self.marks[own], agings=self.agings[own])


def policy_table(policies: Sequence[Average | None]) -> list[float]:
    """A row for each of some named policies, struct Policy of csrc/policy.h; behind all rows what
    they have in tables."""
    rows: list[list[float]] = []
    tables: list[float] = []
    for policy in policies:
        row: list[float] = []
        if policy is not None:
            weight = policy.weight
            assert isinstance(weight, Named)
            stop = math.inf if policy.stop is None else policy.stop
            row = [weight.on_device, policy.origin, policy.every, policy.write_back_every]
            row += [policy.begins, stop, *weight.numbers(policy)]
            if isinstance(weight, Table):
                row.append(len(policies) * POLICY_COLUMNS + len(tables))
                tables += weight.weights
        rows.append(row + [0.0] * (POLICY_COLUMNS - len(row)))
    return [*chain.from_iterable(rows), *tables]
