# SPDX-License-Identifier: Apache-2.0
"""Whether clocks, windows and row numbers, which kernels go by, are in their range."""

from __future__ import annotations

from torch import Tensor

__all__ = ["extremes", "out_of_range"]


def out_of_range(
    name: str, value: Tensor, p: Tensor, open_window: int, now: int
) -> tuple[list[int], str] | None:
    """Return the least and the most of numbers that kernels go by, and what they may be.

    None: they are right.
    """
    if name == "window_rows":
        ranges = [("rows", row, 0, n - 1) for row, n in zip(value, p.shape, strict=False)]
    elif name == "window":
        ranges = [("numbers", value, 0, open_window)]
    else:
        ranges = [("clocks", value, -1 - now, now)]
    for what, values, least, most in ranges:
        low, high = extremes(values)
        if (low < least or high > most) and values.numel() > 0:
            return [low, high], f"{what} from {least} to {most}"
    return None


def extremes(value: Tensor) -> tuple[int, int]:
    """Return the least and the most of integers; of none, or without data, 0."""
    if value.numel() == 0 or value.is_meta:
        return 0, 0
    low, high = value.aminmax()
    return int(low), int(high)
