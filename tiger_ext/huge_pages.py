# SPDX-License-Identifier: Apache-2.0
"""Huge pages for the tables that steps visit at random rows."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref

import torch
from torch import Tensor, nn

from tiger_ext import _native

__all__ = [
    "HUGE_PAGE",
    "advise_huge_pages",
    "is_large",
    "move_to_huge_pages",
    "settle_huge_pages",
]

# Their size on Linux; they begin at its multiples.
HUGE_PAGE = 2 << 20
# Below this size a table's page table fits the caches.
_LARGE_TABLE_BYTES = 32 << 20
# How long the thread rests after a page, in times of what that took, and at least, in seconds.
_REST, _SHORTEST_REST = 0.5, 5e-4
# When a table is looked at again parts of which were not in use: ever later.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
# After so many refusals in a row the system will not have it: a file, no huge pages left.
_REFUSALS = 16


def is_large(tensor: Tensor, nbytes: int | None = None) -> bool:
    """Return whether huge pages pay for a tensor, if its rows are visited at random.

    Args:
        tensor: a parameter or a state.
        nbytes: the size to judge by; None: the tensor's own.
    """
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:  # no memory of its own
        return False
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    return (tensor.nbytes if nbytes is None else nbytes) >= _LARGE_TABLE_BYTES


def advise_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for huge pages behind what is not yet written of a storage on the CPU."""
    if _native.C is not None:
        _native.C.advise_huge_pages(storage.data_ptr(), storage.nbytes())


def move_to_huge_pages(tensor: Tensor) -> None:
    """Have a tensor on the CPU moved to huge pages in the background, where half is written.

    Its contents and its address stay as they are. The tensor may be freed or replaced meanwhile.
    """
    if _native.C is not None and _native.C.huge_pages_wanted():
        _mover.add(tensor)


def settle_huge_pages(seconds: float) -> bool:
    """Wait until all that is in use now has been moved, without rests: for measurements.

    Args:
        seconds: the longest to wait.

    Returns:
        Whether nothing is left to be moved.
    """
    return _mover.settle(seconds)


class _Mover:
    """A thread that moves tables to huge pages, one page after the other.

    Why not in the steps: one page a step makes each step longer by its copy, for the 3,200 steps
    that a table of 6.4 GB takes, and much longer where a virtual machine's host must first provide
    the memory. The thread takes from steps the faults on the page that is being copied.

    Why not when the memory is created: a step that writes random rows of untouched state pays a
    fault a row with small pages; with huge ones it creates, and clears, nearly all of them.

    It ends when no table is left of which a part is not in huge pages.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tables: list[_Table] = []
        self._moving: _Table | None = None
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def add(self, tensor: Tensor) -> None:
        with self._changed:
            if any(each.is_of(tensor) for each in (*self._tables, self._moving) if each):
                return
            self._tables.append(_Table(tensor))
            self._changed.notify_all()
            if self._thread is None and not self._ending.is_set():
                self._thread = threading.Thread(
                    target=self._run, name="tiger_ext huge pages", daemon=True
                )
                self._thread.start()

    def end(self) -> None:
        """Stop; waits for one page. The thread must not outlive the interpreter."""
        self._ending.set()
        with self._changed:
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def settle(self, seconds: float) -> bool:
        with self._changed:
            for table in (*self._tables, *([self._moving] if self._moving else [])):
                table.hurry = True
                table.due = 0.0
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: self._moving is None and not any(each.hurry for each in self._tables),
                seconds,
            )

    def _run(self) -> None:
        while (table := self._next()) is not None:
            look_again = False
            try:
                look_again = table.move(self._ending)
            finally:
                with self._changed:
                    self._moving = None
                    if look_again:
                        self._tables.append(table)
                    self._changed.notify_all()

    def _next(self) -> _Table | None:
        """Wait until a table is due and return it; None: the thread ends."""
        with self._changed:
            while self._tables and not self._ending.is_set():
                table = min(self._tables, key=lambda each: each.due)
                wait = table.due - time.monotonic()
                if wait <= 0:
                    self._tables.remove(table)
                    self._moving = table
                    return table
                self._changed.wait(wait)
            self._thread = None
            return None


class _Table:
    """A tensor on its way to huge pages.

    Attributes:
        due: when it is to be looked at, by the monotonic clock.
        hurry: whether somebody waits for it.
    """

    __slots__ = ("_begin", "_end", "_moved", "_reference", "_wait", "due", "hurry")

    def __init__(self, tensor: Tensor) -> None:
        self._reference = weakref.ref(tensor)
        self._begin = self._end = 0
        self._moved: set[int] = set()
        self._wait = _FIRST_WAIT
        self.due, self.hurry = 0.0, False

    def is_of(self, tensor: Tensor) -> bool:
        return self._reference() is tensor

    def move(self, ending: threading.Event) -> bool:
        """Move the pages that are in use; return whether it is to be looked at again."""
        if self._find() is None:
            return False
        memory = self._begin, self._end
        hurried, self.hurry = self.hurry, False
        left, refusals = False, 0
        for page in range(-(-self._begin // HUGE_PAGE), self._end // HUGE_PAGE):
            if page in self._moved:
                continue
            start = time.perf_counter()
            refused = self._move(page, memory)
            if refused is None:
                left = True  # in other memory
                break
            left |= refused != 0
            if refused >= 0:
                refusals = refusals + 1 if refused > 0 else 0
            if refusals >= _REFUSALS or ending.is_set():
                return False
            rest = max(_REST * (time.perf_counter() - start), _SHORTEST_REST)
            if refused >= 0 and not (hurried or self.hurry) and ending.wait(rest):
                return False
        self.due = 0.0 if self.hurry else time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        return left

    def _move(self, page: int, memory: tuple[int, int]) -> int | None:
        """Move one; return 0, what the system says, -1: it is not in use; None: it is gone."""
        storage = self._find()  # which is held until the page is moved, and no longer
        if storage is None or (self._begin, self._end) != memory:
            return None
        refused: int = _native.C.move_to_huge_page(page * HUGE_PAGE)  # type: ignore[union-attr]
        if refused == 0:
            self._moved.add(page)
        return refused

    def _find(self) -> torch.UntypedStorage | None:
        """Return where the tensor lies; None: it is freed, or on another device."""
        tensor = self._reference()
        if tensor is None or tensor.device.type != "cpu":
            return None
        storage = tensor.untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if (begin, end) != (self._begin, self._end):
            self._begin, self._end = begin, end
            self._moved.clear()
        return storage


_mover = _Mover()


def _begin_anew() -> None:
    global _mover
    _mover = _Mover()


atexit.register(lambda: _mover.end())
# A forked child has no such thread, and a lock that may have been held.
os.register_at_fork(after_in_child=_begin_anew)
