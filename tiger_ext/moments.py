# SPDX-License-Identifier: Apache-2.0
"""How a parameter's moments are stored: an element each, or a number a row.

A row is what the first dimensions of the parameter select, as many as ``row_dims`` says. What is
stored by rows is divided anew where a gradient with other rows comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiger_ext.group_step import GroupStep, is_row_lazy
from tiger_ext.options import MOMENTS, REDUCIBLE, Moment
from tiger_ext.reference import arithmetic_dtype, decayed, smallest

__all__ = [
    "check_shapes",
    "converted",
    "is_row_wise",
    "new_moment",
    "read_moment",
    "row_dims",
    "stored_dims",
]


def is_row_wise(p: Tensor, moment: Moment, options: Mapping[str, Any]) -> bool:
    """Return whether a moment of ``p`` is one number a row."""
    return moment.reducible and options.get("second_moment") == "row" and p.dim() >= 2


def stored_dims(p: Tensor, group: GroupStep, state: Mapping[str, Any]) -> int:
    """Return how many leading dimensions make a row of what is stored by rows; 0: nothing is.

    A strided gradient then goes by these rows, all of them or those that ``rows=`` selects.
    """
    for moment in group.moments():
        if is_row_wise(p, moment, group.options) and moment.name in state:
            return int(state[moment.name].dim())
    return 0


def row_dims(p: Tensor, group: GroupStep, state: Mapping[str, Any], *, anew: bool = False) -> int:
    """Return how many leading dimensions make a row of what is to be stored by rows.

    ``anew``: whatever it has been so far.
    """
    g = p.grad
    if g is not None and g.layout == torch.sparse_coo:
        return g.sparse_dim()
    if group.window and "window" in state and state["window"].dim() > 0:
        return int(state["window"].dim())
    if is_row_lazy(p, group) or group.options.get("scale") == "rms_rows":
        return 1
    if group.history is not None and "last_step" in state and state["last_step"].dim() > 0:
        return int(state["last_step"].dim())
    return 1 if anew else stored_dims(p, group, state) or 1


def new_moment(p: Tensor, moment: Moment, group: GroupStep, dims: int) -> Tensor:
    """Return a moment without values, of rows that ``dims`` leading dimensions make.

    One with an element each has the parameter's memory format.
    """
    if is_row_wise(p, moment, group.options):
        return torch.empty(p.shape[:dims], dtype=arithmetic_dtype(p), device=p.device)
    dtype = group.options["momentum_dtype"] or p.dtype
    if moment.wide:
        dtype = torch.promote_types(dtype, p.dtype)
    return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)


def converted(
    p: Tensor, moment: Moment, group: GroupStep, state: Mapping[str, Any], *, anew: bool
) -> tuple[Tensor, Callable[[], Any]] | None:
    """Return a moment as the options and rows want it, and what fills it; None: it is so already.

    It is filled later, because rows may have to catch up before. May be repeated.
    """
    old = state[moment.name]
    if is_row_wise(p, moment, group.options):
        dims = row_dims(p, group, state, anew=anew)
        if old.shape == p.shape[:dims] and old.dtype == arithmetic_dtype(p):
            return None
        new = new_moment(p, moment, group, dims)
    else:
        if old.shape == p.shape:
            return None
        new = new_moment(p, moment, group, 0)
    return new, partial(_fill, new, old)


def read_moment(
    p: Tensor,
    moment: Moment,
    *,
    state: Mapping[str, Any],
    where: tuple[Tensor, ...] | None,
    factor: Tensor | None = None,
) -> Tensor:
    """Return units of a moment in the arithmetic dtype, to be broadcast over those of ``p``.

    Args:
        p: the parameter.
        moment: which one.
        state: the parameter's.
        where: the units' indices; None: the whole parameter is the only one.
        factor: float64, one number a unit: what skipped steps multiply it by.
    """
    stored, arithmetic = state[moment.name], arithmetic_dtype(p)
    units = (stored.unsqueeze(0) if where is None else stored[where]).to(arithmetic)
    if factor is not None:
        each = factor.reshape(-1, *[1] * (units.dim() - 1))
        units = decayed(units, each, smallest(stored.dtype, arithmetic))
    return units.reshape(*units.shape, *[1] * (p.dim() - stored.dim()))


def _fill(new: Tensor, old: Tensor) -> None:
    """Fill a moment with the means over the rows that have been joined, or with what they had."""
    dims = new.dim()
    if dims < old.dim():
        joined = old.double().flatten(dims)
        new.copy_(joined.sum(-1) / max(joined.shape[-1], 1))
    else:
        new.copy_(old.reshape(*old.shape, *[1] * (dims - old.dim())).expand(new.shape))


def check_shapes(p: Tensor, state: Mapping[str, Any]) -> None:
    """Raise RuntimeError unless the moments have the shape of the parameter, or of its rows."""
    for name in MOMENTS:
        if name not in state:
            continue
        shape = state[name].shape
        by_rows = name in REDUCIBLE and p.dim() >= 2 and 0 < len(shape) <= p.dim()
        if shape != (p.shape[: len(shape)] if by_rows else p.shape):
            raise RuntimeError(
                f"the state {name} has shape {list(shape)}, the parameter has shape {list(p.shape)}"
            )
