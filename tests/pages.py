# SPDX-License-Identifier: Apache-2.0
"""Which pages of a tensor on the CPU exist: asked of Linux."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import re
import struct
from pathlib import Path

from torch import Tensor

_PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
_HUGE = 1 << 6
_libc = ctypes.CDLL(None, use_errno=True)


def existing_bytes(tensor: Tensor) -> int:
    """Return how much of a tensor's memory exists, in whole pages."""
    start = tensor.data_ptr() & -mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    there = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    if _libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), there) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flags & 1 for flags in there) * mmap.PAGESIZE


def huge_bytes(tensor: Tensor) -> int:
    """Return how much of a tensor's memory is in huge pages; OSError before Linux 6.7."""
    start = tensor.data_ptr() & -mmap.PAGESIZE
    end = -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    regions = (ctypes.c_uint64 * (3 * 1024))()
    # struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, ...
    scan = struct.pack(
        "12Q", 96, 0, start, end, 0, ctypes.addressof(regions), 1024, 0, 0, _HUGE, 0, _HUGE
    )
    with open("/proc/self/pagemap", "rb") as pages:
        found = fcntl.ioctl(pages, _PAGEMAP_SCAN, bytearray(scan))
    return sum(regions[3 * k + 1] - regions[3 * k] for k in range(found))


def asks_for_huge_pages(tensor: Tensor) -> bool:
    """Return whether huge pages were asked for in most of the mappings of a tensor."""
    asked = sum(
        last - first
        for first, last, text in _mappings(tensor)
        if re.search(r"^VmFlags:.* hg", text, re.M)
    )
    return 2 * asked > tensor.nbytes


def _mappings(tensor: Tensor) -> list[tuple[int, int, str]]:
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found = []
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    for part in parts[1:]:
        first, last = (int(x, 16) for x in part.split(" ", 1)[0].split("-"))
        if first < end and last > start:
            found.append((first, last, part))
    return found
