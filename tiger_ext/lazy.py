# SPDX-License-Identifier: Apache-2.0
"""The lazy modes' clocks: rows are brought up to date, and histories count the steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native
from tiger_ext.capture import is_capturing
from tiger_ext.finish import finish
from tiger_ext.group_step import GroupStep, is_row_lazy
from tiger_ext.moments import check_shapes
from tiger_ext.progress import Progress
from tiger_ext.reference import brought_to, current_up_to
from tiger_ext.reference_step import catch_up_on_reference
from tiger_ext.rounding import counts_steps
from tiger_ext.state import StateChanges, complete_state, convert_state
from tiger_ext.tracking import UsedRows

__all__ = [
    "Counting",
    "catch_up",
    "flush",
    "is_rewritten",
    "look_at_idle",
    "make_current",
    "note_current_tables",
    "note_version",
    "place_histories",
    "prepare_counting",
    "thaw",
    "warn_if_behind",
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
    until: int | None = None,
) -> None:
    """Bring a parameter's rows, all or those of ``ids``, up to the group's present step.

    Args:
        group: a group in a lazy mode.
        position: of the parameter in it.
        state: the parameter's.
        last_step: its rows' clock; not the state's own where that is for other rows already.
        ids: integers of any shape, any number of times each.
        progress: told how many rows have been looked at.
        until: a step of the past, in the place of the present one.

    Raises:
        IndexError: an id on the CPU is no row.
        RuntimeError: the state is of another size than the parameter.
    """
    p = group.params[position]
    rows = last_step.numel()
    if p.numel() == 0 or p.is_meta:
        return
    arguments = (group, position, state, last_step, ids, progress, until)
    # What is stored as an option wanted that has been changed since is read by the reference.
    native = group.native and group.storage == group.clock.storage
    if not native or not _catch_up_natively(*arguments):
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
        catch_up_on_reference(group, position, state, last_step, where, until)
        note_version(group, position)
        if progress is not None:
            progress(rows)


def _catch_up_natively(
    group: GroupStep,
    position: int,
    state: Mapping[str, Any],
    last_step: Tensor,
    ids: Tensor | None,
    progress: Callable[[int], Any] | None,
    until: int | None,
) -> bool:
    """Return whether there is a kernel; if so the rows are up to date."""
    p, history = group.params[position], group.history
    assert history is not None and _native.C is not None
    history.place(p.device, many=group.options["capturable"])
    rule = group.rule(True)
    states = [state[moment.name] for moment in group.moments()]
    quantised = any(each.dtype == torch.int8 for each in states)
    scale = state.get("exp_avg_scale") if quantised else None
    rows = last_step.numel()
    chunk = rows if ids is not None else max(_FLUSH_ELEMENTS * rows // p.numel(), 1)
    for begin in range(0, rows, chunk):
        end = min(begin + chunk, rows)
        try:
            there = _native.C.catch_up(
                p,
                states,
                last_step,
                rule,
                history.native(),
                position,
                ids,
                begin,
                end,
                until,
                scale,
            )
        except _native.C.UpdateError as error:
            raise _native.translated(error, lambda *_: group.name(position)) from None
        if not there:
            return False
        if progress is not None:
            progress(end - begin)
    return True


def make_current(
    group: GroupStep,
    position: int,
    states: Mapping[Tensor, Any],
    what: str,
    ids: Tensor | None = None,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Bring a parameter's rows up to date before they are read: all, or those of ``ids``.

    Creates what a trainable parameter's state lacks, as rows that were never touched age as well. A
    frozen one stands.

    Args:
        group: a group in a lazy mode.
        position: of the parameter in it.
        states: the optimizer's, by parameter.
        what: what messages call the read.
        ids: indices of the first dimension, int64, of any shape, any number of times each.
        progress: told how many rows have been looked at.
    """
    p, history = group.params[position], group.history
    assert history is not None
    if not (history.started or is_capturing()):
        return
    if not p.requires_grad:
        group.clock.freeze(p)
        return
    wanted = ("last_step", *(moment.name for moment in group.moments()))
    missing = any(name not in states.get(p, {}) for name in wanted)
    if missing or group.storage != group.clock.storage:
        changes = StateChanges(states, what)
        try:
            if missing:
                complete_state(p, group, changes)
            changed = group.storage != group.clock.storage
            for fill in convert_state(group, position, changes, anew=changed):
                fill()
            if changed:
                # Not all of the group's parameters are converted yet. No options are equal to `()`:
                # until the next step reads look at each again, and take the reference.
                group.clock.storage = ()
        except BaseException:
            finish(changes.take_back)
            raise
    last_step = states[p]["last_step"]
    thaw(group, position, last_step, states)
    if is_rewritten(group, position):
        warn_if_behind(group, position, states)
    if last_step.dim() != 1:
        ids = None  # they are not the rows
    catch_up(group, position, states[p], last_step, ids, progress)


def flush(
    groups: Iterable[GroupStep],
    states: Mapping[Tensor, Any],
    what: str,
    progress: bool | None,
) -> None:
    """Bring every row up to date and begin the histories anew; ``progress``: of a bar."""
    behind = [g for g in groups if g.history is not None and g.history.started]
    rows = sum(len(p) if p.dim() else 1 for group in behind for p in group.params)
    with Progress("flush", rows, progress) as bar:
        for group in behind:
            for position in range(len(group.params)):
                make_current(group, position, states, what, progress=bar)
            assert group.history is not None
            if not any(_frozen_behind(p, group, states) for p in group.clock.frozen):
                finish(group.history.forget)


# --------------------------------------------------------------------------- frozen parameters


def look_at_idle(group: GroupStep, positions: Iterable[int], changes: StateChanges) -> None:
    """Look at parameters without a gradient that do not train, or have no clock yet.

    Those that do not train are frozen from now on. Where there is a state from before the lazy
    mode, its clock starts; and a parameter whose state was cleared begins again.
    """
    clock = group.clock
    for position in positions:
        p = group.params[position]
        if not p.requires_grad:
            if p not in clock.frozen and not _is_in_window(p, group, changes.state):
                changes.will_change(p, clock)
                clock.freeze(p)
        elif changes.state.get(p):
            complete_state(p, group, changes)
        elif p in clock.clocked:
            changes.will_change(p, clock)
            clock.begins_at(p)


def _is_in_window(p: Tensor, group: GroupStep, states: Mapping[Tensor, Any]) -> bool:
    """Return whether a gradient has reached a parameter in the open accumulation window."""
    window = states.get(p, {}).get("window") if group.in_window else None
    return window is not None and bool((window == group.window).any())


def thaw(group: GroupStep, position: int, last_step: Tensor, states: Mapping[Tensor, Any]) -> None:
    """Let a frozen parameter go on from where it was: its clock does not count the time between.

    What its rows had missed before is made up for. May be repeated. Visits every row.
    """
    p, clock, history = group.params[position], group.clock, group.history
    assert history is not None
    until = clock.frozen.get(p)
    if until is None:
        return
    now = history.steps
    if until < now and not p.is_meta:
        catch_up(group, position, states[p], last_step, until=until)
        last_step.copy_(brought_to(last_step, now))
    clock.frozen.pop(p, None)


def _frozen_behind(p: Tensor, group: GroupStep, states: Mapping[Tensor, Any]) -> bool:
    """Return whether rows of a frozen parameter have missed steps, for which settings are kept."""
    clock, last_step = group.clock, states.get(p, {}).get("last_step")
    if last_step is None:
        return clock.begins.get(p, 0) < clock.frozen[p]
    return is_behind(last_step, clock.frozen[p])


def is_behind(last_step: Tensor, step: int) -> bool:
    """Return whether a row is not up to date with a step; waits for a GPU."""
    return bool((current_up_to(last_step) < step).any())


# ------------------------------------------------------------------------------- other writers


def is_rewritten(group: GroupStep, position: int) -> bool:
    """Return whether others have written to a parameter since the optimizer last looked at it."""
    p = group.params[position]
    if p.is_meta or p.is_inference():
        return False
    if group.native:
        assert group.history is not None
        return bool(group.history.native().rewritten(position, p))
    known = group.clock.versions.get(p)
    # Another implementation: the tensor has been swapped, as conversions do.
    return known is not None and known[0] == p._cdata and known[1] != p._version


def warn_if_behind(group: GroupStep, position: int, states: Mapping[Tensor, Any]) -> None:
    """Warn, once for a table, that others have written to it, if rows of it were behind."""
    history, p = group.history, group.params[position]
    assert history is not None
    if is_capturing():
        return
    group.clock.rewritten[p] = group.clock.rewritten.get(p, 0) + 1
    last_step = states.get(p, {}).get("last_step")
    if p in group.clock.warned or last_step is None:
        return
    if is_behind(last_step, history.steps):
        group.clock.warned.add(p)
        warnings.warn(
            f"{group.name(position)} was written to by others while rows of it were behind "
            f"(lazy={group.options['lazy']!r}): what these rows have missed is made up for on top "
            "of the new values. Call optimizer.flush() before weights are averaged, restored or "
            "edited",
            UserWarning,
            stacklevel=2,
        )


def note_version(group: GroupStep, position: int) -> None:
    """Note the version of a parameter that the optimizer itself has written to."""
    p = group.params[position]
    if p.is_inference():
        return
    if group.native:
        assert group.history is not None
        group.history.native().note(position, p)
    else:
        group.clock.versions[p] = p._cdata, p._version


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


class Counting:
    """What counts a step, once it is certain to have happened.

    Attributes:
        native: the native step.
        groups: those in a lazy mode whose histories have one step more.
        counters: AdamW's, of parameters without a gradient, and what they become on the host.
        marks: where the groups' histories start from, by index.
    """

    __slots__ = ("counters", "groups", "marks", "native")

    def __init__(self, native: Any, groups: list[GroupStep]) -> None:
        """Begin without counters."""
        self.native, self.groups = native, groups
        self.counters: list[tuple[Tensor, int]] = []
        self.marks: dict[int, tuple[int, int]] = {}

    def count(self, found_inf: Tensor | None) -> None:
        """Count, unless ``found_inf``, which the host has not read, cancels it.

        May be repeated.
        """
        if self.native is not None:
            self.native.advance()
        if self.counters and (found_inf is None or float(found_inf) == 0.0):
            for counter, number in self.counters:
                counter.fill_(number)
        for group in self.groups:
            assert group.history is not None
            mark = self.marks.setdefault(group.index, group.history.mark())
            _count(group, found_inf, mark)


def prepare_counting(
    lazy: Iterable[GroupStep], states: Mapping[Tensor, Any], native: Any
) -> Counting:
    """Return what will count the step; the native step is told of histories on GPUs."""
    counting = Counting(native, [group for group in lazy if group.counts_in_history])
    steps, counters = [], []
    for group in counting.groups:
        history = group.history
        assert history is not None
        if not history.on_devices:
            counting.counters += [(c, int(c) + 1) for c in _idle_counters(group, states)]
            continue
        options, betas = group.options, group.options["betas"]
        weight_decay = float(options["weight_decay"])
        steps.append((history.native(), group.index, group.lr, weight_decay, betas[0], betas[-1]))
        counters += _idle_counters(group, states)
    if steps:
        native.will_advance(steps, counters)
    return counting


def _count(group: GroupStep, found_inf: Tensor | None, mark: tuple[int, int]) -> None:
    history, lr = group.history, group.lr
    assert history is not None
    if history.on_devices:
        if found_inf is not None or isinstance(lr, Tensor) or is_capturing():
            history.fall_behind(mark, for_good=is_capturing())
            return
    elif found_inf is not None and float(found_inf) != 0.0:
        return
    decay, betas = float(group.options["weight_decay"]), group.options["betas"]
    history.advance(float(lr), decay, betas, mark)


def _idle_counters(group: GroupStep, states: Mapping[Tensor, Any]) -> list[Tensor]:
    """Return the counters of parameters that train without a gradient: every step counts."""
    if not counts_steps(group.options):
        return []
    idle = (
        states.get(p, {}).get("step") for p in group.params if p.requires_grad and p.grad is None
    )
    return [counter for counter in idle if counter is not None]


def note_current_tables(
    tracked: Mapping[Tensor, UsedRows], lazy: list[GroupStep], *, adds: bool, certain: bool
) -> None:
    """Note which tracked tables have been updated as a whole, and need not be looked at.

    ``adds``: the step had gradients; ``certain``: it was not cancelled, as the host knows.
    """
    for p, used in tracked.items():
        group = next((group for group in lazy if p in group.clock.params), None)
        if group is None or group.history is None:
            used.current = False
            continue
        whole = (
            adds
            and p.grad is not None
            and p.grad.layout == torch.strided
            and not is_row_lazy(p, group)
            and group.options["nonfinite"] in ("propagate", "raise")
            and not group.window
            and not is_capturing()
            and not group.history.replayed
        )
        used.current = whole and (certain or used.current)
