# SPDX-License-Identifier: Apache-2.0
"""What a pass of a step writes, once all of it has been prepared."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiger_ext.group_step import GroupStep
from tiger_ext.lazy import catch_up, note_version, thaw
from tiger_ext.reference_step import ReferenceUpdate

__all__ = ["Pass"]


class Pass:
    """A native step and the updates on the reference beside it.

    Attributes:
        native: the native step, or None.
        on_reference: the updates beside it.
        behind: group, position and last_step of parameters whose rows must be brought up to date
            before.
        thawing: likewise of frozen parameters that train again.
        rewritten: group and position of those to which others have written.
    """

    __slots__ = ("behind", "native", "on_reference", "rewritten", "thawing")

    def __init__(self, native: Any) -> None:
        """Begin with the native step alone."""
        self.native = native
        self.on_reference: list[ReferenceUpdate] = []
        # Most often there are none, and no list is made.
        self.behind: tuple[tuple[GroupStep, int, Tensor], ...] = ()
        self.thawing: tuple[tuple[GroupStep, int, Tensor], ...] = ()
        self.rewritten: tuple[tuple[GroupStep, int], ...] = ()

    def cancelled(self, found_inf: Tensor | None) -> bool | None:
        """Return whether AMP cancels the step; None: only a device knows."""
        if found_inf is None:
            return False
        if self.on_reference:
            return float(found_inf) != 0.0
        return None if self.native is None else self.native.cancelled()

    def apply(self, grad_scale: Tensor | None, states: Any) -> None:
        """Write. May be repeated."""
        for group, position, last_step in self.thawing:
            thaw(group, position, last_step, states)
        for group, position, last_step in self.behind:
            catch_up(group, position, states[group.params[position]], last_step)
        self.behind = ()  # once the step is counted, they would be brought one step further
        if self.native is not None:
            self.native.apply()
        if self.on_reference:
            scale = 1.0 if grad_scale is None else float(grad_scale)
            for update in self.on_reference:
                update.apply(scale)
                if update.group.history is not None:
                    note_version(update.group, update.position)
