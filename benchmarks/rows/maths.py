"""What a provider says that it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CLIP = 1.0  # largest norm of all gradients together, where it is clipped; theirs is above 2

Rule = Literal["plain", "momentum", "rsgdm", "adamw", "schedule_free", "schedule_free_adamw"]


@dataclass(frozen=True)
class Average:
    """The sample after steps every, 2 every, … enters with ``weight(n)``, n samples before it."""

    weight: Callable[[int], float]
    every: int = 1
    written_back: bool = False


@dataclass(frozen=True)
class Maths:
    """What a provider computes: torch's SGD with or without momentum, RSGDM, AdamW with torch's
    defaults except for the rate, or schedule-free SGD or AdamW (Defazio et al., 2024), here without
    weight decay; an average; with the norm of all gradients clipped to CLIP or not."""

    rule: Rule = "momentum"
    average: Average | None = None
    clipped: bool = False
