"""Averager: averages beside any optimizer, sampled behind its steps in one pass over memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rbwa_fused.engine import checks
from rbwa_fused.engine.doors import Call
from rbwa_fused.following import Following
from rbwa_fused.members import Params
from rbwa_fused.several import Averages, Averaging, Which
from rbwa_fused.steppers import steppers

Method = TypeVar("Method", bound=Callable[..., Any])

CAPTURED = "an Averager without optimizer=, and its update() behind each replay"


def _uncompiled(method: Method) -> Method:
    """The method, which is one graph break in a compiled function. torch's wrapper alone would cost
    each call a microsecond."""
    broken = torch._disable_dynamo(method)

    @wraps(method)
    def called(*arguments: Any) -> Any:
        return broken(*arguments) if torch.compiler.is_compiling() else method(*arguments)

    return cast(Method, called)


class Averager(Following):
    r"""The average of weights that any optimizer moves, in one launch behind its step.

    .. math::
        a \leftarrow a + w (x - a), \quad \theta \leftarrow a \text{ or } x

    x are the weights as the step has left them. A sample reads and writes 12 bytes a float32
    parameter. The optimizer's groups, state and state dict stay its own.

    With ``optimizer`` a sample follows each of its steps, behind closures and hooks; a step that a
    GradScaler skips is none. Without it ``update()`` says when a step has been taken: behind the
    last of several optimizers that a program steps in turn, or behind an optimizer that is not
    torch's. The optimizer keeps the averager: ``remove()`` ends it sooner.

    Parameters stay where they are. A module is followed: parameters that are exchanged under their
    names, some or all of them, go on with these names' averages, one that gets another name keeps
    its own, and what is added or removed between steps is so in the averages. DTensor parameters
    (FSDP2, tensor parallel) are averaged as the shards that a process holds, without communication.

    Args:
        params: a module; or float32, float64, bfloat16 or float16 tensors, pairs of names and
            tensors, or dicts of them with ``"params"`` and perhaps an ``"average"`` of their own.
        average (Average or None): a policy such as ``rbwa_fused.ema()``, for groups that have none;
            or a list or dict of several (see `FusedSGD`), each 8 bytes a parameter more.
        optimizer (torch.optim.Optimizer or a sequence of them, optional): whose steps are counted;
            of several, those of the last (default: None).
        buffers (bool): average a module's floating buffers as well, such as BatchNorm's statistics,
            in the same launch; they are followed as parameters are. Integer ones stay as they are
            (default: False).
        into (module or sequence of tensors, optional): where the averages live, such as a teacher
            or a target network; of a module by names, tensors in the order of the parameters, in
            their shapes, layouts and shards. What it holds is the first sample. Its own state dict
            is the averages' checkpoint, and it belongs in no optimizer. Not with several averages
            (default: None).
        exclude (sequence of str): patterns of names, as ``fnmatch`` has them, that are left out
            (default: ()).
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (default: "auto").

    Attributes:
        param_groups (list of dict): each with ``"params"``, ``"average"`` and perhaps
            ``"param_names"``.
        state (dict): of each parameter ``{"average": tensor}``, the live average; others beside it
            are ``"average_1"`` and so on.

    Raises:
        ValueError, TypeError: for a parameter that cannot be averaged, that requires gradients and
            is none of the optimizers', for a pattern that no name fits, for an optimizer without
            hooks, and for one that has a parameter of ``into``.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters())
        >>> averager = rbwa_fused.Averager(model, rbwa_fused.ema(0.999), optimizer=opt)
        >>> for batch in loader:
        ...     train(model, opt, batch)
        >>> with averager.averaged():
        ...     evaluate(model)
    """

    def __init__(
        self,
        params: nn.Module | Params,
        average: Averaging | Averages,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        buffers: bool = False,
        into: nn.Module | Sequence[Tensor] | None = None,
        exclude: Sequence[str] = (),
        backend: str = "auto",
    ) -> None:
        self._begin(params, average, buffers, into, exclude, backend)
        self._handles: list[RemovableHandle] = []
        followed = steppers(optimizer, self.param_groups)
        self._tell_of_buffers()
        if self._into is not None:
            self._into.refuse_trained(self.param_groups, followed)
        self._build()
        try:
            self._claim()
            if followed:
                self._hook(followed)
            self._prepare()
        except BaseException:
            self.remove()  # or the optimizers would keep it
            raise

    @property
    def backend(self) -> str:
        """The name of what runs: "cpu", "cuda", "triton" or "reference"."""
        return self.engine.tables.backend

    # ---- samples -------------------------------------------------------------------------------

    @_uncompiled
    def update(self) -> None:
        """Counts a step that an optimizer has taken, and samples the weights if one is due.

        Raises:
            RuntimeError: inside ``averaged()``, where ``optimizer`` calls it, and while a CUDA
                graph is captured: update behind its replays.
        """
        if self._optimizer is not None:
            stepper = self._optimizer()
            if stepper is None:
                raise RuntimeError(
                    "update(): the optimizer of this Averager is gone, so that nothing is sampled "
                    "any more (expected one that lives as long, or optimizer=None)"
                )
            raise RuntimeError(
                f"update() beside optimizer=: each step of {type(stepper).__name__} is sampled "
                "already (expected one of the two)"
            )
        self._sample(None)

    def _hook(self, followed: Sequence[Optimizer]) -> None:
        """From now on the optimizers keep this averager: one that fills a teacher (``into``) may
        have no other owner."""

        def before(stepper: Optimizer, *arguments: Any) -> None:
            self._before_step()

        def behind(stepper: Optimizer, *arguments: Any) -> None:
            self._owed = (getattr(stepper, "found_inf", None),)
            self._catch_up()

        self._optimizer = weakref.ref(followed[-1])
        for stepper in followed:
            self._handles.append(stepper.register_step_pre_hook(before))
        self._handles.append(followed[-1].register_step_post_hook(behind))

    def remove(self) -> None:
        """Leaves the optimizer, which keeps the averager otherwise; the averages stay, and
        ``update()`` samples from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer = None
        self._give_up()
        if self.engine.swapped is None:
            self._catch_up()

    @_uncompiled
    def _before_step(self) -> None:
        checks.captured("a step that an Averager follows", CAPTURED)
        self.engine.refuse_inside_averaged("step")
        self._catch_up()
        if not self.engine.starting():
            return
        self._follow()
        if not self.engine.tables.describes(self.param_groups, self.state):
            self._rebuild()
        self.engine.prepare(self.engine.starting())

    @_uncompiled
    def _catch_up(self) -> None:
        """Takes the sample of a step that has none so far: the last one, or one behind which
        something failed or was interrupted."""
        if self._owed is not None:
            self._sample(*self._owed)
            self._owed = None  # also where the step was skipped

    def _sample(self, found_inf: Tensor | None) -> None:
        checks.captured("update()", CAPTURED)
        self.engine.refuse_inside_averaged("update")
        self._follow()
        into = self._into
        behind: list[Call] = [(setattr, self, "_owed", None)]
        if into is not None:
            into.attach(self.param_groups, self.state)
            behind.append((torch._C._increment_version, into.written(self.param_groups)))
        unseen = self._optimizer is None
        groups = self.param_groups
        while not self.engine.sample(groups, self.state, found_inf, behind, unseen=unseen):
            self._rebuild()

    # ---- averaged weights ----------------------------------------------------------------------

    def averaged(
        self, model: nn.Module | None = None, *, blend: float = 1.0, which: Which = 0
    ) -> AbstractContextManager[None]:
        """As FusedOptimizer's; ``model`` is the averaged module unless another is given."""
        return super().averaged(self._or_own(model), blend=blend, which=which)

    def averaged_state_dict(
        self, model: nn.Module | None = None, *, blend: float = 1.0, which: Which = 0
    ) -> dict[str, Any]:
        """As FusedOptimizer's; ``model`` is the averaged module unless another is given.

        Raises:
            TypeError: without either.
        """
        return super().averaged_state_dict(self._model(model), blend=blend, which=which)

    def copy_to(
        self,
        module: nn.Module,
        model: nn.Module | None = None,
        *,
        blend: float = 1.0,
        which: Which = 0,
    ) -> None:
        """As FusedOptimizer's; ``model`` is the averaged module unless another is given."""
        super().copy_to(module, self._model(model), blend=blend, which=which)

    def averages(self, model: nn.Module | None = None, *, which: Which = 0) -> dict[str, Tensor]:
        """As FusedOptimizer's; ``model`` is the averaged module unless another is given."""
        return super().averages(self._model(model), which=which)

    def adopt(self, model: nn.Module | None = None, *, which: Which = 0) -> None:
        """As FusedOptimizer's; ``model`` is the averaged module unless another is given."""
        super().adopt(self._or_own(model), which=which)

    def _model(self, model: nn.Module | None) -> nn.Module:
        model = self._or_own(model)
        if model is None:
            raise TypeError("an Averager of tensors needs a model here (expected model=)")
        return model

    @_uncompiled
    def _look(self) -> None:
        if self.engine.swapped is None:
            self._catch_up()
        super()._look()

    def _or_own(self, model: nn.Module | None) -> nn.Module | None:
        """The model to read averages for, of parameters that are looked for anew."""
        self._look()
        return self._module.module if model is None and self._module is not None else model

    def __getstate__(self) -> Any:
        raise TypeError(
            "an Averager cannot be copied or pickled, since it hooks an optimizer (expected its "
            "state_dict())"
        )

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{len(group['params'])} parameters: {group['average']!r}"
            for group in self.param_groups
        )
        stepper = None if self._optimizer is None else self._optimizer()
        behind = "" if stepper is None else f" behind {type(stepper).__name__}"
        return f"{type(self).__name__}({counts}{behind})"
