# SPDX-License-Identifier: Apache-2.0
"""Huge pages for the tables that steps visit at random rows."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque

import torch
from torch import Tensor, nn

from tiger_ext import _native

__all__ = ["advise_huge_pages", "is_large", "move_to_huge_pages"]

# Below this size a table's page table fits the caches.
_LARGE_TABLE_BYTES = 32 << 20
# What is moved at a time: one huge page.
_SLICE_BYTES = 2 << 20
# How long the thread rests after a slice, in times of what the slice took, and at least.
_REST, _SHORTEST_REST = 3.0, 1e-3
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
    """Have what is written of a tensor on the CPU moved to huge pages, in the background.

    Its contents and its address stay as they are. The tensor may be freed or replaced meanwhile.
    """
    # No bytes: asks whether huge pages are wanted at all.
    if _native.C is not None and _native.C.move_to_huge_pages(0, 0) == 0:
        _mover.add(tensor)


class _Mover:
    """A thread that moves one tensor after the other, and ends when there are no more.

    Why a thread, and not a slice in each step: a step would be longer by every slice it moves
    (0.5 ms for 2 MiB; 5 ms where a virtual machine's host must first provide the memory), and a
    table of 6.4 GB would take 3,200 steps; the thread takes no step's time but that of page
    faults that happen while one huge page is copied. Why it rests: whenever it copies, steps that
    touch the same rows wait, and on a machine whose cores are all busy it takes time from them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[weakref.ref[Tensor]] = deque()
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()

    def add(self, tensor: Tensor) -> None:
        with self._lock:
            self._waiting.append(weakref.ref(tensor))
            if self._thread is None and not self._ending.is_set():
                self._thread = threading.Thread(
                    target=self._run, name="tiger_ext huge pages", daemon=True
                )
                self._thread.start()

    def end(self) -> None:
        """Stop; waits for one slice. A thread must not outlive the interpreter."""
        self._ending.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._ending.is_set():
                    self._thread = None
                    return
                tensor = self._waiting.popleft()
            self._move(tensor)

    def _move(self, reference: weakref.ref[Tensor]) -> None:
        storage = _storage(reference)
        if storage is None:
            return
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        at, refusals = begin & -_SLICE_BYTES, 0
        while at < end and refusals < _REFUSALS:
            first, last = max(at, begin), min(at + _SLICE_BYTES, end)
            start = time.perf_counter()
            refused = _native.C.move_to_huge_pages(first, last - first)  # type: ignore[union-attr]
            took = time.perf_counter() - start
            refusals = refusals + 1 if refused else 0
            at += _SLICE_BYTES
            # It is held during a slice only, so that it can be freed.
            del storage
            if self._ending.wait(max(_REST * took, _SHORTEST_REST)):
                return
            storage = _storage(reference)
            if storage is None or (storage.data_ptr(), storage.nbytes()) != (begin, end - begin):
                return


def _storage(reference: weakref.ref[Tensor]) -> torch.UntypedStorage | None:
    tensor = reference()
    return None if tensor is None else tensor.untyped_storage()


_mover = _Mover()
atexit.register(lambda: _mover.end())
# A forked child has no such thread, and a lock that may have been held.
os.register_at_fork(after_in_child=lambda: _mover.__init__())  # type: ignore[misc]
