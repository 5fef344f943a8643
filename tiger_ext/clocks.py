# SPDX-License-Identifier: Apache-2.0
"""What an optimizer counts for its parameter groups: steps of lazy modes, accumulation windows.

It belongs to the optimizer and not to the groups' dicts, which others copy, share between
optimizers and hand on. The dicts have placeholders of these keys, which state dicts fill in and
distributed checkpointing expects: ``history``, ``windows`` and ``micro_steps``.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tiger_ext.history import History

__all__ = ["PLACEHOLDERS", "Clocks", "GroupClock", "without_placeholders"]

# State by which a clock knows how far a parameter's rows are.
_OF_ROWS = ("last_step", "window", "window_rows")
# Keys of a parameter group that only state dicts give a meaning.
PLACEHOLDERS: dict[str, Any] = {"history": "", "windows": 0, "micro_steps": 0}


class GroupClock:
    """The counters of one parameter group.

    Attributes:
        params: the group's parameters, and where they stand in it.
        history: the steps of a lazy mode; None: the group has never been in one.
        windows: the accumulation windows that were closed.
        micro_steps: the steps of the open one.
        begins: of parameters without a state: the step after which they began to take part, if
            that was not the first.
        frozen: of parameters that do not take part (``requires_grad`` is False): the step up to
            which they did.
        clocked: the parameters that have, or had, a ``last_step``.
        storage: the options by which moments are stored; None: as the group has them.
        versions: where no kernels are used: the implementations and versions of parameters, to
            notice other writers.
        warned: the parameters of which it need not be said (again) that others wrote to rows that
            were behind.
        rewritten: of parameters that others wrote to: how often that was seen.
        line: what its positions (tiger_ext/positions.py) are known by; not that of a copy.
        loaded_at: the step of the history that was loaded or copied, or 0.
    """

    __slots__ = (
        "begins",
        "clocked",
        "frozen",
        "history",
        "line",
        "loaded_at",
        "micro_steps",
        "params",
        "rewritten",
        "storage",
        "versions",
        "warned",
        "windows",
    )

    def __init__(self, params: Iterable[Tensor]) -> None:
        """Begin, for a group of these parameters."""
        self.params = {p: position for position, p in enumerate(params)}
        self.history: History | None = None
        self.windows, self.micro_steps = 0, 0
        self.begins: dict[Tensor, int] = {}
        self.frozen: dict[Tensor, int] = {}
        self.clocked: set[Tensor] = set()
        self.storage: tuple[Any, ...] | None = None
        self.versions: dict[Tensor, tuple[int, int]] = {}
        self.warned: set[Tensor] = set()
        self.rewritten: dict[Tensor, int] = {}
        self.line, self.loaded_at = secrets.token_hex(8), 0

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies go on from."""
        passing = ("line", "loaded_at", "versions", "warned")
        return {name: getattr(self, name) for name in self.__slots__ if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.__init__(())  # type: ignore[misc]
        for name, value in state.items():
            setattr(self, name, value)
        if self.history is not None:  # a line of its own goes on from here
            self.loaded_at = self.history.steps

    # ------------------------------------------------------------------------ who takes part

    def begins_at(self, p: Tensor) -> int:
        """Return the step after which a parameter that has no ``last_step`` began to take part."""
        history = self.history
        assert history is not None
        if p in self.clocked or p not in self.params:  # its state was cleared; it is another table
            self.clocked.discard(p)
            self.params.setdefault(p, -1)  # until the group is looked at anew
            self.begins[p] = history.steps
            if p in self.frozen:
                self.frozen[p] = history.steps
        return max(self.begins.get(p, 0), history.begin)

    def steps_of(self, p: Tensor, now: Any) -> Any:
        """Return in how many of the ``now`` steps a parameter without a state has taken part."""
        return self.frozen.get(p, now) - self.begins.get(p, 0)

    def freeze(self, p: Tensor) -> None:
        """Note that a parameter does not take part from now on."""
        if p not in self.frozen:
            assert self.history is not None
            self.frozen[p] = self.history.steps

    def standing(self, p: Tensor) -> tuple[Tensor, int | None, int | None, bool]:
        """Return what is known of a parameter, for ``restore``."""
        return p, self.begins.get(p), self.frozen.get(p), p in self.clocked

    def restore(self, p: Tensor, begins: int | None, frozen: int | None, clocked: bool) -> None:
        """Take back what has become known of a parameter since ``standing``."""
        for table, number in ((self.begins, begins), (self.frozen, frozen)):
            if number is None:
                table.pop(p, None)
            else:
                table[p] = number
        if clocked:
            self.clocked.add(p)
        else:
            self.clocked.discard(p)

    def admit(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Take in parameters that the group's list has got since; return those that are new."""
        known, self.params = self.params, {p: position for position, p in enumerate(params)}
        new = [p for p in self.params if p not in known]
        if self.history is not None:
            for p in new:
                self.begins[p] = self.history.steps
        for old in (self.begins, self.frozen, self.versions, self.rewritten):
            for p in [p for p in old if p not in self.params]:
                del old[p]
        self.clocked &= self.params.keys()
        return new

    # ------------------------------------------------------------------------- state dicts

    def look_for_cleared(self, states: Mapping[Tensor, Any]) -> None:
        """Let parameters begin anew whose state was cleared."""
        for p in [p for p in self.clocked if "last_step" not in states.get(p, ())]:
            self.begins_at(p)

    def numbers(self) -> dict[str, Any]:
        """Return what a saved group has under the keys of ``PLACEHOLDERS``, plain numbers."""
        return {
            "history": "" if self.history is None else self.history.text(),
            "windows": self.windows,
            "micro_steps": self.micro_steps,
        }

    def numbers_of(self, p: Tensor) -> dict[str, int]:
        """Return what a saved parameter's state has beside its tensors."""
        found = {"begins_at": self.begins.get(p), "frozen_at": self.frozen.get(p)}
        return {name: number for name, number in found.items() if number is not None}


class Clocks:
    """The clocks of an optimizer's groups, which are known by identity or else by a parameter."""

    def __init__(self) -> None:
        """Know no group yet."""
        self._groups: list[dict[str, Any]] = []
        self._clocks: list[GroupClock] = []

    def of(self, groups: list[dict[str, Any]], states: Mapping[Tensor, Any]) -> list[GroupClock]:
        """Return the clock of each group, a new one where there is none.

        Groups may have been added, removed, moved or replaced by copies. What ``states``, the
        optimizer's, says of the rows of a parameter that another clock has counted is dropped.
        """
        if len(self._groups) != len(groups):
            return self._match(groups, states)
        known, clocks = self._groups, self._clocks
        for k, group in enumerate(groups):
            if known[k] is not group or len(clocks[k].params) != len(group["params"]):
                return self._match(groups, states)
        return clocks

    def find(
        self, groups: list[dict[str, Any]], states: Mapping[Tensor, Any], p: Tensor
    ) -> tuple[int, GroupClock] | None:
        """Return the index of a parameter's group, and its clock; None if there is none."""
        for index, clock in enumerate(self.of(groups, states)):
            if p in clock.params:
                params = groups[index]["params"]
                position = clock.params[p]
                if not (0 <= position < len(params) and params[position] is p):
                    clock.admit(params)  # it has been moved within the group
                return index, clock
        return None

    def _match(
        self, groups: list[dict[str, Any]], states: Mapping[Tensor, Any]
    ) -> list[GroupClock]:
        own = {id(group): clock for group, clock in zip(self._groups, self._clocks, strict=True)}
        free = [clock for key, clock in own.items() if all(key != id(g) for g in groups)]
        matched = []
        for group in groups:
            clock = own.get(id(group))
            if clock is None:
                clock = next(
                    (c for c in free if not c.params.keys().isdisjoint(group["params"])), None
                )
                if clock is None:
                    clock = GroupClock(())
                else:
                    free.remove(clock)
            for p in clock.admit(group["params"]):
                for name in _OF_ROWS:
                    states.get(p, {}).pop(name, None)
            matched.append(clock)
        self._groups, self._clocks = list(groups), matched
        return matched

    def replace(self, groups: list[dict[str, Any]], clocks: list[GroupClock]) -> None:
        """Give each group another clock."""
        warned = {p for clock in self._clocks for p in clock.warned}
        for clock in clocks:
            clock.warned = warned & clock.params.keys()
        self._groups, self._clocks = list(groups), clocks


def without_placeholders(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a group's dict without what another optimizer has counted."""
    return {key: value for key, value in group.items() if key not in PLACEHOLDERS}
