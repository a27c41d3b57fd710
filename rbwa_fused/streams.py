"""What the kernels keep of each parameter beside it, and in which dtype."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as in csrc/step.h

# The keys in opt.state[p], torch.optim's own where it has one, in the order of csrc/tables.h.
STREAMS = (
    "momentum_buffer",
    "average",
    "difference_buffer",
    "previous_gradient",
    "master_param",  # float32, of a 16-bit parameter
)


def working_dtype(dtype: torch.dtype, master_weights: bool) -> torch.dtype:
    """The dtype of momentum and of what the step works on: float32 where there is a master."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if master_weights and narrow else dtype
