# SPDX-License-Identifier: Apache-2.0
"""Accumulation windows: which rows the micro-steps have touched, and the windows' clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext.group_step import GroupStep
from tiger_ext.state import unlisted

__all__ = ["advance_window", "window_rows"]


def window_rows(
    group: GroupStep, states: Mapping[Tensor, Any], *, adds: bool = True
) -> dict[Tensor, Tensor]:
    """Return the rows that the gradients of a group's open window have touched.

    Args:
        group: the group.
        states: the optimizer's, by parameter.
        adds: whether this step's gradients have been added.

    Returns:
        For each parameter that has a number a row: int64 ``[row_dims, entries]``; ``[0, 0]`` says
        "not listed", as ``unlisted``.
    """
    found = {}
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
            found[p] = rows
    return found


def advance_window(
    group: GroupStep, rows: Mapping[Tensor, Tensor], states: Mapping[Tensor, Any]
) -> None:
    """Count the micro-step that was taken, and keep the rows of a window that stays open.

    May be repeated.
    """
    for p, touched in rows.items():
        if group.closes:
            states[p].pop("window_rows", None)
        else:
            states[p]["window_rows"] = touched
    group.clock.windows = group.window if group.closes else group.window - 1
    group.clock.micro_steps = 0 if group.closes else group.micro_step
