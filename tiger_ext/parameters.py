# SPDX-License-Identifier: Apache-2.0
"""Which tensors an optimizer takes as parameters; checked when their group is added.

Two parameters that share memory would be updated by two threads at once, and each by the other's
result: which of the two writes survives is chance. Parameters that merely lie in one buffer (flat
parameters of ZeRO and FSDP, columns of one matrix) are as good as any others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_memory", "check_tensors", "parameter_name"]

_SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


# Where a parameter lies: its first byte, the end (there may be gaps between), group and position.
_Span = tuple[int, int, int, int, Tensor]


def parameter_name(group: Mapping[str, Any], index: int, position: int) -> str:
    """Return what messages call the parameter at a position of the group at an index.

    Args:
        group: a group, also one that has pairs of name and tensor as ``params``.
        index: where the group stands in the optimizer.
        position: where the parameter stands in the group.
    """
    p = list(group["params"])[position]
    names = group.get("param_names") or ()
    name = p[0] if isinstance(p, tuple) else names[position] if position < len(names) else None
    where = f"(group {index}, position {position})"
    return f"parameter {where}" if name is None else f"parameter {name!r} {where}"


def check_tensors(group: Mapping[str, Any], index: int) -> None:
    """Check the parameters of a group, whether they require gradients or not.

    Args:
        group: a group with a list as ``params``, of tensors or of pairs of name and tensor.
        index: where the group will stand in the optimizer, for messages.

    Raises:
        ValueError: one of them is complex or sparse, or listed twice.
    """
    seen: dict[int, int] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for position, t in enumerate(_tensors(group)):
            if not isinstance(t, Tensor):  # the base class says so
                continue
            if t.dtype.is_complex:
                raise ValueError(
                    "complex parameters are not supported: "
                    f"{parameter_name(group, index, position)} has dtype {t.dtype}"
                )
            if t.layout in _SPARSE:
                raise ValueError(
                    f"{parameter_name(group, index, position)} has layout {t.layout}, expected "
                    "torch.strided: gradients may be sparse, parameters not"
                )
            if id(t) in seen:
                first, second = (parameter_name(group, index, k) for k in (seen[id(t)], position))
                raise ValueError(
                    f"{first} and {second} are one tensor, which a step would update twice: list "
                    "it once"
                )
            seen[id(t)] = position


def check_memory(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that no two parameters of the groups have an element of memory in common.

    Only parameters that require gradients count: the others take no part in steps (and are looked
    at again when the next group is added). Those without memory of their own (meta, fake and nested
    tensors, wrapping subclasses, freed storages) share none. A tensor that is in two groups is left
    to the base class.

    Args:
        groups: parameter groups, with tensors or pairs of name and tensor as ``params``.

    Raises:
        ValueError: two of them have; the message has their names and positions.
    """
    spans: list[_Span] = []
    with torch._C.DisableTorchFunctionSubclass():
        for g, group in enumerate(groups):
            for position, t in enumerate(_tensors(group)):
                if isinstance(t, Tensor) and t.requires_grad and _has_memory(t):
                    try:
                        begin = t.data_ptr()
                    except RuntimeError:  # it has no storage
                        continue
                    if begin:
                        spans.append((begin, begin + _extent(t), g, position, t))
        spans.sort()
        for crowd in _crowds(spans):
            found = _sharing(crowd)
            if found is not None:
                places = sorted((g, position) for _, _, g, position, _ in found)
                first, second = (parameter_name(groups[g], g, position) for g, position in places)
                raise ValueError(
                    f"{first} and {second} share memory, which a step would update twice: give the "
                    "optimizer only one of them (a weight that two modules share is one "
                    "nn.Parameter, assigned to both)"
                )


def _has_memory(t: Tensor) -> bool:
    if t.layout != torch.strided or t.is_nested:
        return False
    return type(t) is nn.Parameter or (
        type(t).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    )


def _extent(t: Tensor) -> int:
    """Return how many bytes lie between the first and the end of the last element."""
    if t.is_contiguous():
        return t.numel() * t.itemsize
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.itemsize


def _crowds(spans: Sequence[_Span]) -> Iterator[Sequence[_Span]]:
    """Yield the spans, which are sorted, that overlap others, together with these."""
    first, reach = 0, 0
    for k, (begin, end, *_) in enumerate(spans):
        if begin >= reach:
            if k - first > 1:
                yield spans[first:k]
            first = k
        reach = max(reach, end)
    if len(spans) - first > 1:
        yield spans[first:]


def _sharing(crowd: Sequence[_Span]) -> tuple[_Span, _Span] | None:
    """Return two spans with an element in common; None: they only interleave."""
    by_device: dict[torch.device, dict[int, _Span]] = {}
    for span in crowd:
        t = span[-1]
        if t.untyped_storage().nbytes() > 0:  # else it is freed, and its address means nothing
            by_device.setdefault(t.device, {})[id(t)] = span
    for spans in by_device.values():
        found = _meeting_on_map(list(spans.values())) if len(spans) > 1 else None
        if found is not None:
            return found
    return None


def _meeting_on_map(spans: list[_Span]) -> tuple[_Span, _Span] | None:
    """Mark one span after the other on a map of the memory, until a place is taken."""
    for a, b in itertools.pairwise(span for span in spans if not _has_gaps(span)):
        if b[0] < a[1]:
            return a, b
    start, end = spans[0][0], max(end for _, end, *_ in spans)
    unit = math.gcd(*(n for begin, _, _, _, t in spans for n in (t.itemsize, begin - start)))
    taken = torch.zeros((end - start) // unit, dtype=torch.bool, device="cpu")
    parts = []
    for begin, _, _, _, t in spans:
        units = t.itemsize // unit
        dims = [*((n, s * units) for n, s in _steps(t)), (units, 1)]
        sizes, strides = zip(*dims, strict=True)
        parts.append(taken.as_strided(sizes, strides, (begin - start) // unit))
    for k, part in enumerate(parts):
        if bool(part.any()):
            for j in range(k):
                taken.zero_()
                parts[j].fill_(True)
                if bool(part.any()):
                    return spans[j], spans[k]
        part.fill_(True)
    return None


def _steps(t: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of the dimensions along which the elements lie apart."""
    return [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and s > 0]


def _has_gaps(span: _Span) -> bool:
    begin, end, _, _, t = span
    return math.prod(n for n, _ in _steps(t)) * t.itemsize < end - begin


def _tensors(group: Mapping[str, Any]) -> Iterator[Any]:
    return (p[1] if isinstance(p, tuple) else p for p in group["params"])
