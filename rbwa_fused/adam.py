"""FusedAdamW and FusedAdam: torch's own arguments around the rule "adam" (rules.py)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from rbwa_fused import hyperparameters, rules
from rbwa_fused.average import Average
from rbwa_fused.engine.tables import Options
from rbwa_fused.fused import FusedOptimizer
from rbwa_fused.several import Averages

StateDtype = Literal["float32", "param"]


class FusedAdam(FusedOptimizer):
    r"""torch.optim.Adam with the weight average in the same pass over memory.

    .. math::
        g \leftarrow g + \lambda\theta, \quad m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
        x \leftarrow \theta - \frac{\eta}{1-\beta_1^t}
        \frac{m}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    t counts the steps that a parameter has taken with a gradient. Without ``average`` it does what
    ``torch.optim.Adam`` does; its arguments, defaults, errors, state keys (``step``, ``exp_avg``,
    ``exp_avg_sq``, ``max_exp_avg_sq``) and checkpoints are torch's, which load both ways. Two
    differences, both towards the exact result: decoupled decay is added to the step before it is
    rounded (torch multiplies the weight by 1 - lr weight_decay, which is 1 in float32 where
    lr weight_decay is below 3e-8), and 16-bit parameters keep ``exp_avg``, ``exp_avg_sq`` and
    ``max_exp_avg_sq`` in float32, because a bfloat16 ``exp_avg_sq`` never decays: 0.999 of it is
    rounded back to it.

    Args:
        params: as FusedSGD's.
        lr (float or 1-element Tensor, >= 0): learning rate (default: 1e-3).
        betas (two floats or 1-element Tensors, 0 <= beta < 1): decay of both averages. The host
            reads Tensors at every step: on a GPU it waits for them, and they cannot be captured
            (default: (0.9, 0.999)).
        eps (float, >= 0): added to the root of v (default: 1e-8).
        weight_decay (float, >= 0): L2 penalty, coupled (default: 0).
        amsgrad (bool): divide by the root of the largest v so far; where it is switched on late,
            the largest of those from then on (default: False).
        maximize (bool): ascend (default: False).
        decoupled_weight_decay (bool): as AdamW, theta - lr weight_decay theta beside the step. A
            checkpoint that has it decides (default: False).
        state_dtype (str): of the state of 16-bit parameters, ``"float32"`` or ``"param"``, which
            saves 4 bytes a parameter, 6 with amsgrad, and does what is said above (default:
            "float32").
        average, backend, flatten, capturable, master_weights, in_backward, buffers: as FusedSGD's.
        foreach, fused, differentiable: as FusedSGD's.

    Raises:
        ValueError, TypeError, RuntimeError: as FusedSGD, in torch's words.
    """

    _rule = rules.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        average: Average | Averages | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        in_backward: bool = False,
        buffers: nn.Module | None = None,
        state_dtype: StateDtype = "float32",
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        hyperparameters.implementation(foreach, differentiable, fused)
        hyperparameters.tensors_with_foreach(lr, betas, foreach, capturable)
        betas = tuple(betas) if isinstance(betas, list) else betas  # as torch has them
        if state_dtype not in get_args(StateDtype):
            raise ValueError(
                f"Invalid state_dtype: {state_dtype!r} (expected one of {get_args(StateDtype)})"
            )
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            rules.DECOUPLED: decoupled_weight_decay,
            "average": average,
        }
        options = Options(
            backend, flatten, capturable, master_weights, in_backward, state_dtype=state_dtype
        )
        super().__init__(params, defaults, rules.ADAM, options, buffers)


class FusedAdamW(FusedAdam):
    r"""torch.optim.AdamW with the weight average in the same pass over memory.

    .. math::
        x \leftarrow \theta - \eta \Bigl(\frac{1}{1-\beta_1^t}
        \frac{m}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda\theta\Bigr)

    FusedAdam with decoupled decay, whatever a checkpoint says, and torch's default of it.

    Args:
        weight_decay (float, >= 0): decoupled (default: 1e-2).
        params, lr, betas, eps, amsgrad, maximize, average, backend, flatten, capturable,
            master_weights, in_backward, buffers, state_dtype, foreach, differentiable, fused: as
            FusedAdam's.

    Raises:
        ValueError, TypeError, RuntimeError: as FusedAdam.

    Example:
        >>> opt = FusedAdamW(model.parameters(), lr=3e-4, average=rbwa_fused.ema(0.999))
        >>> loss_fn(model(x), y).backward()
        >>> opt.step()
        >>> opt.zero_grad()
        >>> with opt.averaged():
        ...     evaluate(model)
    """

    _always: ClassVar[dict[str, Any]] = {rules.DECOUPLED: True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        average: Average | Averages | None = None,
        backend: str = "auto",
        flatten: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        in_backward: bool = False,
        buffers: nn.Module | None = None,
        state_dtype: StateDtype = "float32",
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
            average=average,
            backend=backend,
            flatten=flatten,
            capturable=capturable,
            master_weights=master_weights,
            in_backward=in_backward,
            buffers=buffers,
            state_dtype=state_dtype,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
