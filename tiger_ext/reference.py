# SPDX-License-Identifier: Apache-2.0
"""The update rules in plain PyTorch.

This is the definition that the native kernels are tested against, and what runs where no native
kernel exists or ``fused=False`` asks for it. Written to be read: one statement per line of the
mathematics. All functions update their tensors in place.

Arithmetic is float32, or float64 for float64 parameters, whatever the tensors store.
"""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which a parameter's update is computed."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def sign(x: Tensor) -> Tensor:
    """Return the sign of each element: 0 at 0, and NaN (unlike ``torch.sign``) at NaN."""
    return torch.where(x.isnan(), x, torch.sign(x))


def sign_momentum(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """Return the new (param, exp_avg) of Lion; with ``beta1 == beta2``, of Tiger.

    Lion: Chen et al. 2023, arXiv 2302.06675. Tiger: Su 2023, kexue.fm/archives/9512.
    All tensors have one shape and the arithmetic dtype.
    """
    c = beta1 * exp_avg + (1 - beta1) * grad
    param = (1 - lr * weight_decay) * param - lr * sign(c)
    exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    return param, exp_avg


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the new (param, exp_avg, exp_avg_sq) of AdamW at step number ``step``.

    Loshchilov & Hutter 2019, arXiv 1711.05101. ``exp_avg`` is None when ``beta1`` is 0. All tensors
    have one shape and the arithmetic dtype.
    """
    if exp_avg is None:
        m = grad
    else:
        m = exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    m_hat = m / (1 - beta1**step)
    v_hat = exp_avg_sq / (1 - beta2**step)
    param = (1 - lr * weight_decay) * param - lr * m_hat / (v_hat.sqrt() + eps)
    return param, exp_avg, exp_avg_sq


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
