# SPDX-License-Identifier: Apache-2.0
"""How a parameter's moments are stored: an element each, a number a row, or int8 with scales.

A row is what the first dimensions of the parameter select, as many as ``row_dims`` says. What is
stored by rows is divided anew where a gradient with other rows comes.

An int8 moment is ``q * scale``, with one scale, ``exp_avg_scale``, for each row where the update
goes by rows or may, else for each block of 256 elements, in the order in which ``q`` lies in
memory. Scales of rows have the rows' shape, those of blocks are ``[blocks, 1]``, which is never the
shape of rows (of a parameter ``[blocks, 1, ...]`` there are more dimensions of length 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiger_ext.group_step import GroupStep, is_row_lazy
from tiger_ext.huge_pages import is_large
from tiger_ext.options import MOMENTS, REDUCIBLE, Moment
from tiger_ext.reference import arithmetic_dtype, decayed, per_unit, smallest
from tiger_ext.rounding import BLOCK, MOMENTUM, REQUANTISED, Draws, memory_order, quantised
from tiger_ext.tables import untouched_zeros, untouched_zeros_like

__all__ = [
    "SCALES",
    "Where",
    "block_scales",
    "check_shapes",
    "converted",
    "decaying",
    "is_int8",
    "is_row_wise",
    "is_scale",
    "new_moments",
    "read_moment",
    "read_units",
    "row_dims",
    "scale_name",
    "stored_dims",
    "written_moment",
]


def scale_name(moment: str) -> str:
    """Return what the state calls the scales of a moment."""
    return f"{moment}_scale"


# The names of all scales.
SCALES = tuple(map(scale_name, MOMENTS))

# Where units are: an index for each of their dimensions; None: the whole parameter is the only one.
Where = tuple[Tensor, ...] | None


def is_row_wise(p: Tensor, moment: Moment, options: Mapping[str, Any]) -> bool:
    """Return whether a moment of ``p`` is one number a row."""
    return moment.reducible and options.get("second_moment") == "row" and p.dim() >= 2


def is_int8(moment: Moment, options: Mapping[str, Any]) -> bool:
    """Return whether a moment is stored in int8."""
    return not moment.wide and options["momentum_dtype"] == torch.int8


def block_scales(p: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales of blocks: ``[blocks, 1]``, unless rows might have that."""
    shape = (-(-p.numel() // BLOCK), 1)
    return shape if p.shape[:2] != shape else (*shape, *[1] * (p.dim() - 1))


def stored_dims(p: Tensor, group: GroupStep, state: Mapping[str, Any]) -> int:
    """Return how many leading dimensions make a row of what is stored by rows; 0: nothing is.

    A strided gradient then goes by these rows, all of them or those that ``rows=`` selects.
    """
    for moment in group.moments():
        if is_row_wise(p, moment, group.options) or _scales_rows(p, moment, group, state):
            return row_dims(p, group, state)
    return 0


def row_dims(p: Tensor, group: GroupStep, state: Mapping[str, Any], *, anew: bool = False) -> int:
    """Return how many leading dimensions make a row of what is to be stored by rows.

    ``anew``: whatever it has been so far, and not yet for this step's gradient where there are
    clocks, which are divided after it.
    """
    g = p.grad
    clocked = group.history is not None and "last_step" in state and state["last_step"].dim() > 0
    if anew and clocked:
        return int(state["last_step"].dim())
    if g is not None and g.layout == torch.sparse_coo:
        return g.sparse_dim()
    if group.window and "window" in state and state["window"].dim() > 0:
        return int(state["window"].dim())
    if is_row_lazy(p, group) or group.options.get("scale") == "rms_rows":
        return 1
    if clocked:
        return int(state["last_step"].dim())
    if not anew:
        for moment in group.moments():
            if is_row_wise(p, moment, group.options) and moment.name in state:
                return int(state[moment.name].dim())
            if is_int8(moment, group.options) and (dims := _dims_of_scale(p, moment, state)):
                return dims
    return 1


def _scales_rows(p: Tensor, moment: Moment, group: GroupStep, state: Mapping[str, Any]) -> bool:
    """Return whether an int8 moment has a scale for each row."""
    options = group.options
    if not is_int8(moment, options):
        return False
    lazy = options["rows"] is not None or options["lazy"] != "frozen"
    if p.dim() >= 2 and (lazy or options.get("second_moment") == "row"):
        return True
    if p.dim() > 0 and options.get("scale") == "rms_rows":
        return True
    if p.grad is not None and p.grad.layout == torch.sparse_coo:
        return True
    by_rows = (group.window and state.get("window"), group.history and state.get("last_step"))
    if any(isinstance(clock, Tensor) and clock.dim() > 0 for clock in by_rows):
        return True
    return _dims_of_scale(p, moment, state) > 0


def _dims_of_scale(p: Tensor, moment: Moment, state: Mapping[str, Any]) -> int:
    """Return how many dimensions make a row of a moment's scales; 0: they are of blocks or none."""
    scale = state.get(scale_name(moment.name))
    if scale is None or not 0 < scale.dim() <= p.dim() or scale.shape != p.shape[: scale.dim()]:
        return 0
    return int(scale.dim())


def new_moments(
    p: Tensor,
    moment: Moment,
    group: GroupStep,
    state: Mapping[str, Any],
    *,
    anew: bool = False,
    ahead: bool = False,
) -> dict[str, Tensor]:
    """Return a moment, and its scales if it has any, zero.

    One with an element each has the parameter's memory format. ``ahead``: before the first
    gradient, whose rows are taken to be those of the first dimension.
    """
    dims = row_dims(p, group, state, anew=anew)
    if is_row_wise(p, moment, group.options):
        return {moment.name: _zeros(p, p.shape[:dims], arithmetic_dtype(p))}
    if is_int8(moment, group.options):
        by_rows = _scales_rows(p, moment, group, state) or (ahead and p.dim() >= 2)
        q = _zeros_like(p, torch.int8)
        if not _lies_alike(q, p):
            q = _zeros(p, p.shape, torch.int8)
        scale = _zeros(p, p.shape[:dims] if by_rows else block_scales(p), torch.float32)
        return {moment.name: q, scale_name(moment.name): scale}
    dtype = group.options["momentum_dtype"] or p.dtype
    if dtype == torch.int8:
        dtype = torch.float32
    if moment.wide:
        dtype = torch.promote_types(dtype, p.dtype)
    return {moment.name: _zeros_like(p, dtype)}


def _zeros(p: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if is_large(p, math.prod(shape) * dtype.itemsize):
        return untouched_zeros(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=p.device)


def _zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    if is_large(p, p.numel() * dtype.itemsize):
        return untouched_zeros_like(p, dtype)
    return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).zero_()


def _lies_alike(q: Tensor, p: Tensor) -> bool:
    """Return whether blocks of ``q`` are those of ``p``, where these are in memory order."""
    if p.is_contiguous() or not _fills_its_memory(p):
        return q.is_contiguous()
    sizes = zip(p.shape, p.stride(), q.stride(), strict=True)
    return all(own == other for n, own, other in sizes if n > 1)


def _fills_its_memory(p: Tensor) -> bool:
    return p.permute(sorted(range(p.dim()), key=p.stride, reverse=True)).is_contiguous()


# --------------------------------------------------------------------------- reading and writing


def decaying(moment: Moment, state: Mapping[str, Any]) -> Tensor:
    """Return what skipped steps multiply, of an int8 moment its scales."""
    stored: Tensor = state[moment.name]
    if stored.dtype == torch.int8:
        scale: Tensor = state[scale_name(moment.name)]
        return scale
    return stored


def read_moment(
    p: Tensor,
    moment: Moment,
    *,
    state: Mapping[str, Any],
    where: Where,
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
    stored, arithmetic = decaying(moment, state), arithmetic_dtype(p)
    units = read_units(stored, where).to(arithmetic)
    if factor is not None:
        each = factor.reshape(-1, *[1] * (units.dim() - 1))
        units = decayed(units, each, smallest(stored.dtype, arithmetic))
    q = state[moment.name]
    if q.dtype != torch.int8 or _dims_of_scale(p, moment, state):
        units = units.reshape(*units.shape, *[1] * (p.dim() - stored.dim()))
    else:
        units = units.flatten()[memory_order(q) // BLOCK].unsqueeze(0)
    return units if q.dtype != torch.int8 else read_units(q, where).to(arithmetic) * units


def read_units(tensor: Tensor, where: Where) -> Tensor:
    """Return units of a tensor, the first dimension being theirs."""
    return tensor.unsqueeze(0) if where is None else tensor[where]


def written_moment(
    p: Tensor,
    moment: Moment,
    state: Mapping[str, Any],
    where: Where,
    units: Tensor,
    draws: Draws | None,
    stream: int = MOMENTUM,
) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors that hold a moment, and what units of them become, of their dtype."""
    stored = state[moment.name]
    if stored.dtype != torch.int8:
        return [(stored, units)]
    scale = state[scale_name(moment.name)]
    assert draws is not None
    values, bits = units.to(torch.float32), draws.bits(stream, p, where)
    if where is not None:
        q, scales = quantised(per_unit(values), per_unit(bits.expand_as(values)))
        return [(stored, q.reshape(units.shape)), (scale, scales)]
    order = memory_order(p).flatten()
    blocks = []
    for t in (values, bits):
        line = t.new_zeros(scale.numel() * BLOCK)
        line[order] = t.flatten()
        blocks.append(line.reshape(-1, BLOCK))
    q, scales = quantised(*blocks)
    return [
        (stored, q.flatten()[order].reshape(units.shape)),
        (scale, scales.reshape(1, *scale.shape)),
    ]


# ------------------------------------------------------------------------------------ converting


def converted(
    p: Tensor,
    moment: Moment,
    group: GroupStep,
    state: Mapping[str, Any],
    draws: Callable[[], Draws | None],
    *,
    anew: bool,
) -> tuple[dict[str, Tensor], Callable[[], Any]] | None:
    """Return a moment as the options and rows want it, and what fills it; None: it is so already.

    It is filled later, because rows may have to catch up before. May be repeated.
    """
    stored, scale = state[moment.name], state.get(scale_name(moment.name))
    dims = row_dims(p, group, state, anew=anew)
    if is_row_wise(p, moment, group.options):
        if stored.shape == p.shape[:dims] and stored.dtype == arithmetic_dtype(p):
            return None
    elif is_int8(moment, group.options):
        by_rows = _scales_rows(p, moment, group, state)
        wanted = p.shape[:dims] if by_rows else block_scales(p)
        same = scale is not None and scale.shape == wanted
        if stored.dtype == torch.int8 and same and (by_rows or _lies_alike(stored, p)):
            return None
    elif stored.dtype != torch.int8 and stored.shape == p.shape:
        return None
    new = new_moments(p, moment, group, state, anew=anew)
    old = {moment.name: stored, scale_name(moment.name): scale}
    if is_int8(moment, group.options):
        return new, partial(_requantise, p, moment, new, old, draws)
    if stored.dtype == torch.int8:
        return new, partial(_dequantise, p, moment, new[moment.name], old)
    return new, partial(_resize, new[moment.name], stored)


def _dequantise(p: Tensor, moment: Moment, new: Tensor, old: Mapping[str, Any]) -> None:
    new.copy_(read_moment(p, moment, state=old, where=None).squeeze(0))


def _requantise(
    p: Tensor,
    moment: Moment,
    new: Mapping[str, Tensor],
    old: Mapping[str, Any],
    draws: Callable[[], Draws | None],
) -> None:
    where = None
    units = read_moment(p, moment, state=old, where=None).expand(1, *p.shape)
    scale = new[scale_name(moment.name)]
    if scale.shape != block_scales(p):
        rows = torch.ones(scale.shape, dtype=torch.bool, device=p.device)
        where = rows.nonzero(as_tuple=True)
        units = units.squeeze(0)[where]
    for tensor, values in written_moment(p, moment, new, where, units, draws(), REQUANTISED):
        tensor.copy_(values.reshape(tensor.shape))


def _resize(new: Tensor, old: Tensor) -> None:
    """Fill a moment with the means over the rows that have been joined, or with what they had."""
    dims = new.dim()
    if dims < old.dim():
        joined = old.double().flatten(dims)
        new.copy_(joined.sum(-1) / max(joined.shape[-1], 1))
    else:
        new.copy_(old.reshape(*old.shape, *[1] * (dims - old.dim())).expand(new.shape))


# -------------------------------------------------------------------------------------- checking


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
        if state[name].dtype == torch.int8:
            scale = state.get(scale_name(name))
            if scale is None or not is_scale(p, scale):
                found = "there is none" if scale is None else f"it has shape {list(scale.shape)}"
                raise RuntimeError(
                    f"the state {name} is int8 and needs {scale_name(name)} of the shape of the "
                    f"first dimensions of {list(p.shape)}, or {list(block_scales(p))}, but {found}"
                )


def is_scale(p: Tensor, scale: Tensor) -> bool:
    """Return whether a tensor has the shape of scales for the rows or blocks of ``p``."""
    by_rows = 0 < scale.dim() <= p.dim() and scale.shape == p.shape[: scale.dim()]
    return by_rows or scale.shape == block_scales(p)
