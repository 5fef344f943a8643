# SPDX-License-Identifier: Apache-2.0
"""One step over all groups, all or nothing: everything is checked and allocated, then written.

A step is one pass, or two where it closes accumulation windows: the second moves the parameters. A
pass adds every group to one native step (csrc/bindings/eager.cpp); parameters that no native kernel
can take run on the reference beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native
from tiger_ext.capture import check_capture, check_reference, is_capturing
from tiger_ext.clocks import GroupClock
from tiger_ext.finish import finish
from tiger_ext.group_step import GroupStep, group_steps, is_row_lazy
from tiger_ext.history import MAX_STEPS
from tiger_ext.lazy import (
    Counting,
    catch_up,
    is_rewritten,
    look_at_idle,
    note_current_tables,
    place_histories,
    prepare_counting,
    warn_if_behind,
)
from tiger_ext.moments import check_shapes
from tiger_ext.options import check_lazy
from tiger_ext.passes import Pass
from tiger_ext.reference_step import ReferenceUpdate
from tiger_ext.state import StateChanges, WindowError, complete_state, convert_state
from tiger_ext.tracking import TrackedTables
from tiger_ext.windows import advance_window, window_rows

__all__ = ["Step"]

_NO_ROWS: dict[Tensor, Tensor] = {}


class Step:
    """One step of an optimizer.

    Args:
        what: what messages call the step, as "Tiger.step".
        groups: its parameter groups.
        clocks: what it has counted for each of them.
        state: its state, by parameter.
        tracked: what its tracked modules have recorded.
        faults: where a GPU reports what it found wrong; None without native kernels.
        grad_scale: GradScaler's, one element; gradients are divided by it.
        found_inf: GradScaler's, one element; if it is not 0 the step does not happen.
    """

    __slots__ = (
        "_changes",
        "_clocks",
        "_counting",
        "_faults",
        "_found_inf",
        "_grad_scale",
        "_groups",
        "_options",
        "_passes",
        "_tracked",
        "_what",
        "_windows",
        "_written",
    )

    def __init__(
        self,
        what: str,
        groups: list[dict[str, Any]],
        clocks: list[GroupClock],
        state: Any,
        tracked: TrackedTables,
        faults: Any,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Change nothing yet."""
        self._what = what
        self._options, self._clocks = groups, clocks
        self._groups: list[GroupStep] = []
        self._tracked, self._faults = tracked, faults
        self._grad_scale, self._found_inf = grad_scale, found_inf
        self._changes = StateChanges(state, what)
        self._windows: dict[int, dict[Tensor, Tensor]] = {}  # touched rows, by group
        self._passes: list[Pass] = []
        self._counting: Counting | None = None
        self._written = False

    def take(self) -> None:
        """Take it; see ``MixedOptimizer.step`` for what it raises."""
        if is_capturing():
            check_capture(self._what, self._options, (self._grad_scale, self._found_inf))
        if self._found_inf is not None and self._host_reads_found_inf():
            if float(self._found_inf) != 0.0:
                self._forget_ids()
                return
            self._found_inf = None
        lazy: list[GroupStep] = []
        closing: list[GroupStep] = []
        for group in self._begin():
            if group.history is not None:
                lazy.append(group)
            if group.closes:
                closing.append(group)
        self._take(self._groups, closing, lazy, True)

    def close_windows(self) -> None:
        """Close the open accumulation windows without another gradient."""
        if is_capturing():
            check_capture(self._what, self._options, (None, None))
        for group in self._begin():
            group.closes = group.in_window
            if group.closes:
                self._windows[group.index] = window_rows(group, self._changes.state, adds=False)
        closing = [group for group in self._groups if group.closes]
        lazy = [group for group in closing if group.history is not None]
        if closing:
            self._take(closing, closing, lazy, False)

    def _begin(self) -> list[GroupStep]:
        self._groups = group_steps(self._options, self._clocks)
        return self._groups

    def _take(
        self, groups: list[GroupStep], closing: list[GroupStep], lazy: list[GroupStep], adds: bool
    ) -> None:
        """Do it wholly or, if it raises, not at all; if a signal's handler raises, either."""
        prepared = False
        try:
            prepared = self._prepare_all(groups, closing, lazy, adds)
            if prepared:
                self._write(groups, lazy, adds)
            else:
                finish(self._changes.take_back)
                self._forget_ids()
        except BaseException as error:
            if not prepared:
                finish(self._changes.take_back)
            elif not self._written:
                finish(lambda: self._write(groups, lazy, adds))
            if _native.C is not None and isinstance(error, _native.C.UpdateError):
                raise _native.translated(error, self._label) from None
            raise

    def _prepare_all(
        self, groups: list[GroupStep], closing: list[GroupStep], lazy: list[GroupStep], adds: bool
    ) -> bool:
        """Check and allocate; return False if AMP cancels the step."""
        if lazy:
            place_histories(lazy)
        passes = self._passes
        if adds:
            passes.append(self._prepare(groups, adds=True))
        else:
            for group in lazy:  # what has been frozen since the last micro-step
                frozen = [i for i, p in enumerate(group.params) if not p.requires_grad]
                look_at_idle(group, frozen, self._changes)
        if closing:
            passes.append(self._prepare(closing, adds=False))
        if self._found_inf is not None:
            cancelled = [each.cancelled(self._found_inf) for each in passes]
            if any(cancelled):
                return False
            if None not in cancelled:
                self._found_inf = None
        if lazy:
            states = self._changes.state
            self._counting = prepare_counting(lazy, states, passes[-1].native)
            for each in passes:
                for group, position in each.rewritten:
                    warn_if_behind(group, position, states)
        return True

    def _write(self, groups: list[GroupStep], lazy: list[GroupStep], adds: bool) -> None:
        """Write what has been prepared. May be repeated, from whatever line on."""
        states = self._changes.state
        for each in self._passes:
            each.apply(self._grad_scale, states)
        if self._counting is not None:
            self._counting.count(self._found_inf)
            note_current_tables(self._tracked, lazy, adds=adds, certain=self._found_inf is None)
        if adds and self._tracked:
            self._forget_ids()
        for group in groups:
            group.clock.storage = group.storage
            if group.window:
                advance_window(group, self._windows[group.index], states)
            if group.window or group.history is not None:
                group.put_placeholders()
        self._written = True

    def _forget_ids(self) -> None:
        """The next step's record of used rows begins; also after a step that AMP cancelled."""
        for used in self._tracked.values():
            used.clear()

    def _host_reads_found_inf(self) -> bool:
        # The windows' clock is on the host.
        assert self._found_inf is not None
        windowed = (group.get("accumulation_steps", 1) > 1 for group in self._options)
        return self._found_inf.device.type == "cpu" or any(windowed)

    def _label(self, index: int, position: int) -> str:
        return f"{self._what}: {self._groups[index].name(position)}"

    @contextmanager
    def _labelled(self, group: GroupStep, position: int) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, IndexError, FloatingPointError) as error:
            raise type(error)(f"{self._label(group.index, position)}: {error}") from None

    # ------------------------------------------------------------------------------- a pass

    def _prepare(self, groups: Iterable[GroupStep], *, adds: bool) -> Pass:
        """Check and allocate what this step does, or what closing its windows does."""
        this = Pass(None)
        if _native.C is not None:
            this.native = _native.C.Step(self._faults, self._grad_scale, self._found_inf)
        for group in groups:
            if adds and group.history is not None:
                check_lazy(group.options)
                group.history.check_room()
                if group.clock.frozen:
                    self._prepare_thaw(this, group)
            if group.storage != group.clock.storage:
                self._convert_all(this, group)
            if adds and group.window > MAX_STEPS:
                raise OverflowError(f"accumulation windows count at most {MAX_STEPS}")
            rows = _NO_ROWS
            if not adds:
                rows = self._windows[group.index]
            elif group.options["rows"] == "tracked":
                rows = self._masks(group)
            if not group.native:
                rest: Sequence[int] = range(len(group.params))
            else:
                if adds and group.whole:
                    rest = self._add_parts_to_native(this, group, rows)
                else:
                    rest = self._add_to_native(this, group, group.rule(adds), rows, None)
            if rest and group.options["fused"]:
                raise RuntimeError(self._why_not_native(group, rest[0]))
            if rest:
                self._add_to_reference(this, group, rest, adds, rows)
            if adds and group.micro_steps > 1:
                self._windows[group.index] = window_rows(group, self._changes.state)
        if this.native is not None:
            this.native.prepare()
        return this

    def _masks(self, group: GroupStep) -> dict[Tensor, Tensor]:
        """Return the mask ``[rows]`` of the used rows of each tracked parameter."""
        masks: dict[Tensor, Tensor] = {}
        group.whole = self._tracked.whole
        for position, p in enumerate(group.params):
            if not is_row_lazy(p, group):
                continue
            if p.grad is None or p.grad.layout != torch.strided:
                continue
            used = self._tracked.get(p)
            if used is None:
                self._tracked.find_whole(self._options)
                if p in group.whole:
                    continue
            if used is None or not used.modules:
                raise RuntimeError(
                    f"{self._label(group.index, position)}: rows='tracked', but no module of the "
                    "parameter is tracked; call optimizer.track(module)"
                )
            with self._labelled(group, position):
                used.check_size()
            masks[p] = used.mask(p.device)
        return masks

    def _add_parts_to_native(
        self, this: Pass, group: GroupStep, rows: dict[Tensor, Tensor]
    ) -> list[int]:
        """Add a group some of whose parameters are updated as with ``rows=None``."""
        whole = [i for i, p in enumerate(group.params) if p in group.whole]
        by_rows = sorted(set(range(len(group.params))) - set(whole))
        rest = self._add_to_native(this, group, group.rule(True), rows, by_rows)
        rule = group.rule(True, whole=True)
        return sorted(rest + self._add_to_native(this, group, rule, rows, whole))

    def _add_to_native(
        self,
        this: Pass,
        group: GroupStep,
        rule: Any,
        rows: dict[Tensor, Tensor],
        positions: list[int] | None,
    ) -> list[int]:
        """Add parameters of a group, all or some; return those that have no native kernel."""
        history = group.history
        arguments = (
            group.params,
            self._changes.state,
            group.index,
            rule,
            group.lr,
            rows,
            None if history is None else history.native(),
        )
        without_state, rest, lagging, idle, rewritten = this.native.add_group(*arguments, positions)
        if rewritten:
            this.rewritten += [(group, position) for position in rewritten]
        if idle:
            look_at_idle(group, idle, self._changes)
        if without_state:
            for position in without_state:
                p = group.params[position]
                with self._labelled(group, position):
                    check_shapes(p, self._changes.state.get(p, {}))
                self._complete_state(this, group, position)
                if history is not None:
                    device = group.params[position].device
                    history.place(device, many=group.options["capturable"])
            still_without, _, late, _, _ = this.native.add_group(*arguments, without_state)
            if still_without:
                raise RuntimeError(
                    f"{self._label(group.index, still_without[0])}: its state lacks what the "
                    "compiled module wants"
                )
            lagging += late
        for position in lagging:
            state = self._changes.state[group.params[position]]
            this.before.append(partial(catch_up, group, position, state, state["last_step"]))
        return rest

    def _add_to_reference(
        self,
        this: Pass,
        group: GroupStep,
        positions: Iterable[int],
        adds: bool,
        rows: dict[Tensor, Tensor],
    ) -> None:
        states = self._changes.state
        for position in positions:
            p = group.params[position]
            python_only = group.history is not None and not group.native
            if adds and python_only and is_rewritten(group, position):
                this.rewritten.append((group, position))
            if adds and p.grad is None:
                if python_only and (not p.requires_grad or "last_step" not in states.get(p, {})):
                    look_at_idle(group, [position], self._changes)
                continue
            if not adds:
                wanted = ("window", *(moment.name for moment in group.moments()))
                if any(name not in states.get(p, {}) for name in wanted):
                    continue
            if is_capturing():
                label, amp = self._label(group.index, position), (self._grad_scale, self._found_inf)
                check_reference(label, p, group.options, amp)
            mask = rows.get(p) if adds else None
            update = ReferenceUpdate(p, p.grad if adds else None, group, position, mask, {})
            with self._labelled(group, position):
                update.check()
                check_shapes(p, states.get(p, {}))
            if adds:
                self._complete_state(this, group, position)
            update.state = states[p]
            with self._labelled(group, position):
                update.check_state()
            if not p.is_meta:
                this.on_reference.append(update)

    def _prepare_thaw(self, this: Pass, group: GroupStep) -> None:
        """Note which frozen parameters train again; their state may begin here."""
        for position, p in enumerate(group.params):
            if p not in group.clock.frozen or not (p.requires_grad or p.grad is not None):
                continue
            if is_capturing():
                raise RuntimeError(
                    f"{self._label(group.index, position)}: it trains again, which every replay of "
                    "the CUDA graph that is being captured would repeat: take one step before the "
                    "capture"
                )
            with self._labelled(group, position):
                check_shapes(p, self._changes.state.get(p, {}))
            before = dict(self._changes.state.get(p, {}))
            self._complete_state(this, group, position)
            state = {**self._changes.state[p], **before}
            this.thawing.append((group, position, state["last_step"], state))

    def _complete_state(self, this: Pass, group: GroupStep, position: int) -> None:
        p = group.params[position]
        states = self._changes.state
        before = dict(states[p]) if p in states else {}
        old = before.get("last_step")
        try:
            state = complete_state(p, group, self._changes)
        except WindowError as error:
            raise RuntimeError(f"{self._label(group.index, position)}: {error}") from None
        fills = convert_state(group, position, self._changes)
        if old is not None and state.get("last_step") is not old:
            # The rows are divided anew.
            this.before.append(partial(catch_up, group, position, {**state, **before}, old))
        this.before += fills

    def _convert_all(self, this: Pass, group: GroupStep) -> None:
        """Let the state be stored as an option that has been changed wants it."""
        for position, p in enumerate(group.params):
            if p in self._changes.state:
                with self._labelled(group, position):
                    check_shapes(p, self._changes.state[p])
                this.before += convert_state(group, position, self._changes, anew=True)

    def _why_not_native(self, group: GroupStep, position: int) -> str:
        p, label = group.params[position], self._label(group.index, position)
        if _native.unavailable:
            return f"{label}: fused=True, but {_native.unavailable}"
        if p.device.type == "cuda" and not _native.C.build_info()["cuda"]:  # type: ignore[union-attr]
            return (
                f"{label}: fused=True, but this build of tiger_ext has no CUDA kernels (it was "
                "compiled against a CPU torch or without a CUDA toolkit)"
            )
        assert p.grad is not None
        return (
            f"{label}: fused=True, but there is no native kernel for a {type(p).__name__} of dtype "
            f"{p.dtype} on {p.device} with a gradient of dtype {p.grad.dtype} and layout "
            f"{p.grad.layout}"
        )
