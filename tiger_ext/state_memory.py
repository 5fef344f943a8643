# SPDX-License-Identifier: Apache-2.0
"""State before the first step, and state in memory that several processes share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext.finish import finish
from tiger_ext.group_step import GroupStep
from tiger_ext.huge_pages import advise_huge_pages
from tiger_ext.state import StateChanges, complete_state
from tiger_ext.tables import shared_zeros

__all__ = ["check_shareable", "init_state", "share_state"]

# What is copied at a time: a part that is zero stays unwritten.
_PART_BYTES = 2 << 20


def init_state(groups: Iterable[GroupStep], states: Any, what: str) -> None:
    """Create the state that the parameters which train do not have yet, or nothing.

    Args:
        groups: the optimizer's groups.
        states: its state, by parameter.
        what: what messages call it.
    """
    changes = StateChanges(states, what)
    try:
        for group in groups:
            for p in group.params:
                if p.requires_grad:
                    complete_state(p, group, changes, ahead=True)
            group.put_placeholders()
    except BaseException:
        finish(changes.take_back)
        raise


def share_state(groups: Iterable[GroupStep], states: Mapping[Tensor, Any]) -> None:
    """Put the tensors on the CPU of the groups' parameters' states into shared memory, in place."""
    for group in groups:
        for p in group.params:
            for value in states.get(p, {}).values():
                if isinstance(value, Tensor) and value.device.type == "cpu":
                    _share(value)


def check_shareable(groups: Iterable[GroupStep]) -> None:
    """Raise ValueError if a group counts what processes would have to count together."""
    for group in groups:
        options = group.options
        for name, expected in (("lazy", "frozen"), ("accumulation_steps", 1)):
            if options.get(name, expected) != expected:
                raise ValueError(
                    f"share_memory: group {group.index}: {name}={options[name]!r}: expected "
                    f"{expected!r}: its counters are each process's own"
                )


def _share(tensor: Tensor) -> None:
    """Do what ``share_memory_`` does, but write no page for zeros that were never written."""
    if tensor.is_shared():
        return
    storage = tensor.untyped_storage()
    shared = shared_zeros(storage.nbytes())
    advise_huge_pages(shared)
    source, target = (_bytes(each) for each in (storage, shared))
    for begin in range(0, len(source), _PART_BYTES):
        part = source[begin : begin + _PART_BYTES]
        if part.any():
            target[begin : begin + _PART_BYTES] = part
    tensor.set_(shared, tensor.storage_offset(), tensor.shape, tensor.stride())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
