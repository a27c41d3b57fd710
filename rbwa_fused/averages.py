"""Averages: what reads the averages that an engine keeps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from rbwa_fused import evaluate
from rbwa_fused.engine.engine import Engine


class Averages:
    """Base of whoever has an engine, and with it averages of the parameters of some groups.

    Attributes:
        engine: what steps the parameters; not for users.
    """

    engine: Engine
    param_groups: list[dict[str, Any]]
    state: Any  # of each parameter a dict of streams

    @property
    def _itself(self) -> Any:
        """What has the groups and the state, where a wrapper has taken on its class."""
        return self

    @property
    def n_averaged(self) -> int:
        """Samples in the average, of the group that has most."""
        opt = self._itself
        opt.engine.read_back()
        counts = opt.engine.counts(opt.param_groups, opt.state)
        return max((counted.n_averaged for counted in counts), default=0)

    def averaged(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
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

        Raises:
            ValueError: for DTensor parameters without their model.
            RuntimeError: on entry, inside FSDP1's summon_full_params or for a parameter that its
                average does not fit; on exit, for one that cannot take its training weights. An
                exception that was raised inside comes first, with this one as its context.

        Example:
            >>> with opt.averaged():
            ...     evaluate(model)
        """
        self._itself.engine.refuse_midway("averaged")
        return evaluate.averaged(self._itself, model)

    def averaged_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """A plain state dict of the model holding the averaged weights, in the weights' dtypes.

        Buffers are the model's own; every tensor is a copy. Where ``model.state_dict()`` returns
        something else than parameters and buffers, such as copies that a hook makes, the averaged
        weights are live while it is asked, as in ``averaged()``.

        Raises:
            ValueError: for a model none of whose parameters is the optimizer's.
        """
        self._itself.engine.refuse_midway("averaged_state_dict")
        return evaluate.averaged_state_dict(self._itself, model)
