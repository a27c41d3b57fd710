"""Averages: what reads the averages that an engine keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rbwa_fused import evaluate
from rbwa_fused.engine.engine import Engine
from rbwa_fused.numbers import number
from rbwa_fused.several import Several, Which, check_which, number_of, policies_of


class Samples(int):
    """The samples of the first of several averages; called with ``which``, of that one."""

    _of: Callable[[Which], int]

    def __new__(cls, n: int, of: Callable[[Which], int]) -> Samples:
        self = super().__new__(cls, n)
        self._of = of
        return self

    def __call__(self, which: Which = 0) -> int:
        """Samples in one of the averages.

        Args:
            which (int or str): its number, from 0, or its name.

        Raises:
            TypeError, ValueError: for what is no number or name of an average.
        """
        return self._of(which)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # a copy is a number


torch.serialization.add_safe_globals([int])  # what a saved one is


class Averages:
    """Base of whoever has an engine, and with it averages of the parameters of some groups.

    Attributes:
        engine: what steps the parameters; not for users.
    """

    engine: Engine
    param_groups: list[dict[str, Any]]
    state: Any  # of each parameter a dict of streams
    _rebuild: Callable[[], None]  # follows what was converted or replaced

    @property
    def _itself(self) -> Any:
        """What has the groups and the state, where a wrapper has taken on its class."""
        return self

    @property
    def n_averaged(self) -> int:
        """Samples in the average, of the group that has most. The weights that an average starts
        with (``initial``) are one. Of several averages it is those of the first, and takes
        ``which``, as the readouts do: ``opt.n_averaged(which=1)``."""
        several = any(isinstance(g["average"], Several) for g in self._itself.param_groups)
        return Samples(self._samples(0), self._samples) if several else self._samples(0)

    def _samples(self, which: Which) -> int:
        opt = self._itself
        averages = [group["average"] for group in opt.param_groups]
        check_which(which, averages)
        opt.engine.read_back()
        most = 0
        counts = opt.engine.counts(opt.param_groups, opt.state)
        for group, counted in zip(opt.param_groups, counts, strict=True):
            number = number_of(group["average"], which)
            if number is not None:
                samples = (counted.n_averaged, *counted.further)
                n = samples[number] if number < len(samples) else 0
                now = policies_of(group["average"])[number].initial == "now"
                most = max(most, n, int(now and len(group["params"]) > 0))
        return most

    def averaged(
        self, model: nn.Module | None = None, *, blend: float = 1.0, which: Which = 0
    ) -> AbstractContextManager[None]:
        """The averaged weights are live inside the context, the training weights again after it.

        Contents change, not addresses. The training weights are set aside (as much memory again
        as the weights that have averages) and come back exactly, also after an exception; in the
        parameters' new dtype and place where these were converted or moved inside. What is written
        to the weights inside never reaches the averages. Inside, ``step``, ``load_state_dict`` and
        ``add_param_group`` raise and ``state_dict()`` returns the training state. Parameters
        without an average so far stay as they are, as do those whose average is the parameter
        itself. Of nested contexts the outermost acts.

        All or nothing: where it cannot be entered, the weights are what they were. Where a
        parameter cannot take its weights on exit, since it has another shape now or no floating
        dtype, all others do, an error names it, and every ``step`` is refused: give ``p.data`` its
        shape again and enter and leave ``averaged()`` once more, which brings the weights back, or
        load a checkpoint.

        Args:
            model: what FSDP has gathered of it is freed on entry and on exit, or the next forward
                would see the weights of before. Not needed for plain parameters.
            blend (float, 0 to 1): how much of the average is live, (1 - blend) theta + blend a,
                where theta is the master of a parameter that has one (default: 1).
            which (int or str): of several averages, by number, from 0, or by name; parameters of a
                group that has no such average stay as they are (default: 0).

        Raises:
            ValueError: for DTensor parameters without their model, another blend, or a ``which``
                that is no average.
            RuntimeError: on entry, inside FSDP1's summon_full_params or for a parameter that its
                average does not fit; on exit, for one that cannot take its training weights. An
                exception that was raised inside comes first, with this one as its context.

        Example:
            >>> with opt.averaged():
            ...     evaluate(model)
        """
        self._itself.engine.refuse_midway("averaged")
        self._check_which(which)
        return evaluate.averaged(self._itself, model, checked_blend(blend), which)

    def averaged_state_dict(
        self, model: nn.Module, *, blend: float = 1.0, which: Which = 0
    ) -> dict[str, Any]:
        """A plain state dict of the model holding the averaged weights, in the weights' dtypes.

        Buffers are the model's own; every tensor is a copy. Where ``model.state_dict()`` returns
        something else than parameters and buffers, such as copies that a hook makes, the averaged
        weights are live while it is asked, as in ``averaged()``.

        Args:
            blend (float, 0 to 1), which (int or str): as in ``averaged``.

        Raises:
            ValueError: for a model none of whose parameters is the optimizer's, another blend, or a
                ``which`` that is no average.
        """
        self._itself.engine.refuse_midway("averaged_state_dict")
        self._check_which(which)
        return evaluate.averaged_state_dict(self._itself, model, checked_blend(blend), which)

    def copy_to(
        self, module: nn.Module, model: nn.Module, *, blend: float = 1.0, which: Which = 0
    ) -> None:
        """Loads ``averaged_state_dict(model)`` into another module of its kind, such as one that is
        kept for evaluation.

        Raises:
            RuntimeError: for other names or shapes, in the words of ``load_state_dict``.
        """
        module.load_state_dict(self.averaged_state_dict(model, blend=blend, which=which))

    def averages(self, model: nn.Module, *, which: Which = 0) -> dict[str, Tensor]:
        """The live averages by the model's names: the same tensors for as long as a run lasts, also
        across ``load_state_dict``. Not those without a sample. An average that is the parameter
        itself (RBWA) is the parameter, or its master. One with ``initial="now"`` starts here, if
        there was no step before.

        Args:
            which (int or str): as in ``averaged``.

        Raises:
            ValueError: for a model none of whose parameters is the optimizer's, or a ``which`` that
                is no average.
        """
        if self is not self._itself:
            found: dict[str, Tensor] = self._itself.averages(model, which=which)
            return found
        self.engine.refuse_midway("averages")
        self._check_which(which)
        engine = self.engine
        if engine.swapped is None and any(_starts_now(g["average"]) for g in self.param_groups):
            if not engine.tables.describes(self.param_groups, self.state):
                self._rebuild()
            starting = [
                (plan, key)
                for plan, key in engine.starting()
                if _starts_now(plan.averages[key].policy)
            ]
            if starting:
                engine.prepare(starting)
        return evaluate.averages_by_name(self, model, which)

    def adopt(self, model: nn.Module | None = None, *, which: Which = 0) -> None:
        """Makes the averages the weights (and masters) for good, which is what a run may end with.
        Averages and their counts stay as they are; parameters without one do, too.

        Args:
            model, which: as in ``averaged``.

        Raises:
            ValueError: for DTensor parameters without their model, or a ``which`` that is no
                average.
            RuntimeError: inside ``averaged()``, or for a parameter that its average does not fit.
                No weight has changed then.
        """
        opt = self._itself
        opt.engine.refuse_inside_averaged("adopt")
        opt.engine.refuse_midway("adopt")
        self._check_which(which)
        evaluate.adopt(opt, model, which)

    def _check_which(self, which: Which) -> None:
        check_which(which, [group["average"] for group in self._itself.param_groups])


def _starts_now(average: Any) -> bool:
    return any(policy.initial == "now" for policy in policies_of(average))


def checked_blend(value: float) -> float:
    if not 0.0 <= number("blend", value) <= 1.0:
        raise ValueError(f"Invalid blend: {value} (expected 0 <= blend <= 1)")
    return float(value)
