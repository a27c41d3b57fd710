"""What a property test is given: an optimizer, its tensors, and the events of a training run.

All of it is frozen and prints as the code that makes it; numbers in tensors come from seeds. Which
parameters an event chooses is a number too, whose bits go round the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

import rbwa_fused as rf

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "channels_last", "misaligned", "gaps")
ALL = 0xFFFF  # chooses every parameter


def slowing(n: int, step: int) -> float:
    return 1.0 / (1.0 + 0.5 * n + 0.01 * step)


def never(n: int, step: int) -> float:
    return 0.0


def always(n: int, step: int) -> float:
    return 1.0


def nearly_always(n: int, step: int) -> float:
    return 1.0 - 1e-12  # 1 in float32, a little less in float64


CUSTOM = (slowing, never, always, nearly_always)


@dataclass(frozen=True)
class TensorSpec:
    """A parameter. With `base`, the length of memory that others share, it lies at `offset` there,
    and takes every second element in the layout "gaps"."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    seed: int = 0
    base: int = 0
    offset: int = 0


@dataclass(frozen=True)
class GroupSpec:
    """`average` is a policy, False, or None for the optimizer's own."""

    tensors: tuple[TensorSpec, ...]
    options: dict[str, Any]
    average: rf.Average | bool | None = None


@dataclass(frozen=True)
class Step:
    """A step; the chosen parameters have no gradient. Under AMP, `found_inf` is not None."""

    seed: int = 0
    absent: int = 0
    layout: str = "like"
    scale: float | None = None
    found_inf: float | None = None


@dataclass(frozen=True)
class Freeze:
    chosen: int


@dataclass(frozen=True)
class Unfreeze:
    pass


@dataclass(frozen=True)
class Averaged:
    """With `beside`, of a rule with modes, what `average=` averages; else all that is evaluated."""

    nested: bool
    raises: bool
    beside: bool = False


@dataclass(frozen=True)
class Mode:
    """Of a rule with modes: train() or eval(), and maybe the other one and this again."""

    trains: bool
    again: bool = False


@dataclass(frozen=True)
class Write:
    """Other code writes to the chosen parameters."""

    chosen: int
    seed: int


@dataclass(frozen=True)
class Load:
    """A checkpoint is written, and read into a fresh model and optimizer."""

    layout: str
    flatten: bool


@dataclass(frozen=True)
class AddGroup:
    group: GroupSpec


@dataclass(frozen=True)
class Change:
    """Other hyperparameters for a group."""

    group: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Convert:
    chosen: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Move:
    """New memory for the chosen parameters, maybe in another layout."""

    chosen: int
    layout: str


@dataclass(frozen=True)
class Copy:
    pickled: bool


@dataclass(frozen=True)
class Clear:
    """The user clears `opt.state`: all starts again but the count of steps."""


Event = (
    Step
    | Freeze
    | Unfreeze
    | Averaged
    | Mode
    | Write
    | Load
    | AddGroup
    | Change
    | Convert
    | Move
    | Copy
    | Clear
)
EVENTS = get_args(Event)


@dataclass(frozen=True)
class Case:
    """A run; `rule` is one of rules.ALGORITHMS."""

    rule: str
    average: rf.Average | None
    groups: tuple[GroupSpec, ...]
    events: tuple[Event, ...]
    flatten: bool = True
    capturable: bool = False
    master_weights: bool = False
    in_backward: bool = False


def admits(policy: rf.Average | bool | None, dtype: torch.dtype, master_weights: bool) -> bool:
    """Whether a policy keeps averages of parameters of a dtype."""
    if not isinstance(policy, rf.Average) or policy.dtype is None:
        return True
    if dtype.itemsize == 2:
        return policy.dtype in (torch.float32, torch.float32 if master_weights else dtype)
    return policy.dtype == dtype


CANARY = 7.0


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers up to 4, many of them small, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-4.0, 4.0)
    exponent = torch.randint(-14, 8, shape, generator=generator).clamp(max=0)
    kept = torch.rand(shape, generator=generator) < 0.9
    return normal * 2.0**exponent * kept


def laid_out(values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """The numbers in memory of a layout, with canaries where the layout leaves gaps."""
    t = values.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if layout == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "misaligned":
        memory = torch.full((t.numel() + 2,), CANARY, dtype=dtype)
        return memory[1:-1].view(t.shape).copy_(t)
    if layout == "gaps":
        return torch.full((*t.shape, 2), CANARY, dtype=dtype)[..., 0].copy_(t)
    return t


def within(base: Tensor, spec: TensorSpec) -> Tensor:
    """A parameter's view of the memory that it shares."""
    step = 2 if spec.layout == "gaps" else 1
    strides = torch.empty(spec.shape, device="meta").stride()
    return base.as_strided(spec.shape, [step * s for s in strides], spec.offset)


def overrun(p: Tensor) -> bool:
    """Whether something was written beside a parameter that does not fill its memory."""
    storage = p.detach().untyped_storage()
    whole = torch.empty(0, dtype=p.dtype).set_(storage).clone()
    whole.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(CANARY)
    return not bool((whole == CANARY).all())
