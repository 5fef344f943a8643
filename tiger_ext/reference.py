# SPDX-License-Identifier: Apache-2.0
"""The update rules in plain PyTorch.

This is the definition that the native kernels are tested against, and what runs where no native
kernel exists or ``fused=False`` asks for it. Written to be read: one statement per line of the
mathematics. No function writes into its arguments.

Arithmetic is float32, or float64 for float64 parameters, whatever the tensors store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter's update is computed."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def sign(x: Tensor) -> Tensor:
    """Return the sign of each element: 0 at 0, and NaN (unlike ``torch.sign``) at NaN."""
    return torch.where(x.isnan(), x, torch.sign(x))


def direction(c: Tensor, kind: str, kappa: float) -> Tensor:
    """Return the direction of each element of ``c``; NaN stays NaN."""
    if kind == "clip":
        return (kappa * c).clamp(-1, 1)
    if kind == "power":
        return sign(c) * c.abs() ** kappa
    if kind == "atan":
        return (2 / math.pi) * torch.atan(kappa * c)
    return sign(c)


def mean_square(x: Tensor) -> Tensor:
    """Return, in float64, the mean over all but the first dimension, which keep length 1."""
    squares = per_unit(x.double().square())
    return squares.mean(1).reshape(-1, *[1] * (x.dim() - 1))


def per_unit(x: Tensor) -> Tensor:
    """Return ``x`` as a matrix, one line per index of the first dimension."""
    return x.unsqueeze(-1).flatten(1)


def relative_rate(lr: float | Tensor, param: Tensor, floor: float) -> Tensor:
    """Return the learning rate of ``scale="rms"``, ``lr max(RMS(param), floor)``, one per unit.

    A unit is an index of the first dimension.
    """
    size = mean_square(param).clamp(max=torch.finfo(torch.float64).max).sqrt().clamp(min=floor)
    return (lr * size).clamp(max=torch.finfo(param.dtype).max).to(param.dtype)


def unit_direction(c: Tensor, kind: str, kappa: float) -> Tensor:
    """Return each unit of the direction of ``c`` divided by its RMS, which is 1 for a sign.

    That counts as no less than the smallest normal float32, below which a direction is more of
    rounding errors than of anything else: it fades.
    """
    d = direction(c, kind, kappa)
    if kind == "sign":
        return d
    if kind == "power":  # what is finite does not overflow
        most = torch.finfo(d.dtype).max
        d = torch.where(c.isinf(), d, d.clamp(-most, most))
    factor = 1 / mean_square(d).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return factor.to(d.dtype) * d


@dataclass(frozen=True)
class Use:
    """What a rule is used with in one step.

    Attributes:
        lr: learning rate, a number or one element.
        betas: as the group has them.
        weight_decay: decoupled.
        eps: AdamW's.
        step: the number of this step, where the rule counts them, from 1.
        direction, direction_scale: see ``direction``.
        rms_floor: with one, the learning rate is relative, per unit.
        decays: in an accumulation window: bool ``[units]``, whether a unit's moments decay, which
            they do once in a window.
        micro_steps: the gradient counts for one of so many.
        row_wise: AdamW's second moment is of the mean square of a row.
    """

    lr: float | Tensor
    betas: tuple[float, ...]
    weight_decay: float
    eps: float = 0.0
    step: int = 0
    direction: str = "sign"
    direction_scale: float = 1.0
    rms_floor: float | None = None
    decays: Tensor | None = None
    micro_steps: int = 1
    row_wise: bool = False


def sign_momentum(
    param: Tensor, grad: Tensor, moments: list[Tensor | None], use: Use
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the new (param, [exp_avg]) of Lion; with one beta, of Tiger.

    Lion: Chen et al. 2023, arXiv 2302.06675. Tiger: Su 2023, kexue.fm/archives/9512. All tensors
    have one shape ``[units, ...]`` and the arithmetic dtype.
    """
    (exp_avg,) = moments
    assert exp_avg is not None
    beta1, beta2 = (_in_window(beta, param, use) for beta in (use.betas[0], use.betas[-1]))
    weight1, weight2 = ((1 - beta) / use.micro_steps for beta in (use.betas[0], use.betas[-1]))
    lr = use.lr
    decay = lr * use.weight_decay
    c = beta1 * exp_avg + weight1 * grad
    if use.rms_floor is None:
        d = direction(c, use.direction, use.direction_scale)
    else:
        d = unit_direction(c, use.direction, use.direction_scale)
        lr = relative_rate(lr, param, use.rms_floor)
        decay = (lr * use.weight_decay).clamp(max=1)  # at most all of the parameter
    param = (1 - decay) * param - lr * d
    exp_avg = beta2 * exp_avg + weight2 * grad
    return param, [exp_avg]


def _in_window(beta: float, param: Tensor, use: Use) -> float | Tensor:
    """Return what the momentum of each unit decays by."""
    if use.decays is None:
        return beta
    each = use.decays.reshape(-1, *[1] * (param.dim() - 1))
    return torch.ones_like(each, dtype=param.dtype).masked_fill(each, beta)


def catch_up(
    param: Tensor, *, decay: Tensor, drift: Tensor | None = None, exp_avg: Tensor | None = None
) -> Tensor:
    """Return the parameter after skipped steps; ``drift`` is None unless they were sign steps.

    ``decay`` and ``drift`` are broadcast over the rows; ``exp_avg`` has the sign of the steps.
    """
    param = decay * param
    if drift is not None:
        assert exp_avg is not None
        param = param - drift * sign(exp_avg)
    return param


def decayed(moment: Tensor, factor: Tensor, floor: float) -> Tensor:
    """Return a moment after skipped steps: times a factor, float64, which is broadcast over rows.

    It does not fall below the floor, so that it never becomes 0 by underflow; it does if the factor
    is 0.
    """
    product = moment * factor.to(moment.dtype).clamp(min=torch.finfo(moment.dtype).tiny)
    least = moment.abs().clamp(max=floor)
    kept = torch.where(product.abs() < least, torch.copysign(least, moment), product)
    return torch.where(factor == 0, moment * 0, kept)


def current_up_to(last_step: Tensor) -> Tensor:
    """Return the steps up to which rows are current, of their clocks (see tiger_ext/state.py)."""
    return torch.where(last_step < 0, -1 - last_step, last_step)


def brought_to(last_step: Tensor, step: int | Tensor) -> Tensor:
    """Return the clocks of rows that are current up to ``step``, touched or not as before."""
    return torch.where(last_step < 0, -1 - step, step).to(last_step.dtype)


def smallest(storage: torch.dtype, arithmetic: torch.dtype) -> float:
    """Return the floor of a moment: the smallest number that its storage safely keeps."""
    if storage == torch.float16:
        return 2.0**-24
    if storage == arithmetic == torch.float64:
        return torch.finfo(torch.float64).tiny
    return torch.finfo(torch.float32).tiny


def shrink(param: Tensor, *, ratio: float, to: float) -> Tensor:
    """Return the parameter of ``nonfinite="shrink"``: a step towards ``to``."""
    return to + ratio * (param - to)


def mean_over(grad: Tensor, rows: torch.Size) -> Tensor:
    """Return the mean square of each row, summed in float64, in the dtype of ``grad``.

    ``rows`` is the result's shape, with length 1 in the dimensions of a row.
    """
    dims = [d for d in range(grad.dim()) if rows[d] == 1]
    squares = grad.double().square()
    sums = squares.sum(dims, keepdim=True) if dims else squares
    return (sums / max(squares.numel() // max(sums.numel(), 1), 1)).to(grad.dtype)


def adamw(
    param: Tensor, grad: Tensor, moments: list[Tensor | None], use: Use
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the new (param, [exp_avg, exp_avg_sq]) of AdamW.

    Loshchilov & Hutter 2019, arXiv 1711.05101. ``exp_avg`` is None when the first beta is 0. All
    tensors have one shape and the arithmetic dtype; of a ``row_wise`` second moment the dimensions
    of a row have length 1.
    """
    exp_avg, exp_avg_sq = moments
    assert exp_avg_sq is not None
    beta1, beta2 = use.betas
    if exp_avg is None:
        m = grad
    else:
        m = exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    if use.row_wise:
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * mean_over(grad, exp_avg_sq.shape)
    else:
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    m_hat = m / (1 - beta1**use.step)
    v_hat = exp_avg_sq / (1 - beta2**use.step)
    param = (1 - use.lr * use.weight_decay) * param - use.lr * m_hat / (v_hat.sqrt() + use.eps)
    return param, [exp_avg, exp_avg_sq]


def sum_duplicates(
    indices: Tensor, values: Tensor, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the entries of each row of a sparse gradient.

    Args:
        indices: ``[sparse_dim, nnz]``, int64, in any order, with duplicates.
        values: ``[nnz, *dense_shape]``.
        shape: the parameter's shape.
        dtype: the dtype to sum in.

    Returns:
        ``(rows, sums)``: unique indices ``[sparse_dim, touched]`` and sums
        ``[touched, *dense_shape]``.
    """
    sparse_dim = indices.shape[0]
    linear = torch.zeros_like(indices[0])
    for d in range(sparse_dim):
        linear = linear * shape[d] + indices[d]
    unique, position = torch.unique(linear, return_inverse=True)
    sums = torch.zeros((len(unique), *values.shape[1:]), dtype=dtype, device=values.device)
    sums.index_add_(0, position, values.to(dtype))
    rows = []
    for d in reversed(range(sparse_dim)):
        rows.append(unique % shape[d])
        unique = unique // shape[d]
    return torch.stack(rows[::-1]), sums


def check_indices(indices: Tensor, shape: torch.Size) -> None:
    """Raise IndexError if an index ``[sparse_dim, nnz]`` lies outside ``shape``."""
    for d in range(indices.shape[0]):
        bad = (indices[d] < 0) | (indices[d] >= shape[d])
        if bad.any():
            entry = int(bad.nonzero()[0])
            raise IndexError(
                f"the gradient's entry {entry} has row index {int(indices[d, entry])} in dimension "
                f"{d}, out of range for {shape[d]} rows"
            )
