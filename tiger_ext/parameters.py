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
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["check_memory", "check_tensors"]

_SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


def check_tensors(group: Mapping[str, Any], index: int) -> None:
    """Raise ValueError if a parameter of the group cannot be one, or is listed twice.

    Args:
        group: a group with a list as ``params``, of tensors or of pairs of name and tensor.
        index: where the group will stand in the optimizer, for messages.
    """
    seen: dict[int, int] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for position, t in enumerate(_tensors(group)):
            if not isinstance(t, Tensor):  # the base class says so
                continue
            if t.dtype.is_complex:
                raise ValueError(
                    "complex parameters are not supported: "
                    f"{_label(group, index, position)} has dtype {t.dtype}"
                )
            if t.layout in _SPARSE:
                raise ValueError(
                    f"{_label(group, index, position)} has layout {t.layout}, expected "
                    "torch.strided: gradients may be sparse, parameters not"
                )
            if id(t) in seen:
                raise ValueError(
                    f"{_label(group, index, seen[id(t)])} and {_label(group, index, position)} are "
                    "one tensor, which a step would update twice: list it once"
                )
            seen[id(t)] = position


def check_memory(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if two parameters of the groups have an element of memory in common.

    Only parameters that require gradients count: the others take no part in steps. Those without
    memory of their own (meta and fake tensors, wrapping subclasses, freed storages) share none.
    """
    spans: dict[torch.device, list[_Span]] = {}
    seen: set[int] = set()  # a tensor in two groups: the base class says so
    with torch._C.DisableTorchFunctionSubclass():
        for g, group in enumerate(groups):
            for position, t in enumerate(_tensors(group)):
                span = _span_of(t, g, position)
                if span is not None and id(t) not in seen:
                    seen.add(id(t))
                    spans.setdefault(t.device, []).append(span)
    for found in spans.values():
        found.sort()
        for crowd in _crowds(found):
            pair = _sharing(crowd)
            if pair is not None:
                first, second = (
                    _label(groups[s.group], s.group, s.position)
                    for s in sorted(pair, key=lambda s: (s.group, s.position))
                )
                raise ValueError(
                    f"{first} and {second} share memory, which a step would update twice: give the "
                    "optimizer only one of them (a weight that two modules share is one "
                    "nn.Parameter, assigned to both)"
                )


class _Span(NamedTuple):
    """Where a parameter lies: the bytes from ``start`` to ``end``, and what of them is its own."""

    start: int
    end: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    group: int
    position: int

    @property
    def is_filled(self) -> bool:
        """Whether every byte of it is the parameter's."""
        sizes = (n for n, s in zip(self.shape, self.stride, strict=True) if s != 0)
        return math.prod(sizes) * self.itemsize >= self.end - self.start


def _span_of(t: Any, group: int, position: int) -> _Span | None:
    if (
        not isinstance(t, Tensor)
        or type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
        or not t.requires_grad
        or t.is_meta
    ):
        return None
    try:
        if t.numel() == 0 or t.untyped_storage().nbytes() == 0:
            return None
        start, shape, stride, itemsize = t.data_ptr(), tuple(t.shape), t.stride(), t.itemsize
    except RuntimeError:  # it has no storage, or no strides
        return None
    if start == 0:
        return None
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return _Span(start, start + (last + 1) * itemsize, itemsize, shape, stride, group, position)


def _crowds(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    """Yield the spans, which are sorted, that overlap others, together with these."""
    crowd: list[_Span] = []
    reach = 0
    for span in spans:
        if crowd and span.start >= reach:
            if len(crowd) > 1:
                yield crowd
            crowd = []
        crowd.append(span)
        reach = max(reach, span.end) if len(crowd) > 1 else span.end
    if len(crowd) > 1:
        yield crowd


def _sharing(crowd: Sequence[_Span]) -> tuple[_Span, _Span] | None:
    """Return two spans with an element in common; None: they only interleave."""
    filled = [span for span in crowd if span.is_filled]
    for a, b in itertools.pairwise(filled):
        if b.start < a.end:
            return a, b
    # Mark one after the other on a map of the memory.
    begin = crowd[0].start
    unit = math.gcd(*(n for s in crowd for n in (s.itemsize, s.start - begin)))
    taken = torch.zeros((max(s.end for s in crowd) - begin) // unit, dtype=torch.bool)
    views = [_view(taken, s, begin, unit) for s in crowd]
    for k, view in enumerate(views):
        if bool(view.any()):
            for j in range(k):
                taken.zero_()
                views[j].fill_(True)
                if bool(view.any()):
                    return crowd[j], crowd[k]
        view.fill_(True)
    return None


def _view(taken: Tensor, span: _Span, begin: int, unit: int) -> Tensor:
    units = span.itemsize // unit
    dims = [(n, s * units) for n, s in zip(span.shape, span.stride, strict=True) if n > 1 and s > 0]
    dims.append((units, 1))
    sizes, strides = zip(*dims, strict=True)
    return taken.as_strided(sizes, strides, (span.start - begin) // unit)


def _tensors(group: Mapping[str, Any]) -> Iterator[Any]:
    return (p[1] if isinstance(p, tuple) else p for p in group["params"])


def _label(group: Mapping[str, Any], index: int, position: int) -> str:
    p = group["params"][position]
    names = group.get("param_names") or ()
    name = p[0] if isinstance(p, tuple) else names[position] if position < len(names) else None
    where = f"(group {index}, position {position})"
    return f"parameter {where}" if name is None else f"parameter {name!r} {where}"
