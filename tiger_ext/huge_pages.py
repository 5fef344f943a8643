# SPDX-License-Identifier: Apache-2.0
"""Huge pages for the tables that steps visit at random rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tiger_ext import _native

__all__ = ["advise_huge_pages", "is_large_table"]

# Below this size a table's page table fits the caches.
_LARGE_TABLE_BYTES = 32 << 20
# Moving a table that is in use to huge pages pays within some thousand steps up to this size.
_COLLAPSE_BYTES = 1 << 30


def is_large_table(p: Tensor) -> bool:
    """Return whether the state of ``p`` will be visited at random rows and is large."""
    return (
        _native.C is not None
        and p.device.type == "cpu"
        and p.layout == torch.strided
        and p.grad is not None
        and p.grad.layout == torch.sparse_coo
        and p.nbytes >= _LARGE_TABLE_BYTES
    )


def advise_huge_pages(tensor: Tensor, *, in_use: bool) -> None:
    """Ask for huge pages behind a tensor on the CPU; ``in_use``: its pages exist already."""
    storage = tensor.untyped_storage()
    if in_use and (tensor.is_shared() or storage.nbytes() > _COLLAPSE_BYTES):
        return
    _native.C.advise_huge_pages(storage.data_ptr(), storage.nbytes(), in_use)  # type: ignore[union-attr]
