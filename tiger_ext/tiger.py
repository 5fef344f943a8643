# SPDX-License-Identifier: Apache-2.0
"""Tiger."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tiger_ext.optimizer import MixedOptimizer

__all__ = ["Tiger"]


class Tiger(MixedOptimizer):
    r"""Tiger: the sign of the momentum, decoupled weight decay, one state tensor.

    .. math::
        m_t &= \beta m_{t-1} + (1 - \beta) g_t \\
        \theta_t &= (1 - \eta\lambda)\,\theta_{t-1} - \eta \operatorname{sign}(m_t)

    With a ``torch.sparse_coo`` gradient only the rows it names are read and written; duplicate
    entries of a row are summed first. Untouched rows keep their momentum and their values.

    Args:
        params: parameters, named parameters, or parameter groups; floating point, any shape.
        lr: learning rate :math:`\eta`, a number or a 0-dim tensor.
        betas: ``(beta,)``, the momentum's decay rate.
        weight_decay: :math:`\lambda`, decoupled: a parameter shrinks by ``lr * weight_decay``.
        lazy: what happens to untouched rows of sparse gradients; "frozen": nothing.
        rows: how touched rows are found for strided gradients; None: the update is dense.
        scale: None: ``lr`` as given.
        rms_floor: lower bound of the parameter RMS for ``scale`` (not None).
        direction: "sign".
        direction_scale: constant of the other directions.
        accumulation_steps: micro-steps per step; 1.
        nonfinite: what a NaN or Inf gradient does; "propagate": it reaches the parameter.
        shrink_ratio: factor of ``nonfinite="shrink"``.
        momentum_dtype: storage of the momentum; None: the parameter's dtype; or float32, bfloat16,
            float16.
        stochastic_rounding: False.
        maximize: ascend instead of descend.
        capturable: has no effect on CPU parameters.
        fused: None: native kernels where they exist; True: native, or RuntimeError; False: the
            PyTorch reference.

    State: ``exp_avg``, the parameter's shape, in ``momentum_dtype``.

    Raises:
        ValueError: an option has an illegal value (the message names argument, value, legal range).
        TypeError: a parameter group has an unknown key or another algorithm's option.

    Source: Su 2023, "Tiger: a tiny optimizer", kexue.fm/archives/9512.
    """

    _algorithm = "tiger"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float] = (0.965,),
        weight_decay: float = 0.01,
        *,
        lazy: str = "frozen",
        rows: str | None = None,
        scale: str | None = None,
        rms_floor: float = 1e-3,
        direction: str = "sign",
        direction_scale: float | None = None,
        accumulation_steps: int = 1,
        nonfinite: str = "propagate",
        shrink_ratio: float = 0.99,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """See the class."""
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                weight_decay=weight_decay,
                lazy=lazy,
                rows=rows,
                scale=scale,
                rms_floor=rms_floor,
                direction=direction,
                direction_scale=direction_scale,
                accumulation_steps=accumulation_steps,
                nonfinite=nonfinite,
                shrink_ratio=shrink_ratio,
                momentum_dtype=momentum_dtype,
                stochastic_rounding=stochastic_rounding,
                maximize=maximize,
                capturable=capturable,
                fused=fused,
            ),
        )
