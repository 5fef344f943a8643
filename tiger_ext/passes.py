# SPDX-License-Identifier: Apache-2.0
"""What a pass of a step writes, once all of it has been prepared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tiger_ext.group_step import GroupStep
from tiger_ext.lazy import note_version, thaw
from tiger_ext.reference_step import ReferenceUpdate

__all__ = ["Pass"]


class Pass:
    """A native step and the updates on the reference beside it.

    Attributes:
        native: the native step, or None.
        on_reference: the updates beside it.
        before: what is done first, each once: rows are brought up to date, state is divided anew.
        thawing: group, position, last_step and state of frozen parameters that train again.
        rewritten: group and position of those to which others have written.
    """

    __slots__ = ("before", "native", "on_reference", "rewritten", "thawing")

    def __init__(self, native: Any) -> None:
        """Begin with the native step alone."""
        self.native = native
        self.on_reference: list[ReferenceUpdate] = []
        self.before: deque[Callable[[], Any]] = deque()
        self.thawing: list[tuple[GroupStep, int, Tensor, Mapping[str, Any]]] = []
        self.rewritten: list[tuple[GroupStep, int]] = []

    def cancelled(self, found_inf: Tensor | None) -> bool | None:
        """Return whether AMP cancels the step; None: only a device knows."""
        if found_inf is None:
            return False
        if self.on_reference:
            return float(found_inf) != 0.0
        return None if self.native is None else self.native.cancelled()

    def apply(self, grad_scale: Tensor | None, states: Any) -> None:
        """Write. May be repeated."""
        for group, position, last_step, state in self.thawing:
            thaw(group, position, last_step, {group.params[position]: state})
        while self.before:  # once the step is counted, rows would be brought one step further
            self.before[0]()
            self.before.popleft()
        if self.native is not None:
            self.native.apply()
        if self.on_reference:
            scale = 1.0 if grad_scale is None else float(grad_scale)
            for update in self.on_reference:
                update.apply(scale)
                if update.group.history is not None:
                    note_version(update.group, update.position)
