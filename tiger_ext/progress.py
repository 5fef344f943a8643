# SPDX-License-Identifier: Apache-2.0
"""A progress bar, if one is wanted and tqdm is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A context that hands out a function, to be told how many rows are done."""

    def __init__(self, what: str, rows: int, wanted: bool | None) -> None:
        """``wanted``: None shows the bar on a terminal, if it takes longer than two seconds."""
        self._bar: Any = None
        if wanted is False:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            if wanted:
                raise
            return
        self._bar = tqdm(
            total=rows,
            desc=what,
            unit="row",
            unit_scale=True,
            delay=0 if wanted else 2,
            disable=False if wanted else None,
        )

    def __enter__(self) -> Callable[[int], Any]:
        """Return the function."""
        return self._bar.update if self._bar is not None else lambda rows: None

    def __exit__(self, *exception: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
