# SPDX-License-Identifier: Apache-2.0
"""Accumulation windows: which rows the micro-steps have touched, and the windows' clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiger_ext.group_step import GroupStep
from tiger_ext.state import unlisted

__all__ = ["WindowRows", "advance_window", "window_rows"]


@dataclass
class WindowRows:
    """The rows that the gradients of the open window touched, ``[row_dims, entries]``."""

    param: Tensor
    group: GroupStep
    rows: Tensor


def window_rows(
    group: GroupStep, states: Mapping[Tensor, Any], *, adds: bool = True
) -> list[WindowRows]:
    """Return the rows of the open windows, ``adds``: once this step's gradients have been added."""
    found = []
    for p in group.params:
        state = states.get(p)
        if not state or "window" not in state or state["window"].dim() == 0:
            continue
        rows = state.get("window_rows")
        g = p.grad if adds else None
        if g is not None and g.layout == torch.sparse_coo:
            new = g._indices().detach().to(torch.int64)
            if rows is None:
                rows = new.clone()
            elif rows.shape[0] > 0:
                rows = torch.cat([rows, new], 1)
        elif g is not None:
            rows = unlisted(p)
        if rows is not None:
            found.append(WindowRows(p, group, rows))
    return found


def advance_window(group: GroupStep, rows: list[WindowRows], states: Mapping[Tensor, Any]) -> None:
    """Count the micro-step that was taken, and keep the rows of a window that stays open.

    May be repeated. ``rows``: of all groups.
    """
    for each in rows:
        if each.group is group and group.closes:
            states[each.param].pop("window_rows", None)
        elif each.group is group:
            states[each.param]["window_rows"] = each.rows
    group.clock.windows = group.window if group.closes else group.window - 1
    group.clock.micro_steps = 0 if group.closes else group.micro_step
