"""Averages of any length, after training: snapshots on the way, and what they make.

python -m rbwa_fused.posthoc FOLDER --sigma-rel 0.05 0.10 0.15 --out DIR
"""

from rbwa_fused.posthoc.snapshots import Snapshots
from rbwa_fused.posthoc.synthesis import Synthesis, sweep, synthesize

__all__ = ["Snapshots", "Synthesis", "sweep", "synthesize"]
