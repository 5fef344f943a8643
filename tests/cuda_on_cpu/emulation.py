# SPDX-License-Identifier: Apache-2.0
"""Switches of the test build in which the CUDA kernels run on the CPU (``make cuda-on-cpu``)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from tiger_ext import _native

#: Whether this process is to test the CUDA kernels on CPU tensors.
active = os.environ.get("TIGER_EXT_CUDA_ON_CPU") == "1"

if active:
    _library = ctypes.CDLL(_native.C.__file__)
    _library.cuda_on_cpu_launches.restype = ctypes.c_uint64
    _library.cuda_on_cpu_seed.argtypes = [ctypes.c_uint64]


def select(emulated: bool) -> None:
    """Update CPU tensors by the CUDA kernels from now on, or by the CPU's own."""
    _library.cuda_on_cpu_select(int(emulated))


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Update CPU tensors by the CPU's own kernels."""
    select(False)
    try:
        yield
    finally:
        select(True)


def seed(value: int) -> None:
    """Choose the order in which blocks, warps and threads run."""
    _library.cuda_on_cpu_seed(value)


@contextmanager
def capturing() -> Iterator[None]:
    """Let streams say that they are being captured in a graph; kernels run as ever."""
    _library.cuda_on_cpu_capture(1)
    try:
        yield
    finally:
        _library.cuda_on_cpu_capture(0)


def launches() -> int:
    """Return how many kernels were launched so far; a call of CUB counts as one."""
    return _library.cuda_on_cpu_launches()
