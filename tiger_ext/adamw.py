# SPDX-License-Identifier: Apache-2.0
"""AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tiger_ext.optimizer import MixedOptimizer
from tiger_ext.options import AdamWLazy, Nonfinite, Rows, SecondMoment

__all__ = ["AdamW"]


class AdamW(MixedOptimizer):
    r"""AdamW with bias correction, for dense and for row-sparse gradients.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= (1 - \eta\lambda)\,\theta_{t-1}
            - \eta\,\frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    With dense gradients it equals ``torch.optim.AdamW``; with sparse ones and ``weight_decay=0``
    ``torch.optim.SparseAdam`` but for the place of epsilon (SparseAdam adds it before the bias
    correction). Only the rows of a sparse gradient are read and written.

    Args:
        params: parameters, named parameters, or parameter groups; floating point, any shape.
        lr: learning rate :math:`\eta`, a number or a tensor of one element, 0-dim or [1].
        betas: ``(beta1, beta2)``, any sequence. With ``beta1 = 0`` no first moment is stored.
        eps: added to the denominator.
        weight_decay: :math:`\lambda`, decoupled: a parameter shrinks by ``lr * weight_decay``.
        lazy: what becomes of the steps that did not touch a row once it is touched again. "frozen":
            nothing, it goes on from where it was. "decay": its moments and its value first decay as
            they would have in these steps; needs ``lr * weight_decay < 1``, and rows to be current
            when they are read: see :meth:`track` and :meth:`flush`. State: ``last_step``, int32,
            one number a row. (The steps themselves have no closed form: no "exact".)
        rows: how a strided gradient of a parameter of two or more dimensions is taken. None: every
            element is updated. "nonzero": only rows (indices of the first dimension) with a nonzero
            element in the gradient. "tracked": only rows whose ids went through a module given to
            :meth:`track` since the last step, also where their gradient is zero; parameters
            that are no embedding's as with None.
        nonfinite: what a NaN or Inf in a gradient does, judged for each row where the update goes
            by rows, on the row's sum, else for the whole tensor. "propagate": it reaches the
            parameter; "skip": parameter and state stay as they are; "shrink": the state stays, the
            parameter moves towards 0, or the group's ``shrink_to``, to ``shrink_ratio`` of its
            distance; "raise": FloatingPointError before anything is written (on a GPU the host
            waits for it).
        shrink_ratio: see ``nonfinite``.
        momentum_dtype: storage of the first moment; None: the parameter's dtype; or float32,
            bfloat16, float16; or int8: one byte an element, and a float32 scale for each row where
            the update goes by rows or may (sparse gradients, ``rows``, a lazy mode), else for each
            256 elements, rounded stochastically. A row (block) of which a momentum becomes NaN or
            Inf is NaN altogether. The second moment takes the wider of this (of int8: float32) and
            the parameter's dtype.
        second_moment: "element": :math:`v` has the parameter's shape. "row": one float32 a row of
            parameters of two or more dimensions, the mean of :math:`g^2` over the row in the place
            of :math:`g^2`. A row is what a sparse gradient's indices select, for a strided gradient
            an index of the first dimension, or of those that sparse gradients had before. Every
            gradient then goes by rows.
        stochastic_rounding: bfloat16 and float16 parameters are rounded up or down at random, so
            that the mean is right and steps that are smaller than half the distance to the next
            number are not lost. The bits depend on ``rounding_seed`` (of the group; default:
            ``torch.initial_seed()``), the parameter's steps and position alone.
        maximize: ascend instead of descend.
        capturable: has no effect on CPU parameters.
        fused: None: native kernels where they exist; True: native, or RuntimeError; False: the
            PyTorch reference.

    State: ``exp_avg``, ``exp_avg_sq`` (the parameter's shape; with ``second_moment="row"`` the
    rows' shape, ``[rows]``), ``step`` (0-dim int64, on the CPU); of an int8 momentum
    ``exp_avg_scale``, float32, ``[rows]`` or ``[blocks, 1]``.

    Raises:
        ValueError: an option has an illegal value (the message names argument, value, legal range).
        TypeError: a parameter group has another algorithm's option, or a key that is nearly an
            option's name.

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
    """

    _algorithm = "adamw"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | Tensor = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lazy: AdamWLazy = "frozen",
        rows: Rows | None = None,
        nonfinite: Nonfinite = "propagate",
        shrink_ratio: float = 0.99,
        momentum_dtype: torch.dtype | None = None,
        second_moment: SecondMoment = "element",
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
                eps=eps,
                weight_decay=weight_decay,
                lazy=lazy,
                rows=rows,
                nonfinite=nonfinite,
                shrink_ratio=shrink_ratio,
                momentum_dtype=momentum_dtype,
                second_moment=second_moment,
                stochastic_rounding=stochastic_rounding,
                maximize=maximize,
                capturable=capturable,
                fused=fused,
            ),
        )
