# SPDX-License-Identifier: Apache-2.0
"""Work that is done wholly, although a signal's handler may raise between any two lines of it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["finish"]

_ATTEMPTS = 8  # so many interrupts within one step are not to be expected


def finish(work: Callable[[], None]) -> None:
    """Call ``work`` until it has returned, then raise what a signal's handler raised meanwhile.

    ``work`` must lead to the same end however often, and from whatever line on, it is repeated.
    Python runs handlers (of Ctrl-C, of an alarm) between two of its instructions, never within a
    native call, and what they raise comes from wherever that is.
    """
    interrupt: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            work()
            break
        except BaseException as error:
            if isinstance(error, Exception) and type(error) is type(interrupt):
                raise  # it is the work's own
            interrupt = error
    if interrupt is not None:
        raise interrupt
