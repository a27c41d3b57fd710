"""The optimizer step and the weight average in one pass over memory. See README.md."""

from rbwa_fused import posthoc, ramp
from rbwa_fused.adam import FusedAdam, FusedAdamW
from rbwa_fused.average import Average
from rbwa_fused.averager import Averager
from rbwa_fused.clipping import clip_grad_norm_
from rbwa_fused.estimate import averaged_model
from rbwa_fused.optimizer import RSGDM, FusedSGD
from rbwa_fused.policies import (
    ema,
    lookahead,
    mean,
    merge,
    power_ema,
    rbwa,
    rbwa_e,
    rswa,
    swa,
    switch_ema,
    table,
)
from rbwa_fused.replicas import Elastic, pull_
from rbwa_fused.schedule_free import AdamWScheduleFree, SGDScheduleFree
from rbwa_fused.weights import Algorithm2, Ema, Mean

__version__ = "0.1.0"

__all__ = [
    "RSGDM",
    "AdamWScheduleFree",
    "Algorithm2",
    "Average",
    "Averager",
    "Elastic",
    "Ema",
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "Mean",
    "SGDScheduleFree",
    "averaged_model",
    "clip_grad_norm_",
    "ema",
    "lookahead",
    "mean",
    "merge",
    "posthoc",
    "power_ema",
    "pull_",
    "ramp",
    "rbwa",
    "rbwa_e",
    "rswa",
    "swa",
    "switch_ema",
    "table",
]
