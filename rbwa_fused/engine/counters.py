"""Counters on the device, where only the device knows whether a step was skipped.

Under AMP a step is skipped if a gradient overflowed, and a captured CUDA graph steps without
Python. In both cases the steps taken, the samples of each average and the marks of first steps live
in tensors that a kernel advances behind the step (csrc/policy.h); the host reads them back only
where somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rbwa_fused.average import Algorithm2, Average, Ema, Mean
from rbwa_fused.engine.rows import Sampler

POLICY_COLUMNS = 8


@dataclass
class DeviceCounters:
    """What the kernels need beside the tables of every step; all on the parameters' device.

    Attributes:
        counts: (1 + samplers,) int64, steps taken and the samples of each sampler.
        policies: (samplers, 8) float64, see `policy_row`.
        samplings64: (2 samplers, 5) float64, rules.Sampling of the step to come.
        samplings32: the same in float32.
        marks: (segments, 2) int32: whether a segment has taken its first step with momentum, and
            whether the step under way did that.
        lrs: a float32 learning rate for each param group, in place of its row's; or none at all.
        grad_scale, found_inf: one float32 each, as torch.amp.GradScaler gives them.
    """

    counts: Tensor
    policies: Tensor
    samplings64: Tensor
    samplings32: Tensor
    marks: Tensor
    lrs: Sequence[Tensor | None] = ()
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(
        cls,
        samplers: Sequence[Sampler],
        samplings: Tensor,
        steps: int,
        started: Sequence[bool],
        device: torch.device,
    ) -> DeviceCounters:
        """Moves the host's counters to a device. `samplings` are those of step `steps` + 1."""
        counts = [steps, *(sampler.n_averaged for sampler in samplers)]
        policies = [policy_row(sampler.policy) for sampler in samplers]
        marks = torch.tensor(started, dtype=torch.int32, device=device).reshape(-1, 1)
        return cls(
            counts=torch.tensor(counts, device=device),
            policies=torch.tensor(policies, dtype=torch.float64, device=device),
            samplings64=samplings.to(device, copy=True),
            samplings32=samplings.to(device, torch.float32, copy=True),
            marks=torch.cat([marks, torch.zeros_like(marks)], dim=1),
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
        """The same counters with the marks of some of the segments."""
        return replace(self, marks=self.marks[first : first + count])


def policy_row(policy: Average | None) -> list[float]:
    """A named policy as struct Policy of csrc/policy.h has it."""
    if policy is None:
        return [0.0] * POLICY_COLUMNS
    weight = policy.weight
    kinds: dict[type, float] = {Mean: 1.0, Ema: 2.0, Algorithm2: 3.0}
    return [
        kinds[type(weight)],
        weight.decay if isinstance(weight, Ema) else 0.0,
        policy.start,
        policy.every,
        policy.write_back_every,
        policy.initial == "current",
        weight.steps_per_epoch if isinstance(weight, Algorithm2) else 0.0,
        weight.start_epoch if isinstance(weight, Algorithm2) else 0.0,
    ]
