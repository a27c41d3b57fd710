"""The two public optimizers: which rule, which hyperparameters; fused.py does the rest."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from rbwa_fused import hyperparameters, rules
from rbwa_fused.average import Average
from rbwa_fused.engine.tables import Options
from rbwa_fused.fused import FusedOptimizer
from rbwa_fused.several import Averages


class FusedSGD(FusedOptimizer):
    r"""torch.optim.SGD with the weight average in the same pass over memory.

    .. math::
        g \leftarrow g + \lambda\theta, \quad m \leftarrow \mu m + (1-\tau) g, \quad
        x \leftarrow \theta - \eta m, \quad a \leftarrow a + w (x - a), \quad
        \theta \leftarrow a \text{ or } x

    Without ``average`` it does what ``torch.optim.SGD`` does, and its arguments, defaults and
    errors are torch's. Parameters on the CPU move into flat buffers at construction, those on a GPU
    stay where they are: build the optimizer after ``model.to(device)`` and before capturing or
    compiling. DTensor parameters (FSDP2, tensor parallel) stay as well, and each process steps its
    shards: build it after ``fully_shard``; state is DTensors, laid out as the parameters.

    Args:
        params: float32, float64, bfloat16 or float16 parameters, named ones, or groups of them.
        lr (float or 1-element Tensor, >= 0): learning rate (default: 1e-3).
        momentum (float, >= 0): momentum factor (default: 0).
        dampening (float): of all but a parameter's first step with momentum (default: 0).
        weight_decay (float, >= 0): L2 penalty, coupled, or decoupled by ``decoupled_weight_decay``
            (default: 0).
        nesterov (bool): needs a momentum and no dampening (default: False).
        maximize (bool): ascend (default: False).
        average (Average, optional): a policy such as ``rbwa_fused.ema()``; or up to 16 in a list, a
            tuple or a dict of names, each 8 bytes a float32 parameter more in the same pass. Of
            several the first alone may be written back, and the others sample what the step leaves,
            with the bits that they have alone; all have one dtype, lie in the state as ``average``,
            ``average_1``, …, and are read by ``which=``. A group may have its own, or False for
            none (default: None).
        backend (str): "auto", "cpu", "cuda", "triton" or "reference" (default: "auto").
        flatten (bool): move parameters on the CPU into flat buffers; nothing on a GPU. The results
            are the same bits either way (default: True).
        capturable (bool): on a GPU, let the device count steps and read a float32 tensor ``lr``
            that lies there, so that a captured CUDA graph replays rightly; refuses custom weights
            (default: False).
        master_weights (bool): bfloat16 and float16 parameters get a float32 master and float32
            momentum in the state; each step moves the master and rounds the parameter from it.
            Where other code writes to a parameter, the next step takes the new value as its master
            (default: False).
        in_backward (bool): step each parameter inside the backward pass, as soon as its gradient is
            complete, and free the gradient. `step()` then ends the step. The same bits, less
            memory; not with GradScaler, closures, accumulated gradients, DTensor parameters or
            DistributedDataParallel, and what looks at all gradients before the step (clipping by
            their norm) finds none (default: False).
        buffers (nn.Module, optional): the model whose floating buffers, such as BatchNorm's
            statistics, are averaged by ``average`` in the same launch, and exchanged with the
            weights. They are followed by their names, are in no param group nor ``state``, and
            their averages are a state dict's ``"buffers"`` (default: None).
        decoupled_weight_decay (bool): SGDW (Loshchilov and Hutter, 2019): theta - lr weight_decay
            theta beside the step, and no decay in the momentum. A group may have its own; a
            checkpoint without the key leaves the optimizer's (default: False).
        foreach, fused, differentiable: torch's choice of an implementation. Taken, and without a
            meaning here: there is one. ``differentiable=True`` is refused.

    Raises:
        ValueError, TypeError: naming the argument and the value received.
        RuntimeError: for a backend that is not built, and, in torch's words, for ``fused`` with
            ``foreach`` or ``differentiable``.

    Example:
        >>> opt = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, average=rbwa_fused.ema(0.999))
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
        >>> opt.zero_grad()
        >>> with opt.averaged():
        ...     evaluate(model)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        average: Average | Averages | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        in_backward: bool = False,
        buffers: nn.Module | None = None,
        decoupled_weight_decay: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        hyperparameters.implementation(foreach, differentiable, fused)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "average": average,
        }
        if decoupled_weight_decay is not False:  # torch.optim.SGD's groups have no such key
            defaults[rules.DECOUPLED] = decoupled_weight_decay
        options = Options(backend, flatten, capturable, master_weights, in_backward)
        super().__init__(params, defaults, rules.SGD, options, buffers)


DIFFERENCES = {
    "implicit": rules.RSGDM_IMPLICIT,
    "explicit": rules.RSGDM_EXPLICIT,
    None: rules.SGDM,
}


class RSGDM(FusedOptimizer):
    r"""SGD with momentum that corrects its lag by the gradient's difference (the RSGDM paper).

    .. math::
        m_t = \beta m_{t-1} + (1-\beta) g_t, \quad
        z_t = \beta z_{t-1} + (1-\beta)(g_t - g_{t-1}), \quad
        \theta \leftarrow \theta - \eta (m_t + \beta z_t), \quad z_1 = 0

    Args:
        params: as FusedSGD's.
        lr (float or 1-element Tensor, >= 0): learning rate (default: 0.01).
        momentum (float, 0 <= beta < 1): decay of both averages (default: 0.9).
        weight_decay (float, >= 0): L2 penalty, coupled (default: 0).
        difference (str, optional): "implicit" keeps one buffer and asks for a constant momentum
            (docs/equivalences.md); "explicit" keeps the paper's three; None is the paper's SGDM
            baseline without the difference (default: "implicit").
        maximize, average, backend, flatten, capturable, master_weights, in_backward, buffers: as
            FusedSGD's.

    Raises:
        ValueError: also where ``momentum`` changes after the first step under "implicit".
    """

    _rule = rules.RSGDM_IMPLICIT

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        difference: Literal["implicit", "explicit"] | None = "implicit",
        maximize: bool = False,
        average: Average | Averages | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        in_backward: bool = False,
        buffers: nn.Module | None = None,
    ) -> None:
        if difference not in tuple(DIFFERENCES):
            raise ValueError(
                f"Invalid difference: {difference!r} (expected 'implicit', 'explicit' or None)"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "average": average,
        }
        options = Options(backend, flatten, capturable, master_weights, in_backward)
        super().__init__(params, defaults, DIFFERENCES[difference], options, buffers)
