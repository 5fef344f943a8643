# SPDX-License-Identifier: Apache-2.0
"""The steps of a parameter group in a lazy mode, and what a row that skipped some has missed.

With a zero gradient a step is ``p <- (1 - lr wd) p - lr sign(m)`` and ``m <- beta m``, and the sign
stays. Steps ``i`` in a row are therefore ``p <- A p - B sign(m)`` and ``m <- P m`` with

    A = prod (1 - lr_i wd_i)    B = sum lr_i prod_{j > i} (1 - lr_j wd_j)    P = prod beta_i

This module has the definition, which walks over the stretches of equal hyperparameters; the kernels
get A, B and P from sums kept since the first step (csrc/history.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiger_ext import _native

__all__ = ["History", "Missed"]

_FIELDS = 5  # of a setting: its first step, lr, weight_decay, first beta, last beta
_MAX_STEPS = 2**31 - 1


@dataclass(frozen=True)
class Missed:
    """What skipped steps do: float64 tensors, one element for each row. See the module."""

    decay: Tensor  # A
    drift: Tensor  # B
    betas: tuple[Tensor, Tensor]  # P of the first and of the last beta; 0 only where a beta was 0


class History:
    """The hyperparameters of every step since the last flush.

    Steps with equal ones cost nothing; each change costs five numbers.

    Attributes:
        steps: the steps taken so far.
        begin: the step since which the history goes back.
        settings: ``(first step, lr, weight_decay, first beta, last beta)``, each until the next.
    """

    def __init__(self, saved: Sequence[float] = (0.0, 0.0)) -> None:
        """Restore what ``saved()`` returned; the default is the start of training."""
        self.steps = int(saved[0])
        self.begin = int(saved[1])
        self.settings: list[tuple[int, float, float, float, float]] = []
        for k in range(2, len(saved), _FIELDS):
            first, lr, weight_decay, beta1, beta2 = saved[k : k + _FIELDS]
            self.settings.append((int(first), lr, weight_decay, beta1, beta2))
        self._native: Any = None
        self._native_settings = 0

    @classmethod
    def of(cls, saved: History | str | Sequence[float]) -> History:
        """Return the history that is, or that ``text()`` or ``saved()`` returned."""
        if isinstance(saved, History):
            return saved
        return cls([float(x) for x in saved.split()] if isinstance(saved, str) else saved)

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
        if self.steps >= _MAX_STEPS:
            raise OverflowError(f"the lazy modes count at most {_MAX_STEPS} steps")

    def advance(self, lr: float, weight_decay: float, betas: Sequence[float]) -> None:
        """Add a step with these hyperparameters."""
        self.steps += 1
        now = (lr, weight_decay, betas[0], betas[-1])
        if not self.settings or self.settings[-1][1:] != now:
            self.settings.append((self.steps, *now))

    def forget(self) -> None:
        """Drop the steps so far: every row is current."""
        self.begin = self.steps
        self.settings.clear()
        self._native = None

    def missed(self, since: Tensor) -> Missed:
        """Return the effect of all steps after ``since``, an int64 tensor of step numbers."""
        log_decay, drift, log1, log2 = (
            torch.zeros_like(since, dtype=torch.float64) for _ in "ABPQ"
        )
        zero1, zero2 = (torch.zeros_like(since, dtype=torch.bool) for _ in "PQ")
        end = self.steps
        for first, lr, weight_decay, beta1, beta2 in reversed(self.settings):
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
        return Missed(log_decay.exp(), drift, betas)

    def use(self, rule: Any, mode: str) -> None:
        """Tell a native rule that rows are to be brought up to the present."""
        if self._native is None:
            self._native, self._native_settings = _native.C.History(), 0  # type: ignore[union-attr]
        for setting in self.settings[self._native_settings :]:
            self._native.append(*setting)
        self._native_settings = len(self.settings)
        self._native.use(rule, mode, self.steps)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy the numbers alone."""
        return History, (self.saved(),)

    def __repr__(self) -> str:
        """Return a summary: there may be a million settings."""
        return f"<{self.steps} steps, {len(self.settings)} settings since step {self.begin}>"
