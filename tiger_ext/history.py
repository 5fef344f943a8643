# SPDX-License-Identifier: Apache-2.0
"""The steps of a parameter group in a lazy mode, and what a row that skipped some has missed.

With a zero gradient a step is ``p <- (1 - lr wd) p - lr sign(m)`` and ``m <- beta m``, and the sign
stays. Steps ``i`` in a row are therefore ``p <- A p - B sign(m)`` and ``m <- P m`` with

    A = prod (1 - lr_i wd_i)    B = sum lr_i prod_{j > i} (1 - lr_j wd_j)    P = prod beta_i

This module has the definition, which walks over the stretches of equal hyperparameters; the kernels
get A, B and P from sums kept since the first step (csrc/rules/history.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native
from tiger_ext.capture import is_capturing

__all__ = ["MAX_STEPS", "History", "Missed"]

_FIELDS = 5  # of a setting: its first step, lr, weight_decay, first beta, last beta
MAX_STEPS = 2**31 - 1


@dataclass(frozen=True)
class Missed:
    """What skipped steps do: float64 tensors, one element for each row. See the module."""

    decay: Tensor  # A
    drift: Tensor  # B
    betas: tuple[Tensor, Tensor]  # P of the first and of the last beta; 0 only where a beta was 0


Setting = tuple[int, float, float, float, float]


class History:
    """The hyperparameters of every step since the last flush.

    Steps with equal ones cost nothing; each change costs five numbers.

    Where the kernels run on a GPU the history lies in its memory as well, and there it grows: only
    the GPU knows whether a step happened (AMP) or what a learning rate in its memory is. The host
    follows as long as it can tell without waiting; once it cannot, reading an attribute waits.

    Attributes:
        steps: the steps taken so far.
        begin: the step since which the history goes back.
        settings: ``(first step, lr, weight_decay, first beta, last beta)``, each until the next.
        replayed: whether a captured graph may take steps at any time.
    """

    def __init__(self, saved: Sequence[float] = (0.0, 0.0)) -> None:
        """Restore what ``saved()`` returned; the default is the start of training."""
        self._steps = int(saved[0])
        self.begin = int(saved[1])
        self._settings: list[Setting] = []
        for k in range(2, len(saved), _FIELDS):
            first, lr, weight_decay, beta1, beta2 = saved[k : k + _FIELDS]
            self._settings.append((int(first), lr, weight_decay, beta1, beta2))
        self._behind = False  # what is here is older than what a GPU has
        self._uncounted = 0  # steps since then that may have happened
        self.replayed = False
        self._native: Any = None
        self._native_settings: int | None = None  # how many of them kernels on the CPU have

    @property
    def steps(self) -> int:  # noqa: D102
        self._ask()
        return self._steps

    @property
    def settings(self) -> list[Setting]:  # noqa: D102
        self._ask()
        return self._settings

    @classmethod
    def of(cls, saved: History | str | Sequence[float]) -> History:
        """Return the history that is, or that ``text()`` or ``saved()`` returned.

        Raises:
            ValueError: neither of them has returned this; the message says what was expected.
        """
        if isinstance(saved, History):
            return saved
        try:
            numbers = [float(x) for x in (saved.split() if isinstance(saved, str) else saved)]
        except (TypeError, ValueError):
            raise ValueError("numbers") from None
        _check(numbers)
        return cls(numbers)

    def text(self) -> str:
        """Return the history for state dicts, where its length must not show.

        Distributed checkpointing takes lists and tuples apart, and expects a fresh optimizer's to
        be as long as the saved ones.
        """
        return " ".join(map(repr, self.saved()))

    def saved(self) -> tuple[float, ...]:
        """Return the history as plain numbers."""
        return (
            float(self.steps),
            float(self.begin),
            *(float(x) for setting in self.settings for x in setting),
        )

    def check_room(self) -> None:
        """Raise OverflowError if an int32 clock cannot count one more step."""
        if self._steps + self._uncounted >= MAX_STEPS and self.steps >= MAX_STEPS:
            raise OverflowError(f"the lazy modes count at most {MAX_STEPS} steps")

    @property
    def started(self) -> bool:
        """Whether there may have been a step; without asking a GPU."""
        return self._steps > 0 or self._behind or self.replayed

    def mark(self) -> tuple[int, int]:
        """Return where a step starts from, so that adding it can be repeated."""
        return self._steps, self._uncounted

    def advance(
        self,
        lr: float,
        weight_decay: float,
        betas: Sequence[float],
        mark: tuple[int, int] | None = None,
    ) -> None:
        """Add a step with these hyperparameters; repeated with the same ``mark``, only one."""
        steps, uncounted = self.mark() if mark is None else mark
        if self._behind:
            self._uncounted = uncounted + 1
            return
        now = (lr, weight_decay, betas[0], betas[-1])
        if not self._settings or self._settings[-1][1:] != now:
            self._settings.append((steps + 1, *now))
        self._steps = steps + 1

    def fall_behind(self, mark: tuple[int, int], *, for_good: bool = False) -> None:
        """Leave a step to the copies on GPUs; ``for_good``: it will be replayed, too."""
        self._behind = True
        self._uncounted = mark[1] + 1
        self.replayed = self.replayed or for_good

    def forget(self) -> None:
        """Drop the steps so far: every row is current. May be repeated."""
        if self._behind or self.replayed:
            self._steps, self._behind, self._uncounted = int(self._native.steps(None)), False, 0
        self.begin = self._steps
        self._settings = []
        if self._native is not None:
            self._native.forget()
        if self._native_settings is not None:
            self._native_settings = 0

    def missed(self, since: Tensor, until: int | None = None) -> Missed:
        """Return the effect of the steps after ``since``, an int64 tensor of step numbers.

        Of all steps, or of those up to ``until``.
        """
        since, each = since.unique(return_inverse=True)  # there are fewer than rows
        log_decay, drift, log1, log2 = (
            torch.zeros_like(since, dtype=torch.float64) for _ in "ABPQ"
        )
        zero1, zero2 = (torch.zeros_like(since, dtype=torch.bool) for _ in "PQ")
        end = self.steps if until is None else until
        for first, lr, weight_decay, beta1, beta2 in reversed(self.settings):
            if first > end:
                continue
            n = (end - since.clamp(min=first - 1)).clamp(min=0).double()
            rate = lr * weight_decay
            log_of_this = n * math.log1p(-rate)
            of_this = n * lr if rate == 0 else -torch.expm1(log_of_this) / weight_decay
            drift = drift + log_decay.exp() * of_this
            log_decay = log_decay + log_of_this
            log1 = log1 + n * (math.log(beta1) if beta1 > 0 else 0.0)
            log2 = log2 + n * (math.log(beta2) if beta2 > 0 else 0.0)
            zero1 = zero1 | ((n > 0) & (beta1 == 0))
            zero2 = zero2 | ((n > 0) & (beta2 == 0))
            end = first - 1
            if bool((since >= end).all()):
                break
        least = torch.finfo(torch.float64).tiny
        betas = (
            log1.exp().clamp(min=least).masked_fill(zero1, 0.0),
            log2.exp().clamp(min=least).masked_fill(zero2, 0.0),
        )
        return Missed(log_decay.exp()[each], drift[each], (betas[0][each], betas[1][each]))

    # ------------------------------------------------------------------------- for the kernels

    @property
    def placed(self) -> bool:
        """Whether there is anything for kernels."""
        return self._native is not None

    @property
    def on_devices(self) -> bool:
        """Whether a GPU has a copy."""
        return self._native is not None and self._native.has_copies()

    def native(self) -> Any:
        """Return what the native step takes; after ``place``, wherever a parameter is."""
        if self._native is None:
            self._native, self._native_settings = _native.C.History(), None  # type: ignore[union-attr]
        if self._native_settings is not None:
            steps = self.steps
            for setting in self._settings[self._native_settings :]:
                self._native.append(setting)
            self._native_settings = len(self._settings)
            self._native.bring_to(steps)
        return self._native

    def place(self, device: torch.device, *, many: bool) -> None:
        """Make the history ready for kernels on ``device``; does nothing if it is.

        ``many``: with room for all changes in the replays of a captured graph.
        """
        native = self.native()
        if native.has(device):
            return
        if not native.place(device, self.steps, self._settings, many):
            self._native_settings = 0
            self.native()

    def reserve(self, *, many: bool) -> None:
        """Make room on GPUs for one more step; ``many``: for a captured graph's replays."""
        if self._native is not None:
            self._native.reserve(many)

    def now(self, device: torch.device) -> int | Tensor:
        """Return the steps so far; a tensor of the device where the host would have to wait."""
        if self._behind or self.replayed:
            steps = self._native.steps(device)
            if steps is not None:
                return steps
        return self.steps

    def _ask(self) -> None:
        """Learn from a GPU what the host has missed."""
        if self._behind or self.replayed:
            if is_capturing():
                raise RuntimeError(
                    "the history of a lazy mode, which is on the GPU, cannot be read while a CUDA "
                    "graph is being captured: state_dict() and copies come before or after"
                )
            self._steps, self._settings = self._native.read()
            self._behind, self._uncounted = False, 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the numbers alone."""
        return History, (self.saved(),)

    def __repr__(self) -> str:
        """Return a summary, of what the host knows: there may be a million settings."""
        more = " or more" if self._behind or self.replayed else ""
        known = f"{self._steps}{more} steps, {len(self._settings)} settings"
        return f"<{known} since step {self.begin}>"


def _check(saved: list[float]) -> None:
    """Raise ValueError, with what was expected, for numbers that no history has."""
    if len(saved) < 2 or (len(saved) - 2) % _FIELDS or not all(map(math.isfinite, saved)):
        raise ValueError(f"finite numbers: steps, begin and {_FIELDS} for each setting")
    steps, begin = saved[:2]
    if steps != int(steps) or begin != int(begin) or not 0 <= begin <= steps <= MAX_STEPS:
        raise ValueError(f"whole numbers 0 <= begin <= steps <= {MAX_STEPS}")
    before = begin
    for k in range(2, len(saved), _FIELDS):
        first, lr, weight_decay, beta1, beta2 = saved[k : k + _FIELDS]
        if first != int(first) or not before < first <= steps:
            raise ValueError("settings whose first steps rise from begin + 1 to steps")
        before = first
        if not (lr >= 0 and weight_decay >= 0 and lr * weight_decay < 1):
            raise ValueError("settings with lr >= 0, weight_decay >= 0 and their product < 1")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError("settings with betas in [0, 1)")
