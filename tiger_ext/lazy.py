# SPDX-License-Identifier: Apache-2.0
"""The lazy modes' clocks: rows are brought up to date, and histories count the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native
from tiger_ext.group_step import GroupStep, is_capturing, is_row_lazy
from tiger_ext.progress import Progress
from tiger_ext.reference_step import catch_up_on_reference
from tiger_ext.state import StateChanges, check_shapes, complete_state
from tiger_ext.tracking import UsedRows

__all__ = [
    "advance_histories",
    "catch_up",
    "catch_up_ids",
    "flush",
    "note_current_tables",
    "place_histories",
    "prepare_advance",
]

# How many elements `flush` brings up to date between two strokes of its progress bar.
_FLUSH_ELEMENTS = 1 << 26

# ---------------------------------------------------------------------------------------- rows


def catch_up(
    group: GroupStep,
    position: int,
    state: Mapping[str, Any],
    last_step: Tensor,
    ids: Tensor | None = None,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Bring a parameter's rows, all or those of ``ids``, up to the group's present step.

    Args:
        group: a group in a lazy mode.
        position: of the parameter in it.
        state: the parameter's.
        last_step: its rows' clock; not the state's own where that is for other rows already.
        ids: integers of any shape, any number of times each.
        progress: told how many rows have been looked at.

    Raises:
        IndexError: an id on the CPU is no row.
        RuntimeError: the state is of another size than the parameter.
    """
    p = group.params[position]
    rows = last_step.numel()
    if p.numel() == 0 or p.is_meta:
        return
    if not group.native or not _catch_up_natively(group, position, state, last_step, ids, progress):
        where: tuple[Tensor, ...] | None = None
        if ids is not None:
            ids = ids.reshape(-1).to(p.device, torch.int64)
            bad = ids[(ids < 0) | (ids >= rows)]
            if len(bad) > 0:
                raise IndexError(
                    f"{group.name(position)}: id {int(bad[0])} is out of range for {rows} rows"
                )
            where = torch.unravel_index(ids, last_step.shape)
        try:
            check_shapes(p, state)
        except RuntimeError as error:
            raise RuntimeError(f"{group.name(position)}: {error}") from None
        catch_up_on_reference(p, state, group, last_step, where)
        if progress is not None:
            progress(rows)


def _catch_up_natively(
    group: GroupStep,
    position: int,
    state: Mapping[str, Any],
    last_step: Tensor,
    ids: Tensor | None,
    progress: Callable[[int], Any] | None,
) -> bool:
    """Return whether there is a kernel; if so the rows are up to date."""
    p, history = group.params[position], group.history
    assert history is not None and _native.C is not None
    history.place(p.device, many=group.options["capturable"])
    rule = group.rule(True)
    states = [state[moment.name] for moment in group.moments()]
    rows = last_step.numel()
    chunk = rows if ids is not None else max(_FLUSH_ELEMENTS * rows // p.numel(), 1)
    for begin in range(0, rows, chunk):
        end = min(begin + chunk, rows)
        try:
            there = _native.C.catch_up(
                p, states, last_step, rule, history.native(), ids, begin, end
            )
        except _native.C.UpdateError as error:
            raise _native.translated(error, lambda *_: group.name(position)) from None
        if not there:
            return False
        if progress is not None:
            progress(end - begin)
    return True


def catch_up_ids(
    p: Tensor, ids: Tensor, groups: Iterable[GroupStep], changes: StateChanges
) -> None:
    """Bring the rows that a tracked module is about to read up to date."""
    for group in groups:
        if group.history is None or not (group.history.started or is_capturing()):
            continue
        for position, q in enumerate(group.params):
            if q is p and _has_clock(p, group, changes):
                state = changes.state[p]
                last_step = state["last_step"]
                # Ids are indices of the first dimension.
                catch_up(group, position, state, last_step, None if last_step.dim() != 1 else ids)


def flush(groups: Iterable[GroupStep], changes: StateChanges, progress: bool | None) -> None:
    """Bring every row up to date and begin the histories anew; ``progress``: of a bar."""
    behind = [g for g in groups if g.history is not None and g.history.started]
    rows = sum(len(p) if p.dim() else 1 for group in behind for p in group.params)
    with Progress("flush", rows, progress) as bar:
        for group in behind:
            for position, p in enumerate(group.params):
                if _has_clock(p, group, changes):
                    state = changes.state[p]
                    catch_up(group, position, state, state["last_step"], progress=bar)
            assert group.history is not None
            group.history.forget()


def _has_clock(p: Tensor, group: GroupStep, changes: StateChanges) -> bool:
    """Create what a trainable parameter's state lacks; rows that were never touched age as well."""
    state = changes.state.get(p, {})
    wanted = ("last_step", *(moment.name for moment in group.moments()))
    if p.requires_grad and not all(name in state for name in wanted):
        state = complete_state(p, group, changes)
    return "last_step" in state


# ----------------------------------------------------------------------------------- histories


def place_histories(lazy: Iterable[GroupStep]) -> None:
    """Put the histories of lazy groups where the kernels of their parameters read them."""
    for group in lazy:
        history = group.history
        assert history is not None
        if _native.C is None:
            continue
        many = group.options["capturable"]
        if not history.placed and group.native:
            for device in {p.device for p in group.params if not p.is_meta}:
                history.place(device, many=many)
        history.reserve(many=many)


def prepare_advance(lazy: Iterable[GroupStep], states: Mapping[Tensor, Any], native: Any) -> None:
    """Tell the native step which histories and counters on GPUs will take it."""
    steps, counters = [], []
    for group in lazy:
        history = group.history
        assert history is not None
        if not group.counts_in_history or not history.on_devices:
            continue
        options, betas = group.options, group.options["betas"]
        weight_decay = float(options["weight_decay"])
        steps.append((history.native(), group.index, group.lr, weight_decay, betas[0], betas[-1]))
        counters += _idle_counters(group, states)
    if steps:
        native.will_advance(steps, counters)


def advance_histories(
    lazy: Iterable[GroupStep],
    states: Mapping[Tensor, Any],
    native: Any,
    found_inf: Tensor | None,
) -> None:
    """Count the step, unless ``found_inf``, which the host has not read, cancels it."""
    if native is not None:
        native.advance()
    for group in lazy:
        if not group.counts_in_history:
            continue
        history, lr = group.history, group.lr
        assert history is not None
        if history.on_devices:
            if found_inf is not None or isinstance(lr, Tensor) or is_capturing():
                history.fall_behind(for_good=is_capturing())
                continue
        elif found_inf is not None and float(found_inf) != 0.0:
            continue
        else:
            for counter in _idle_counters(group, states):
                counter += 1
        history.advance(float(lr), float(group.options["weight_decay"]), group.options["betas"])


def _idle_counters(group: GroupStep, states: Mapping[Tensor, Any]) -> list[Tensor]:
    """Return the counters of parameters without a gradient: every step counts."""
    idle = (states.get(p, {}).get("step") for p in group.params if p.grad is None)
    return [counter for counter in idle if counter is not None]


def note_current_tables(
    tracked: Mapping[Tensor, UsedRows], groups: list[GroupStep], certain: bool
) -> None:
    """Note which tracked tables have been updated as a whole, and need not be looked at.

    ``certain``: the step was not cancelled, as the host knows.
    """
    for p, used in tracked.items():
        group = groups[used.group]
        if group.history is None:
            continue
        whole = (
            p.grad is not None
            and p.grad.layout == torch.strided
            and not is_row_lazy(p, group)
            and group.options["nonfinite"] in ("propagate", "raise")
            and not group.window
            and not is_capturing()
            and not group.history.replayed
        )
        used.current = whole and (certain or used.current)
