"""SGDScheduleFree and AdamWScheduleFree: the schedulefree package's arguments around two rules."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from rbwa_fused import hyperparameters, rules
from rbwa_fused.average import Average
from rbwa_fused.engine.tables import Options
from rbwa_fused.modes import ScheduleFree
from rbwa_fused.several import Averages


class SGDScheduleFree(ScheduleFree):
    r"""Schedule-Free SGD (Defazio et al., 2024) in one pass over memory, that of SGD with momentum.

    .. math::
        z \leftarrow z - \eta_k g(y), \quad x \leftarrow (1-c_k) x + c_k z, \quad
        y \leftarrow (1-\beta) z + \beta x

    In training mode the weights are y, in eval mode x, the average. It starts in eval mode: call
    `train` before training and `eval` before evaluation and saving; or call `train` once and
    evaluate in ``averaged()``, which cannot be forgotten. No learning rate schedule is needed.

    Arguments, defaults, the keys of groups and state and checkpoints are those of the package
    schedulefree, which load both ways. Differences: a step in which no parameter of a group has a
    gradient is not counted there, ``p.grad`` is never written, a round trip through eval mode gives
    the very bits, c is 0 where all weights were 0 so far (also with a tensor lr), and 16-bit
    parameters keep z in float32.

    Args:
        params: as FusedSGD's.
        lr (float or 1-element Tensor, >= 0): learning rate, which is read at each step (default:
            1.0).
        momentum (float, 0 < beta < 1): beta; one for all of a group's steps (default: 0.9).
        weight_decay (float, >= 0): L2 penalty at y (default: 0).
        warmup_steps (int, steps, >= 0): over which the learning rate rises from lr / warmup_steps
            to lr (default: 0).
        r (float): z of step k (from 0) has the weight (k + 1)^r in x, times (default: 0)
        weight_lr_power (float, >= 0): the largest learning rate so far to this power (default: 2).
        average (Average, optional): a policy of averages of y beside x, read by
            ``averaged(which="average")``, or several as FusedSGD's, read by number or name; none
            that writes back (default: None).
        capturable (bool): as FusedSGD's. Where the device counts, so under AMP on a GPU as well,
            ``k``, ``weight_sum``, ``lr_max`` and ``scheduled_lr`` of a group are as of the last
            ``state_dict()``, and read that before you write to them. The bits are the host's where
            ``r`` and ``weight_lr_power`` are whole numbers or halves up to 16; others differ by
            up to 2 units of a float64's last place in a power under CUDA, and 64 under Triton
            (default: False).
        maximize, backend, flatten, master_weights, in_backward, buffers: as FusedSGD's.
        foreach: taken, and means nothing.

    Raises:
        ValueError, TypeError: naming the argument and the value received; also for an average that
            writes back, and for another ``momentum`` than that of a group's first step.
        RuntimeError: for a step in eval mode.

    Example:
        >>> opt = SGDScheduleFree(model.parameters(), lr=1.0, warmup_steps=500)
        >>> opt.train()
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
        >>> opt.zero_grad()
        >>> with opt.averaged():
        ...     evaluate(model)
    """

    _rule = rules.SCHEDULE_FREE_SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        average: Average | Averages | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        in_backward: bool = False,
        buffers: nn.Module | None = None,
    ) -> None:
        hyperparameters.implementation(foreach, False, None)
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        options = Options(backend, flatten, capturable, master_weights, in_backward)
        scheduled = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        defaults = {**own, **scheduled, "maximize": maximize, "average": average}
        self._start(params, defaults, options, buffers)


class AdamWScheduleFree(ScheduleFree):
    r"""Schedule-Free AdamW (Defazio et al., 2024) with the average that it needs in one pass.

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
        d = \frac{g}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda y, \quad
        z \leftarrow z - \eta_k d

    and x and y as in SGDScheduleFree, whose modes, checkpoints and differences from the package it
    has. One more: t counts the steps that a parameter has taken with a gradient, and not those of
    its group, so that a layer that is unfrozen late begins with a step of lr (in the package of 25
    lr after 1,000 steps). It is a further state key, ``step``; absent, it is the group's k.

    Args:
        params, weight_decay, warmup_steps, r, weight_lr_power: as SGDScheduleFree's.
        lr (float or 1-element Tensor, >= 0): learning rate (default: 0.0025).
        betas (two floats): beta, 0 < beta < 1, one for all of a group's steps; and the decay of v,
            0 <= beta < 1 (default: (0.9, 0.999)).
        eps (float, >= 0): added to the root of v (default: 1e-8).
        maximize, average, backend, flatten, capturable, master_weights, in_backward, buffers,
            foreach: as SGDScheduleFree's.

    Raises:
        ValueError, TypeError, RuntimeError: as SGDScheduleFree.

    Example:
        >>> opt = AdamWScheduleFree(model.parameters(), lr=0.0025, warmup_steps=1000)
        >>> opt.train()
    """

    _rule = rules.SCHEDULE_FREE_ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        average: Average | Averages | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        in_backward: bool = False,
        buffers: nn.Module | None = None,
    ) -> None:
        hyperparameters.implementation(foreach, False, None)
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options = Options(backend, flatten, capturable, master_weights, in_backward)
        scheduled = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        defaults = {**own, **scheduled, "maximize": maximize, "average": average}
        self._start(params, defaults, options, buffers)
