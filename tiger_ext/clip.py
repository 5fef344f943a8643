# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping, by norm and by value, row-sparse gradients included."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Bound now: trainers put ours in the place of torch's.
from torch.nn.utils import clip_grads_with_norm_ as _torch_clip_grads_with_norm_
from torch.nn.utils.clip_grad import clip_grad_norm_ as _torch_clip_grad_norm_
from torch.nn.utils.clip_grad import clip_grad_value_ as _torch_clip_grad_value_

from tiger_ext import _native
from tiger_ext.options import FLOATS

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their total norm is at most ``max_norm``.

    As :func:`torch.nn.utils.clip_grad_norm_`, to which it hands gradients that are all strided, and
    with ``torch.sparse_coo`` gradients too. Entries of one row count as their sum, so the norm is
    that of the gradient made dense, but nothing is made dense or coalesced: memory and time go with
    the number of entries, and ``.grad`` keeps its indices. On the CPU the norm of the sparse
    gradients has the same bits for any number of threads.

    Args:
        parameters: one tensor or an iterable of tensors (generators too), of any shapes, dtypes and
            devices. Those without a gradient do not count. Sparse gradients: any ``sparse_dim``,
            values ``[nnz, ...]``, coalesced or not.
        max_norm: the largest total norm that is let through.
        norm_type: p of the p-norm of each gradient and of these norms together: any number,
            ``math.inf`` and ``-math.inf``; 0 counts (the gradients that are not zero).
        error_if_nonfinite: raise where the total norm is NaN or infinite, instead of scaling by it.
        foreach: False: gradients are taken one by one; True: lists of them at once, RuntimeError on
            devices without such operations; None: what the device has.

    Returns:
        The total norm before clipping: a 0-dim tensor on the device of the first gradient, of the
        gradients' dtype; ``tensor(0.)`` where there is no gradient.

    Raises:
        RuntimeError: with ``error_if_nonfinite``, the total norm is NaN or infinite.
        IndexError: a sparse gradient on the CPU has a row index out of range. On other devices
            finding out would wait for them: such entries do not count.
        In either case no gradient was changed.

    Notes:
        Every gradient ``g`` becomes ``g * min(1, max_norm / (norm + 1e-6))`` (Pascanu et al. 2013,
        "On the difficulty of training recurrent neural networks", arXiv 1211.5063). Duplicates are
        summed in float32, in float64 for float64 gradients. Values that share memory (expanded
        ones) cannot be scaled in place: the gradient gets scaled values of its own.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    if not any(_is_sparse(p) for p in parameters):
        return _torch_clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)

    with torch.no_grad():
        total = _total_norm(parameters, float(norm_type), foreach)
        if error_if_nonfinite and bool(total.isnan() | total.isinf()):
            raise RuntimeError(
                f"The total norm of order {float(norm_type)} for gradients from `parameters` is "
                "non-finite, so it cannot be clipped. To disable this error and scale the "
                "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        _scale(parameters, float(max_norm), total, foreach)
    return total


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    """Clamp the elements of gradients to ``[-clip_value, clip_value]``, in place.

    As :func:`torch.nn.utils.clip_grad_value_`, to which it hands strided gradients, and with
    ``torch.sparse_coo`` gradients too. Of these the *sum* of a row's entries is clamped, which is
    what the gradient made dense has there; nothing is made dense or coalesced, and no device is
    waited for. A row whose sum is within the limits keeps its entries as they are. Of another, the
    first entry becomes the clamped sum and the others become zero: indices, their order and the set
    of touched rows stay.

    Args:
        parameters: one tensor or an iterable of tensors, of any shapes, dtypes and devices. Those
            without a gradient do not count. Sparse gradients: any ``sparse_dim``, values
            ``[nnz, ...]``, coalesced or not.
        clip_value: the largest absolute value that is let through.
        foreach: as of ``clip_grad_norm_``.

    Raises:
        ValueError: ``clip_value`` is negative or NaN, and a gradient is sparse: the rows that it
            does not name could not be zero.
        IndexError: a sparse gradient on the CPU has a row index out of range. On other devices such
            entries are left as they are.
        In either case no gradient was changed.

    Notes:
        NaN stays NaN. Duplicates are summed in float32, in float64 for float64 gradients, and a
        clamped sum is stored in the gradient's dtype.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    parameters = list(parameters)
    sparse = {k: g for k, p in enumerate(parameters) if (g := p.grad) is not None and _is_sparse(p)}
    limit = float(clip_value)
    if sparse and not limit >= 0:
        raise ValueError(f"clip_value={clip_value!r}: expected a number >= 0")
    with torch.no_grad():
        clamped = [(grad, _clamped(grad, limit, k)) for k, grad in sparse.items() if grad._nnz()]
        strided = [p for p in parameters if p.grad is not None and not _is_sparse(p)]
        if strided:  # else torch's may raise
            _torch_clip_grad_value_(strided, limit, foreach)
        for grad, values in clamped:
            if _shares_memory_within(grad._values()):
                _replace_values(grad, values)
            else:
                grad._values().copy_(values)


def _is_sparse(p: Tensor) -> bool:
    return p.grad is not None and p.grad.layout == torch.sparse_coo


# ----------------------------------------------------------------------------------------- norm


def _total_norm(parameters: Sequence[Tensor], p: float, foreach: bool | None) -> Tensor:
    """Return the norm of the norms of all gradients, as torch combines them."""
    dense: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    native: dict[int, Tensor] = {}
    norms: list[Tensor] = []
    first: torch.device | None = None
    for position, parameter in enumerate(parameters):
        grad = parameter.grad
        if grad is None:
            continue
        first = grad.device if first is None else first
        if grad.layout != torch.sparse_coo:
            dense.setdefault((grad.device, grad.dtype), []).append(grad)
        elif _native.C is not None and _has_native_norm(grad):
            native[position] = grad
        else:
            norms.append(_norm_of_summed_rows(grad, p, position))
    norms += _native_norms(native, p)
    for grads in dense.values():
        if foreach is False:
            norms.extend(torch.linalg.vector_norm(grad, p) for grad in grads)
        else:
            norms.extend(torch._foreach_norm(grads, p))
    return torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms]), p)


def _has_native_norm(grad: Tensor) -> bool:
    return (
        type(grad) is Tensor
        and grad.device.type == "cpu"
        and grad.dtype in FLOATS
        and grad.numel() > 0
    )


def _native_norms(grads: dict[int, Tensor], p: float) -> list[Tensor]:
    """Return the norm of each sparse gradient; keyed by the parameter's position, for errors."""
    if not grads:
        return []
    assert _native.C is not None
    try:
        norms = _native.C.row_norms(list(grads.values()), p).unbind()
    except _native.C.UpdateError as error:
        kind, _, place, message = error.args
        exception = IndexError if kind == "index" else RuntimeError
        raise exception(f"tiger_ext: parameters[{list(grads)[place]}]: {message}") from None
    return [norm.to(grad.dtype) for norm, grad in zip(norms, grads.values(), strict=True)]


def _norm_of_summed_rows(grad: Tensor, p: float, position: int) -> Tensor:
    """Return what the native kernel returns, with torch's operations and without a host sync."""
    values = grad._values()
    sums, run, rows = _summed_rows(grad, position)
    if grad.numel() == 0:  # torch has the last word on norms of nothing
        return torch.linalg.vector_norm(values.new_empty(grad.shape), p)
    if len(values) == 0:
        return values.new_zeros((), dtype=values[:0].abs().dtype)
    sums = sums[:-1]
    norm = torch.linalg.vector_norm(sums, p) if p >= 0 else _least(sums, run, rows, p)
    return norm.to(values[:0].abs().dtype)


def _summed_rows(grad: Tensor, position: int) -> tuple[Tensor, Tensor, int]:
    """Sum the entries of each row, with torch's operations and without a host sync.

    Every run of equal rows has a number, below nnz. Bad entries, which only other devices than the
    CPU let pass, have the number nnz.

    Returns:
        The sums by that number, ``[nnz + 1, ...]``, zero where there is none; the number of each
        entry, ``[nnz]``; and how many rows the parameter has.
    """
    values = grad._values()
    nnz = values.shape[0]
    sizes = grad.shape[: grad.sparse_dim()]
    rows = math.prod(sizes)
    row, bad = _linear_rows(grad, sizes)
    if grad.device.type == "cpu" and bool(bad.any()):
        raise _bad_index(grad, sizes, bad, position)
    ordered, order = row.masked_fill(bad, rows).sort(stable=True)
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    number = (starts.cumsum(0) - 1).masked_fill_(ordered == rows, nnz)
    run = torch.empty_like(number).scatter_(0, order, number)
    wide = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
    sums = values.new_zeros((nnz + 1, *values.shape[1:]), dtype=wide)
    return sums.index_add_(0, run, values.to(wide)), run, rows


def _linear_rows(grad: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the row of each entry, and whether one of its indices is out of range: ``[nnz]``."""
    indices = grad._indices().to(torch.int64)
    row = torch.zeros_like(indices[0])
    bad = torch.zeros_like(row, dtype=torch.bool)
    for index, size in zip(indices, sizes, strict=True):
        row = row * size + index
        bad |= (index < 0) | (index >= size)
    return row, bad


def _bad_index(grad: Tensor, sizes: Sequence[int], bad: Tensor, position: int) -> IndexError:
    entry = int(bad.nonzero()[0])
    indices = grad._indices()[:, entry].tolist()
    d = next(d for d, (i, size) in enumerate(zip(indices, sizes, strict=True)) if not 0 <= i < size)
    return IndexError(
        f"tiger_ext: parameters[{position}]: the gradient's entry {entry} has row index "
        f"{indices[d]} in dimension {d}, out of range for {sizes[d]} rows"
    )


def _least(sums: Tensor, run: Tensor, rows: int, p: float) -> Tensor:
    """Return the norm for p < 0, which is 0 as soon as one element of the gradient is zero.

    Infinity is neutral in it, and takes the place of the buffer's rows that stand for none.
    """
    used = torch.zeros(len(sums) + 1, dtype=torch.bool, device=sums.device)
    used = used.index_fill_(0, run, True)[:-1]
    norm = torch.linalg.vector_norm(
        sums.masked_fill_(~used.view(-1, *(1 for _ in sums.shape[1:])), math.inf), p
    )
    untouched = torch.where(used.sum() < rows, 0.0, math.inf).to(norm.dtype)
    return torch.linalg.vector_norm(torch.stack([norm, untouched]), p)


# --------------------------------------------------------------------------------------- values


def _clamped(grad: Tensor, limit: float, position: int) -> Tensor:
    """Return the values ``[nnz, ...]`` of a gradient whose row sums are clamped."""
    values = grad._values()
    sums, run, _ = _summed_rows(grad, position)
    clamped = sums.clamp(-limit, limit)
    exceeds = ((clamped != sums) & ~sums.isnan()).reshape(len(sums), -1).any(1)
    exceeds[-1] = False  # the bad entries'
    nnz = len(values)
    entry = torch.arange(nnz, device=values.device)
    first = torch.full((nnz + 1,), nnz, device=values.device)
    first = first.scatter_reduce_(0, run, entry, "amin")[run] == entry

    def each(mask: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (values.dim() - 1))

    whole = torch.where(each(first), clamped.to(values.dtype)[run], 0)
    return torch.where(each(exceeds[run]), whole, values)


# ---------------------------------------------------------------------------------------- scale


def _scale(
    parameters: Sequence[Tensor], max_norm: float, total: Tensor, foreach: bool | None
) -> None:
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    # Multiplying by 1 changes nothing, but knowing that it is 1 would wait for other devices.
    if total.device.type == "cpu" and bool(factor == 1.0):
        return
    strided = [p for p in parameters if not _is_sparse(p)]
    _torch_clip_grads_with_norm_(strided, max_norm, total, foreach)
    values: dict[torch.device, list[Tensor]] = {}
    for p in parameters:
        if p.grad is None or not _is_sparse(p):
            continue
        if _shares_memory_within(p.grad._values()):
            _replace_values(p.grad, p.grad._values() * factor.to(p.grad.device))
        else:
            values.setdefault(p.grad.device, []).append(p.grad._values())
    for device, tensors in values.items():
        if foreach is False:
            for tensor in tensors:
                tensor.mul_(factor.to(device))
        else:
            torch._foreach_mul_(tensors, factor.to(device))


def _shares_memory_within(t: Tensor) -> bool:
    return any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True))


def _replace_values(grad: Tensor, values: Tensor) -> None:
    grad.data = torch.sparse_coo_tensor(
        grad._indices(),
        values,
        grad.shape,
        is_coalesced=grad.is_coalesced(),
        check_invariants=False,
    )
