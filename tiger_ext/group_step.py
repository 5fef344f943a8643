# SPDX-License-Identifier: Apache-2.0
"""A parameter group during one step: what follows from its options, derived once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native
from tiger_ext.clocks import PLACEHOLDERS, GroupClock
from tiger_ext.history import History
from tiger_ext.options import Moment, algorithm_of, direction_scale, moments_of
from tiger_ext.parameters import parameter_name
from tiger_ext.rounding import Draws, keep_seed, rounds

__all__ = ["GroupStep", "group_steps", "is_row_lazy", "storage_of"]


def storage_of(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a group's options say of how moments are stored."""
    return options.get("second_moment"), options["momentum_dtype"] == torch.int8


def group_steps(groups: Iterable[dict[str, Any]], clocks: Iterable[GroupClock]) -> list[GroupStep]:
    """Return the groups of an optimizer for one step."""
    steps: list[GroupStep] = []
    number = 0
    for options, clock in zip(groups, clocks, strict=True):
        steps.append(GroupStep(len(steps), options, clock, number))
        number += len(options["params"])
    return steps


class GroupStep:
    """One group's share of a step.

    In an accumulation window every micro-step *adds* its gradient to the momentum, and the last one
    then *moves* the parameters: the rows that any of the window's micro-steps touched. Without a
    window both are one.

    Attributes:
        index: where the group stands in the optimizer.
        options: the parameter group.
        clock: what the optimizer counts for it.
        params: its parameters.
        number: that of the first of them among all of the optimizer's.
        history: the steps of a group in a lazy mode; None: it is frozen.
        window: the accumulation window's number, from 1; 0: no accumulation.
        micro_step: the step's number in its window, from 1.
        micro_steps: how many steps make a window, or 1.
        closes: whether this step is a window's last.
        whole: parameters that ``rows="tracked"`` does not concern.
        native: whether native kernels may take it.
        storage: how its options want moments to be stored; the clock has how they are.
    """

    __slots__ = (
        "clock",
        "closes",
        "history",
        "index",
        "micro_step",
        "micro_steps",
        "native",
        "number",
        "options",
        "params",
        "storage",
        "whole",
        "window",
    )

    def __init__(
        self, index: int, options: dict[str, Any], clock: GroupClock, number: int = 0
    ) -> None:
        """Derive what follows from the options; a lazy group's history begins here."""
        self.index = index
        self.number = number
        self.storage = storage_of(options)
        if self.storage[1] or options["stochastic_rounding"]:
            keep_seed(options)
        self.options = options
        self.clock = clock
        self.params: list[Tensor] = options["params"]
        self.whole: AbstractSet[Tensor] = frozenset()
        self.history: History | None = None
        if options["lazy"] != "frozen":
            if clock.history is None:
                clock.history = History()
            self.history = clock.history
        self.micro_steps: int = options.get("accumulation_steps", 1)
        self.window, self.micro_step, self.closes = 0, 1, False
        if self.micro_steps > 1:
            self.window = clock.windows + 1
            self.micro_step = clock.micro_steps + 1
            self.closes = self.micro_step >= self.micro_steps
        if clock.storage is None:
            clock.storage = self.storage
        self.native = _native.C is not None and options["fused"] is not False

    @property
    def counts_in_history(self) -> bool:
        """Whether the present step is one of the history's: micro-steps count once a window."""
        return self.window == 0 or self.closes

    def put_placeholders(self) -> None:
        """Let the group's dict have the keys that its state dict has."""
        keys = (["history"] if self.history else []) + (
            ["windows", "micro_steps"] if self.window else []
        )
        for key in keys:
            if key not in self.options:
                self.options[key] = PLACEHOLDERS[key]

    def draws(self, position: int, step: int) -> Draws | None:
        """Return the random bits for the parameter at a position; None: nothing is rounded."""
        if not rounds(self.options):
            return None
        return Draws(self.options["rounding_seed"], step, self.number + position)

    @property
    def in_window(self) -> bool:
        """Whether micro-steps have been taken in the window."""
        return self.window > 0 and self.micro_step > 1

    @property
    def lr(self) -> float | Tensor:
        """The learning rate as a float, or as it is where reading it would synchronise."""
        lr = self.options["lr"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            return float(lr)
        return lr

    def moments(self) -> tuple[Moment, ...]:
        """Return the state tensors that the group's parameters have."""
        return moments_of(self.options)

    def moves(self, adds: bool) -> bool:
        """Return whether parameters move in the pass that adds gradients, or in the one after."""
        return self.window == 0 or not adds

    def rule(self, adds: bool, *, whole: bool = False) -> Any:
        """Return the options as the native step takes them; ``adds``: there are gradients.

        ``whole``: for the parameters in `whole`.
        """
        options = {**self.options, "rows": None} if whole else self.options
        return _native.C.Rule(  # type: ignore[union-attr]
            algorithm_of(options["algorithm"]).family,
            options,
            direction_scale(options),
            self.window,
            self.micro_steps,
            adds,
            self.number,
        )

    def name(self, position: int) -> str:
        """Return what messages call the parameter at a position."""
        return parameter_name(self.options, self.index, position)


def is_row_lazy(p: Tensor, group: GroupStep) -> bool:
    """Return whether a strided gradient of ``p`` updates only the rows it touches."""
    return group.options["rows"] is not None and p.dim() >= 2 and p not in group.whole
