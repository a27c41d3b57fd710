"""What the kernels keep of each parameter beside it, and in which dtype."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as in csrc/convert.h
NARROW = tuple(dtype for dtype in DTYPES if dtype.itemsize < 4)  # stepped in float32

# What rules keep between steps: its name in the kernels, in the order of csrc/update.h, and its key
# in opt.state[p], torch.optim's own where it has one.
KEPT = {
    "m": "momentum_buffer",
    "z": "difference_buffer",
    "previous": "previous_gradient",
}
AVERAGE = "average"
MASTER = "master_param"  # float32, of a 16-bit parameter
STREAMS = (AVERAGE, MASTER, *KEPT.values())  # all keys, in the order of csrc/tables.h


def working_dtype(dtype: torch.dtype, master_weights: bool) -> torch.dtype:
    """What momentum and the step are kept in: float32 where there is a master, else the dtype."""
    return torch.float32 if master_weights and dtype in NARROW else dtype
