# SPDX-License-Identifier: Apache-2.0
"""Memory for large tables: zero pages that exist only once they are written."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tiger_ext.files import unfinished_path
from tiger_ext.huge_pages import HUGE_PAGE, advise_huge_pages
from tiger_ext.options import FLOATS

__all__ = ["empty_table", "shared_zeros", "untouched_zeros", "untouched_zeros_like"]

# From this size on a mapping begins where a huge page does: else it has small pages at both ends.
_WORTH_PADDING = 32 << 20
_MOST_BYTES = 2**63 - 1


def empty_table(
    rows: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    path: str | os.PathLike[str] | None = None,
    shared: bool = False,
    huge_pages: bool = True,
) -> Tensor:
    """Return a table of zeros whose memory is used only where it is written.

    It may be larger than the machine's memory, as long as the rows that are written fit; a mapped
    file may be larger in any case.

    Args:
        rows: the number of rows, at least 1.
        dim: the length of a row, at least 1.
        dtype: float32, float64, bfloat16 or float16.
        path: a file to map: created with zeros (sparse, where the file system has such files) or,
            if it is there, opened with what it holds. Writes reach the file, also those of other
            processes that map it. It is not read into memory.
        shared: whether the table is in shared memory, so that processes that get it through
            ``torch.multiprocessing`` work on the same one. A mapped file is shared by all that open
            it: call this with its path in each of them.
        huge_pages: whether to ask for huge pages of 2 MiB, on Linux with the compiled module: rows
            visited at random then cost less. A row that is written first takes 2 MiB with it.

    Returns:
        A strided tensor ``[rows, dim]`` on the CPU that does not require gradients.

    Raises:
        ValueError: an argument is out of its range; the file at ``path`` is not of the table's
            size; both ``path`` and ``shared`` are given.
        OSError: the memory or the file cannot be had.
    """
    _check_count("rows", rows)
    _check_count("dim", dim)
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(map(str, FLOATS))}")
    for name, flag in (("shared", shared), ("huge_pages", huge_pages)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r}: expected True or False")
    nbytes = int(rows) * int(dim) * dtype.itemsize
    if nbytes > _MOST_BYTES - HUGE_PAGE:
        raise ValueError(
            f"rows={rows}, dim={dim}: a table of {nbytes} bytes, expected less than 2**63"
        )
    if path is not None:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"path={path!r}: expected None or a path")
        if shared:
            raise ValueError(
                f"shared=True, path={os.fspath(path)!r}: expected one of them; a mapped file is "
                "shared by every process that calls empty_table with its path"
            )
        storage = _mapped(Path(path), nbytes)
    elif shared:
        storage = shared_zeros(nbytes)
    else:
        storage = _anonymous(nbytes)
    if huge_pages:
        advise_huge_pages(storage)
    return _tensor(storage, dtype, (int(rows), int(dim)))


def shared_zeros(nbytes: int) -> torch.UntypedStorage:
    """Return zero pages of shared memory, where huge pages may begin if the table is large."""
    padding = 0
    if nbytes >= _WORTH_PADDING:
        # The system puts the next mapping below the last one, wherever that begins.
        probe = mmap.mmap(-1, nbytes + HUGE_PAGE)
        start = torch.frombuffer(probe, dtype=torch.uint8).data_ptr()
        padding = start % HUGE_PAGE
        probe.close()
    return torch.UntypedStorage._new_shared(nbytes + padding, device="cpu")


def untouched_zeros(
    size: Sequence[int], dtype: torch.dtype, stride: Sequence[int] = (), *, huge_pages: bool = False
) -> Tensor:
    """Return zeros on the CPU in pages that do not exist yet.

    Args:
        size: the shape.
        dtype: the dtype.
        stride: of a layout without gaps; none: contiguous.
        huge_pages: whether to ask for huge pages, as for what is written at once. State is not: the
            first step would create all of them (see huge_pages.py).
    """
    storage = _anonymous(max(math.prod(size), 1) * dtype.itemsize)
    if huge_pages:
        advise_huge_pages(storage)
    return _tensor(storage, dtype, size, stride)


def untouched_zeros_like(tensor: Tensor, dtype: torch.dtype, *, huge_pages: bool = False) -> Tensor:
    """Return such zeros in the shape and the memory format of a strided tensor."""
    like = torch.empty_like(tensor, dtype=dtype, device="meta", memory_format=torch.preserve_format)
    return untouched_zeros(like.shape, dtype, like.stride(), huge_pages=huge_pages)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 1:
        raise ValueError(f"{name}={value!r}: expected an integer >= 1")


def _tensor(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int] = (),
) -> Tensor:
    empty = torch.empty(0, dtype=dtype, device="cpu")
    return empty.set_(storage, 0, tuple(size), tuple(stride))  # type: ignore[call-overload,no-any-return]


def _anonymous(nbytes: int) -> torch.UntypedStorage:
    # torch.zeros writes every page.
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=-start % HUGE_PAGE)
    return whole.untyped_storage()


def _mapped(path: Path, nbytes: int) -> torch.UntypedStorage:
    try:
        size = _size(path)
    except FileNotFoundError:
        _create(path, nbytes)
        size = _size(path)
    if size != nbytes:
        raise ValueError(f"path={str(path)!r}: a file of {size} bytes, expected {nbytes} bytes")
    storage = torch.UntypedStorage.from_file(str(path), True, nbytes)
    return cast(torch.UntypedStorage, storage)


def _size(path: Path) -> int:
    """Return the size of a file that can be read and written."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.fstat(file).st_size
    finally:
        os.close(file)


def _create(path: Path, nbytes: int) -> None:
    """Create a file of zeros, unless another process does; it appears in its whole size."""
    new = unfinished_path(path)
    file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(file, nbytes)
        os.link(new, path)
    except FileExistsError:
        pass  # the other's
    finally:
        os.close(file)
        os.unlink(new)
