"""What there is to evaluate, on both sides: averaged(), train() and eval(), state dicts."""

from __future__ import annotations

import pytest
import torch
from agreement import compare
from program import Averaged
from side_by_side import SideBySide, equal
from torch import Tensor


class Evaluation(SideBySide):
    """Reads the averages of an optimizer and of its twin.

    Attributes:
        aside: in eval mode the weights of training, unless something has changed that they are of.
    """

    aside: list[Tensor] | None = None

    def switch(self, trains: bool) -> None:
        """Another mode, or the one that it is."""
        before = self.held()
        was = self.twin.trains
        (self.opt.train if trains else self.opt.eval)()
        self.twin.switch(trains)
        if trains == was:
            assert equal(self.held(), before)
        elif not trains:
            self.aside = before[0][: len(self.model)]
        elif self.aside is not None:
            for i, (p, y) in enumerate(zip(self.model, self.aside, strict=False)):
                assert torch.equal(p, y), f"parameter {i} behind eval() and train()"
            self.tried.add("training weights again")

    def averaged(self, event: Averaged) -> None:
        before, state = self.held(), self.held(weights=False)
        trains, beside = self.twin.trains, event.beside and self.rule.modes
        which = {"which": "average"} if beside else {}
        if beside and not trains:
            with pytest.raises(RuntimeError, match="in eval mode"):
                self.opt.averaged(**which)
            return
        try:
            with self.opt.averaged(**which):
                for i, (p, expected) in enumerate(zip(self.model, self.live(beside), strict=True)):
                    compare(f"parameter {i} inside averaged()", p, expected, p.dtype)
                assert equal(self.held(weights=False), state)
                if event.nested:
                    inside = self.held()
                    with self.opt.averaged():
                        assert equal(self.held(), inside)
                    assert equal(self.held(), inside)
                    if not self.shares:  # of which what has no average is live
                        self.save(beside)
                for refused in (
                    self.opt.step,
                    lambda: self.opt.load_state_dict({}),
                    lambda: self.opt.add_param_group({"params": []}),
                )[: 3 if trains else 1]:
                    with pytest.raises(RuntimeError, match=r"inside averaged|in eval mode"):
                        refused()
                if beside and any(group.averaged for group in self.twin.groups):
                    self.tried.add("an average beside x")
                if event.raises:
                    raise KeyError
        except KeyError:
            pass
        assert equal(self.held(), before)

    def save(self, beside: bool) -> None:
        """The averages as a state dict."""
        which = {"which": "average"} if beside else {}
        saved, averages = self.opt.averaged_state_dict(self.model, **which), self.evaluated(beside)
        for i, (p, member) in enumerate(zip(self.model, self.twin.members, strict=True)):
            expected = averages.get(i, member.theta)
            compare(f"averaged_state_dict, parameter {i}", saved[str(i)], expected, p.dtype)
