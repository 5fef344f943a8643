# SPDX-License-Identifier: Apache-2.0
"""Delta checkpoints: what has changed of an optimizer and its parameters since an earlier save.

In a lazy mode ``last_step`` says when a row was last written, so that a delta has those rows alone.
A row may also be written *at* the step of the earlier save, after it: a tracked read brings it up
to that step, which its clock then shows, and ``nonfinite="shrink"`` leaves a clock one step behind.
So rows whose clocks show the step of the earlier save are saved again. Only where all of a
parameter's rows were up to date then, as after a flush, are those that still are left out.

Whatever no clock tells of is saved whole: parameters without rows, groups whose mode is "frozen",
tables to which others have written, state that began, ended or changed its shape.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiger_ext.change_file import Source, write_changes
from tiger_ext.group_step import GroupStep
from tiger_ext.loading import fill_in
from tiger_ext.moments import SCALES
from tiger_ext.optimizer import MixedOptimizer
from tiger_ext.options import MOMENTS
from tiger_ext.positions import (
    CLOCKS_AT_ONCE,
    FORMAT,
    Position,
    checked_since,
    groups_of,
    position_of,
)

__all__ = ["save_changes"]


@torch.no_grad()
def save_changes(
    optimizer: MixedOptimizer, path: str | os.PathLike[str], since: Position | int
) -> Position:
    """Write to ``path`` what has changed since an earlier save, parameters and state.

    Of parameters in a group in a lazy mode that have rows (``last_step``), the file has those that
    were written since; all others, and the clocks, histories and options of all groups, it has
    whole. It takes the place of what is at ``path`` once all of it has been written.

    What is not the optimizer's is not in it: buffers of the model, parameters that no group has,
    schedulers, GradScaler. No hook of ``state_dict`` is called.

    Args:
        optimizer: a Tiger, Lion or AdamW.
        path: where the file is to be.
        since: what ``position``, ``save_changes`` or ``apply_changes`` returned. Where one group
            is in a lazy mode, also the steps that it had taken; then a delta of another run with as
            many steps is not noticed when it is applied.

    Returns:
        Where the optimizer is now: ``since`` of the next delta.

    Raises:
        TypeError: ``since`` is something else.
        ValueError: ``since`` is of another optimizer, or not where this one has been; a parameter
            was resized or is on the device meta; a value in a group cannot be saved for
            ``torch.load(weights_only=True)``.
        OSError: the file cannot be written; what was at ``path`` is still there.
        RuntimeError: a CUDA graph is being captured.
    """
    groups = groups_of(optimizer)
    base = checked_since(since, groups)
    end = position_of(groups, optimizer.state)
    saved: dict[str, Any] = {
        "param_groups": [
            {**group.options, "params": [(k, i) for i in range(len(group.params))]}
            for k, group in enumerate(groups)
        ],
        "state": {},
    }
    fill_in(saved, [group.options for group in groups], [group.clock for group in groups])
    sources: list[Source] = []
    for k, group in enumerate(groups):
        ids = saved["param_groups"][k].pop("params")
        saved["param_groups"][k]["parameters"] = [
            {
                **_saved_parameter(group, i, optimizer.state, base, end, sources),
                "numbers": saved["state"].get(ids[i], {}),
            }
            for i in range(len(group.params))
        ]
    header = {"format": FORMAT, "base": base, "end": end, "groups": saved["param_groups"]}
    write_changes(os.fspath(path), header, sources)
    return end


# --------------------------------------------------------------------------------------- saving


def _saved_parameter(
    group: GroupStep,
    i: int,
    states: Mapping[Tensor, Any],
    base: Position,
    end: Position,
    sources: list[Source],
) -> dict[str, Any]:
    """Return what the header says of a parameter, and add what of its tensors is to be saved."""
    p = group.params[i]
    state = dict(states.get(p, {}))
    now = end["groups"][group.index]["params"][i]
    rows = _Rows.changed(group, i, state, base, now)
    found: dict[str, Any] = {"shape": now["shape"], "dtype": now["dtype"], "rows": None}

    def put(t: Tensor, by_rows: bool) -> int:
        sources.append(Source(t, rows.ids, rows.dims) if by_rows and rows else Source(t))
        return len(sources) - 1

    if rows is not None:
        found["rows"] = {"dims": rows.dims, "ids": put(rows.ids, False)}
    unchanged = rows is not None and not state
    found["parameter"] = None if unchanged else put(p, True)
    found["state"] = {
        name: {"tensor": put(value, by_rows), "by_rows": by_rows}
        if isinstance(value, Tensor)
        else {"value": value}
        for name, value in state.items()
        for by_rows in [rows is not None and name in rows.names]
    }
    return found


@dataclass
class _Rows:
    """The rows of a parameter that have changed.

    Attributes:
        dims: the dimensions that make a row.
        ids: indices into them, linearised, rising.
        names: the state tensors that have rows.
    """

    dims: int
    ids: Tensor
    names: list[str] = field(default_factory=list)

    @classmethod
    def changed(
        cls,
        group: GroupStep,
        i: int,
        state: Mapping[str, Any],
        base: Position,
        now: Mapping[str, Any],
    ) -> _Rows | None:
        """Return them; None: all, or no clock tells."""
        if group.history is None:
            return None
        last_step = state.get("last_step")
        then: Mapping[str, Any] | None = None
        since = base.get("steps")
        if "groups" in base:
            known = base["groups"][group.index :][:1]
            if not known or i >= len(known[0]["params"]):
                return None  # added since
            then, since = known[0]["params"][i], known[0]["steps"]
            rewritten = now["rewritten"]
            if known[0]["line"] == group.clock.line:
                rewritten -= then.get("rewritten", 0)
            if since is None or rewritten or then.get("begins_at") != now.get("begins_at"):
                return None
            if not state and not then["tensors"]:
                return cls(max(len(now["shape"][:1]), 1), torch.empty(0, dtype=torch.int32))
        elif now["rewritten"]:
            return None
        if last_step is None or last_step.dim() == 0:
            return None
        names = _names_with_rows(state, last_step)
        if then is not None and any(then["tensors"].get(n) != now["tensors"][n] for n in names):
            return None
        least = int(since or 0)
        shrinks = group.options["nonfinite"] == "shrink"
        by_rows = "window" in names or "window" not in state
        if then is not None and then["current"] and by_rows and not shrinks:
            least += 1  # those at `since` were there before
        window = state["window"] if "window" in names else None
        dtype = torch.int32 if last_step.numel() < 2**31 else torch.int64
        parts = [
            _changed(*each, least, group.window).to(dtype).add_(k * CLOCKS_AT_ONCE)
            for k, each in enumerate(_split(last_step, window))
        ]
        ids = torch.cat(parts)
        if len(ids) == last_step.numel():
            return None
        return cls(last_step.dim(), ids, names)


def _names_with_rows(state: Mapping[str, Any], last_step: Tensor) -> list[str]:
    """Return the state tensors that change with a row's clock; a user's own are none of them."""
    own = (*MOMENTS, *SCALES, "window", "last_step")
    return [
        name
        for name, value in state.items()
        if name in own and value.shape[: last_step.dim()] == last_step.shape
    ]


def _split(last_step: Tensor, window: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    clocks = last_step.reshape(-1).split(CLOCKS_AT_ONCE)
    if window is None:
        return [(part, None) for part in clocks]
    return list(zip(clocks, window.reshape(-1).split(CLOCKS_AT_ONCE), strict=True))


def _changed(last_step: Tensor, window: Tensor | None, least: int, open_window: int) -> Tensor:
    """Return which rows have changed."""
    # As current_up_to(last_step) >= least, in half the time.
    changed = (last_step >= least).logical_or_(last_step <= -1 - least)
    if window is not None and open_window > 0:
        changed |= window == open_window
    return changed.nonzero().flatten()
