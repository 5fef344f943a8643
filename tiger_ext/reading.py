# SPDX-License-Identifier: Apache-2.0
"""Reads of tracked tables: what happens before a module looks up rows."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from tiger_ext import lazy
from tiger_ext.capture import is_capturing
from tiger_ext.group_step import GroupStep

__all__ = ["Reader"]

_set_grad_enabled = torch._C._set_grad_enabled
_is_grad_enabled, _is_inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled


class Reader:
    """What a tracked module does before it reads rows of ``p``."""

    def __init__(self, optimizer: Any, p: Tensor) -> None:
        """Know the optimizer while it lives."""
        self._optimizer = weakref.ref(optimizer)
        self._p = p

    def __call__(self, ids: Tensor, replica: bool) -> bool:
        """Bring the rows up to date; return whether the next step must know of them.

        The cost does not depend on how many other parameters there are.
        """
        optimizer, p = self._optimizer(), self._p
        if optimizer is None:
            return False
        if _is_inference_mode():  # state that is created here outlives it
            with torch.inference_mode(False):
                return self(ids, replica)
        groups = optimizer.param_groups
        found = optimizer._clocks.find(groups, optimizer.state, p)
        if found is None:
            return False
        options = groups[found[0]]
        if options["lazy"] != "frozen" and not self._is_current(optimizer):
            if replica:
                raise RuntimeError(
                    "nn.DataParallel has copied a table in a lazy mode whose rows were not up to "
                    "date: call optimizer.flush() before each forward pass, track the "
                    "nn.DataParallel itself if it wraps nothing but the table's module, or use "
                    "DistributedDataParallel"
                )
            grad_mode = _is_grad_enabled()
            try:
                _set_grad_enabled(False)
                number = sum(len(group["params"]) for group in groups[: found[0]])
                group = GroupStep(found[0], options, found[1], number)
                lazy.make_current(
                    group, found[1].params[p], optimizer.state, optimizer._reading(), ids
                )
            finally:
                _set_grad_enabled(grad_mode)
        return bool(options["rows"] == "tracked")

    def _is_current(self, optimizer: Any) -> bool:
        used = optimizer._tracked.get(self._p)
        return used is not None and used.current and not is_capturing()
