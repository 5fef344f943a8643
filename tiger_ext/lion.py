# SPDX-License-Identifier: Apache-2.0
"""Lion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tiger_ext.optimizer import MixedOptimizer
from tiger_ext.options import Direction, Lazy, Nonfinite, Rows, Scale

__all__ = ["Lion"]


class Lion(MixedOptimizer):
    r"""Lion: the sign of an interpolated momentum, decoupled weight decay, one state tensor.

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        \theta_t &= (1 - \eta\lambda)\,\theta_{t-1} - \eta \operatorname{sign}(c_t) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    With a ``torch.sparse_coo`` gradient only the rows it names are read and written; duplicate
    entries of a row are summed first. What untouched rows have missed is up to ``lazy``.

    Args:
        params: parameters, named parameters, or parameter groups; floating point, any shape.
        lr: learning rate :math:`\eta`, a number or a tensor of one element, 0-dim or [1].
        betas: ``(beta1, beta2)``: decay rates of the direction and of the momentum; any sequence.
        weight_decay: :math:`\lambda`, decoupled: a parameter shrinks by ``lr * weight_decay``.
        lazy: what becomes of the steps that did not touch a row once it is touched again. "frozen":
            nothing, it goes on from where it was. "decay": its momentum and its value first decay
            as they would have in these steps. "exact": the steps along the sign of its momentum are
            made up for as well, so that every row is what the dense rule makes of it (needs
            ``direction="sign"``, ``betas > 0``). Both need ``scale=None`` and
            ``lr * weight_decay < 1``, and rows to be current when they are read: see :meth:`track`
            and :meth:`flush`. State: ``last_step``, int32, one number a row. See docs/lazy.md.
        rows: how a strided gradient of a parameter of two or more dimensions is taken. None: every
            element is updated. "nonzero": only rows (indices of the first dimension) with a nonzero
            element in the gradient. "tracked": only rows whose ids went through a module given to
            :meth:`track` since the last step, also where their gradient is zero; parameters
            that are no embedding's as with None.
        scale: None: ``lr`` as given. "rms": ``lr`` is relative, multiplied by
            ``max(RMS(param), rms_floor)``, and the direction is divided by its RMS, both over the
            whole tensor, or over each row for sparse gradients and where ``rows`` is set;
            "rms_rows": over each row always. The RMS of a pure sign direction counts as 1. The
            weight decay takes the multiplied ``lr``, but no more than the whole parameter.
        rms_floor: lower bound of the parameter's RMS, so that zeros can move; 0: none.
        direction: what takes the sign's place, elementwise, on the momentum c: "sign"; "clip":
            ``clamp(k * c, -1, 1)``; "power": ``sign(c) * abs(c) ** k``; "atan":
            ``2 / pi * atan(k * c)``.
        direction_scale: k; None: 1e4 for "clip" and "atan", 0.5 for "power".
        nonfinite: what a NaN or Inf in a gradient does, judged for each row where the update goes
            by rows, on the row's sum, else for the whole tensor. "propagate": it reaches the
            parameter; "skip": parameter and state stay as they are; "shrink": the state stays, the
            parameter moves towards 0, or the group's ``shrink_to``, to ``shrink_ratio`` of its
            distance; "raise": FloatingPointError before anything is written (on a GPU the host
            waits for it).
        shrink_ratio: see ``nonfinite``.
        momentum_dtype: storage of the momentum; None: the parameter's dtype; or float32, bfloat16,
            float16; or int8: one byte an element, and a float32 scale for each row where the update
            goes by rows or may (sparse gradients, ``rows``, a lazy mode, "rms_rows"), else for each
            256 elements, rounded stochastically. A row (block) of which a momentum becomes NaN or
            Inf is NaN altogether.
        stochastic_rounding: bfloat16 and float16 parameters are rounded up or down at random, so
            that the mean is right and steps that are smaller than half the distance to the next
            number are not lost. The bits depend on ``rounding_seed`` (of the group; default:
            ``torch.initial_seed()``), the parameter's steps and position alone.
        maximize: ascend instead of descend.
        capturable: has no effect on CPU parameters.
        fused: None: native kernels where they exist; True: native, or RuntimeError; False: the
            PyTorch reference.

    State: ``exp_avg``, the parameter's shape, in ``momentum_dtype``; of int8 ``exp_avg_scale``,
    float32, ``[rows]`` or ``[blocks, 1]``. Where something is rounded stochastically, ``step``
    (0-dim int64), which the random bits depend on.

    Raises:
        ValueError: an option has an illegal value (the message names argument, value, legal range).
        TypeError: a parameter group has another algorithm's option, or a key that is nearly an
            option's name.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
    """

    _algorithm = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Sequence[float] | Tensor = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        lazy: Lazy = "frozen",
        rows: Rows | None = None,
        scale: Scale | None = None,
        rms_floor: float = 1e-3,
        direction: Direction = "sign",
        direction_scale: float | None = None,
        nonfinite: Nonfinite = "propagate",
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
                nonfinite=nonfinite,
                shrink_ratio=shrink_ratio,
                momentum_dtype=momentum_dtype,
                stochastic_rounding=stochastic_rounding,
                maximize=maximize,
                capturable=capturable,
                fused=fused,
            ),
        )
