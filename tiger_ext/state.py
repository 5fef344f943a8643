# SPDX-License-Identifier: Apache-2.0
"""What state a parameter has, and how it comes to be.

========== ============================ =====================================================
exp_avg    the parameter's shape        first moment (momentum)
exp_avg_   float32, a number a row, or  int8 momentum: what its numbers are multiplied with
scale      [blocks of 256 elements, 1]
exp_avg_sq the parameter's shape, or    AdamW: second moment; with second_moment="row" of
           float32, a number a row      parameters of two or more dimensions
step       0-dim, int64                 AdamW, and where something is rounded stochastically:
                                        the parameter's steps so far
window     int32, a number a row or one accumulation: the window it was last part of
window_rows int64, [row dims, entries]  accumulation with sparse gradients: the rows that the open
                                        window has touched; [0, 0]: see `window`
last_step  int32, a number a row or one lazy modes: the step up to which it is current; -1 minus
                                        that if no gradient has touched it
========== ============================ =====================================================

"A row or one": the parameter's first dimensions, as many as make a row of its gradients, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext.capture import is_capturing
from tiger_ext.clocks import GroupClock
from tiger_ext.group_step import GroupStep, is_row_lazy
from tiger_ext.huge_pages import is_large, move_to_huge_pages
from tiger_ext.moments import converted, new_moments, scale_name, stored_dims
from tiger_ext.rounding import Draws, counts_steps
from tiger_ext.tables import untouched_zeros

__all__ = [
    "StateChanges",
    "WindowError",
    "clock_device",
    "complete_state",
    "convert_state",
    "unlisted",
]


class WindowError(RuntimeError):
    """A gradient does not fit the open accumulation window."""


class StateChanges:
    """The state that a step creates or replaces: what is missing before it, taken back if it fails.

    Attributes:
        state: the optimizer's, by parameter.
    """

    __slots__ = ("_clocks", "_undo", "_what", "state")

    def __init__(self, state: Any, what: str) -> None:
        """Begin with none; ``what`` says in messages what creates the state."""
        self.state = state
        self._what = what
        self._undo: list[tuple[Tensor, str, Any]] = []
        self._clocks: list[tuple[GroupClock, tuple[Any, ...]]] = []

    def will_set(self, p: Tensor, name: str) -> None:
        """Note how to take back that a state is created or replaced.

        Raises:
            RuntimeError: a CUDA graph is being captured, whose every replay would do it again.
        """
        if p.device.type == "cuda" and is_capturing():
            raise RuntimeError(
                f"{self._what} is being captured in a CUDA graph, but a parameter has no state "
                f"{name!r} yet, or one for gradients of another kind, which every replay would "
                "reset: take one step before the capture"
            )
        self._undo.append((p, name, self.state[p].get(name)))

    def will_change(self, p: Tensor, clock: GroupClock) -> None:
        """Note how to take back what a clock says of a parameter."""
        self._clocks.append((clock, clock.standing(p)))

    def take_back(self) -> None:
        """Put back the state of a step that did not happen. May be repeated."""
        for clock, standing in reversed(self._clocks):
            clock.restore(*standing)
        for p, name, old in reversed(self._undo):
            if old is not None:
                self.state[p][name] = old
            elif p in self.state:
                self.state[p].pop(name, None)
        for p in [p for p, state in self.state.items() if not state]:
            del self.state[p]
        self._undo.clear()
        self._clocks.clear()


def complete_state(
    p: Tensor, group: GroupStep, changes: StateChanges, *, ahead: bool = False
) -> dict[str, Any]:
    """Create what is missing of a parameter's state, zero, in the parameter's memory format.

    Args:
        p: the parameter.
        group: its group.
        changes: takes back what was created.
        ahead: whether this is before its first gradient, of which it is taken that its rows are
            those of the first dimension.

    Raises:
        WindowError: the gradient's ``sparse_dim`` changed within an accumulation window.
        RuntimeError: a CUDA graph is being captured.
    """
    state: dict[str, Any] = changes.state[p]
    fresh = not state
    is_table = _has_sparse_gradient(p) or (ahead and p.dim() >= 2)
    if fresh and is_table and is_large(p):
        move_to_huge_pages(p)
    for moment in group.moments():
        if moment.name in state:
            continue
        for name, new in new_moments(p, moment, group, state, ahead=ahead).items():
            changes.will_set(p, name)
            state[name] = new
            if is_table and is_large(new):
                move_to_huge_pages(new)
    counts = counts_steps(group.options) and "step" not in state
    if group.window:
        _complete_window(p, group, changes, ahead)
    if group.history is not None:
        _complete_last_step(p, group, changes, fresh)
    if counts:
        changes.will_set(p, "step")
        # In a lazy mode every step of the group counts in which the parameter took part.
        done = 0
        if group.history is not None:
            done = group.clock.steps_of(p, group.history.now(p.device))
        state["step"] = torch.zeros((), dtype=torch.int64, device=clock_device(p)) + done
    return state


def convert_state(
    group: GroupStep, position: int, changes: StateChanges, *, anew: bool = False
) -> list[Callable[[], Any]]:
    """Let moments be stored as the group's options and this step's rows want it.

    Args:
        group: the parameter's group.
        position: of the parameter in it; its state is complete, or will not be needed.
        changes: note what is replaced.
        anew: an option has been changed: the rows that the state has already do not matter, and
            clocks are not yet divided for the step's gradient.

    Returns:
        What gives them their values, once the rows of the former ones have caught up.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    p = group.params[position]
    state: dict[str, Any] = changes.state[p]
    step = state.get("step")

    def draws() -> Draws | None:
        return group.draws(position, 1 if step is None else int(step) + 1)

    fills = []
    for moment in group.moments():
        if moment.name not in state:
            continue
        found = converted(p, moment, group, state, draws, anew=anew)
        if found is None:
            continue
        for name in (moment.name, scale_name(moment.name)):
            if name in state or name in found[0]:
                changes.will_set(p, name)
                state.pop(name, None)
        state.update(found[0])
        fills.append(found[1])
    return fills


def _has_sparse_gradient(p: Tensor) -> bool:
    return p.grad is not None and p.grad.layout == torch.sparse_coo


def _counters(p: Tensor, dims: int, start: int | Tensor = 0) -> Tensor:
    """Return an int32 counter of each row that begins at ``start``."""
    shape = p.shape[:dims]
    if not is_large(p, 4 * shape.numel()):
        return torch.zeros(shape, dtype=torch.int32, device=p.device).add_(start)
    if not isinstance(start, Tensor) and start == 0:
        new = untouched_zeros(shape, torch.int32)
        move_to_huge_pages(new)
        return new
    return untouched_zeros(shape, torch.int32, huge_pages=True).add_(start)  # written at once


def clock_device(p: Tensor) -> torch.device:
    """Return where the steps of ``p`` are counted: beside it on a GPU, else on the CPU."""
    return p.device if p.device.type == "cuda" else torch.device("cpu")


def unlisted(p: Tensor) -> Tensor:
    """Return the ``window_rows`` that say "not listed: look at the state `window` of each row"."""
    return torch.empty((0, 0), dtype=torch.int64, device=p.device)


def _complete_last_step(p: Tensor, group: GroupStep, changes: StateChanges, fresh: bool) -> None:
    history, clock = group.history, group.clock
    assert history is not None
    state = changes.state[p]
    old, window, g = state.get("last_step"), state.get("window"), p.grad
    if g is not None and g.layout == torch.sparse_coo:
        dims = g.sparse_dim()
    elif window is not None and window.dim() > 0:
        dims = window.dim()
    elif g is not None and is_row_lazy(p, group):
        dims = 1
    elif old is not None and (old.dim() > 0 or p.dim() < 2):
        dims = old.dim()
    else:
        dims = 1 if p.dim() >= 2 else 0
    if old is not None and old.shape == p.shape[:dims]:
        return
    now = history.now(p.device)
    if old is None:
        # State without clocks, of a frozen mode, is taken to be current.
        changes.will_set(p, "last_step")
        changes.will_change(p, clock)
        start = -1 - clock.begins_at(p) if fresh else now
        clock.clocked.add(p)
        state["last_step"] = _counters(p, dims, start)
        return
    changes.will_set(p, "last_step")
    # All rows will have caught up.
    touched = old >= 0
    if dims < old.dim():
        touched = touched.flatten(dims).any(-1)
    touched = touched.reshape(*touched.shape, *[1] * (dims - touched.dim()))
    touched = touched.expand(p.shape[:dims])
    state["last_step"] = torch.where(touched, now, -1 - now).to(torch.int32)


def _complete_window(p: Tensor, group: GroupStep, changes: StateChanges, ahead: bool) -> None:
    state = changes.state[p]
    old = state.get("window")
    if ahead and old is not None:
        return
    dims = 1 if ahead and p.grad is None and p.dim() >= 2 else _window_dims(p, group, state)
    shape = p.shape[:dims]
    strided = p.grad is not None and p.grad.layout == torch.strided
    # A strided gradient that is not by rows goes by any.
    if old is not None and (old.shape == shape or (strided and not shape and old.dim() > 0)):
        return
    # Whether a gradient of the open window has touched it.
    in_window = old is not None and group.in_window and bool((old == group.window).any())
    if old is not None and old.dim() > 0 and in_window:
        if strided:
            raise WindowError(
                f"the gradient is strided, its rows those of the first dimension, but sparse_dim "
                f"was {old.dim()} before in the same accumulation window"
            )
        raise WindowError(
            f"the gradient's sparse_dim changed from {old.dim()} to {len(shape)} within an "
            "accumulation window"
        )
    if old is not None and not in_window and "window_rows" in state:
        changes.will_set(p, "window_rows")  # empty lists, of other row dimensions
        del state["window_rows"]
    changes.will_set(p, "window")
    state["window"] = _counters(p, dims)
    if old is not None and in_window:
        state["window"].copy_(old.expand(shape))
        # Not the gradient's rows alone belong to the window.
        changes.will_set(p, "window_rows")
        state["window_rows"] = unlisted(p)


def _window_dims(p: Tensor, group: GroupStep, state: Mapping[str, Any]) -> int:
    """Return how many leading dimensions make a row of this step's gradient; 0: it has none."""
    if p.grad is not None and p.grad.layout == torch.sparse_coo:
        return p.grad.sparse_dim()
    options = group.options
    per_row = is_row_lazy(p, group) or (options["scale"] == "rms_rows" and p.dim() > 0)
    return 1 if per_row else stored_dims(p, group, state)
