"""What the kernels keep of each parameter beside it, and in which dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as in csrc/convert.h
NARROW = tuple(dtype for dtype in DTYPES if dtype.itemsize < 4)  # stepped in float32

# What rules keep between steps, by their names in the kernels and in the order of csrc/update.h.
KEPT = ("m", "z", "previous", "v", "v_max")
# Their keys in opt.state[p], torch.optim's own where it has them.
KEYS = {
    "momentum_buffer": "m",
    "difference_buffer": "z",
    "previous_gradient": "previous",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "v_max",
    "z": "m",
}
FROM_THE_WEIGHTS = ("z",)  # starts as the parameter, or its master; the others start at zero
AVERAGE = "average"
FURTHER = tuple(f"average_{i}" for i in range(1, 16))  # averages beside the first
AVERAGES = (AVERAGE, *FURTHER)
MASTER = "master_param"  # float32, of a 16-bit parameter
# How many steps a parameter has taken: 0-dim float32 on the CPU, as torch.optim.Adam has it.
STEP = "step"
STREAMS = (*AVERAGES, MASTER, *KEYS)  # all keys that are as large as their parameter


def working_dtype(dtype: torch.dtype, master_weights: bool) -> torch.dtype:
    """What the step works on, and SGD's momentum is kept in: float32 where there is a master, else
    the dtype."""
    return torch.float32 if master_weights and dtype in NARROW else dtype


def followed(master: Tensor | None, weights: Tensor) -> Tensor:
    """What a step works on: the master that was rounded to the weights, and the weights where there
    is none or somebody has written to them since; in the wider of both dtypes. `followed` of
    csrc/update.h."""
    if master is None:
        return weights
    wide = torch.promote_types(master.dtype, weights.dtype)
    return torch.where(master.to(weights.dtype) == weights, master.to(wide), weights.to(wide))
