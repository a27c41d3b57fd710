"""The table of samplings: what becomes of each average at a step.

An average's rows change with the weight of its samples, for a mean at every step, and serve all
groups that share the policy and have averaged as many samples.
"""

from __future__ import annotations

from rbwa_fused import rules
from rbwa_fused.average import Average
from rbwa_fused.engine.packed import RowTable

ROWS_PER_SAMPLER = 2  # averages in a buffer, and averages that are the parameter itself


class Sampler:
    """One policy at one count of samples, for the groups that share both.

    Attributes:
        index: of its count in `Plan.counts`, behind the steps.
        first_row: of its two in the table of samplings.
        due, written_back: whether this step takes a sample, and writes the average to the weights.
    """

    def __init__(self, policy: Average | None, index: int, first_row: int) -> None:
        self.policy = policy
        self.index = index
        self.first_row = first_row
        self.due = self.written_back = False
        self._packed: tuple[float, bool, bool, bool] | None = None

    def update(self, step: int, n: int, table: RowTable) -> int:
        """Brings its rows up to date for a step, before which there are n samples. Returns how many
        there are behind it."""
        policy = self.policy
        if policy is None and self._packed is not None:
            return n
        w = 0.0
        current = due = self.written_back = False
        if policy is not None:
            if n == 0 and step > policy.begins:
                current = True
                n = 1
            due = policy.due(step)
            if due:
                w = policy.weight_of(n, step)
                self.written_back = policy.written_back(step)
                n += 1
        self.due = due
        sampling = (w, due or current, current, self.written_back)
        if sampling != self._packed:
            table.pack(self.first_row, *rules.Sampling(1.0, *sampling))
            # Where the average is the parameter itself, the sample's weight multiplies the learning
            # rate and that is all (docs/equivalences.md).
            table.pack(self.first_row + 1, *rules.Sampling(scale=w if due else 1.0))
            self._packed = sampling
        return n
