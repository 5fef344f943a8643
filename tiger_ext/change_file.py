# SPDX-License-Identifier: Apache-2.0
"""The file of a delta checkpoint: written whole or not at all, and read only if no bit is wrong.

    16 bytes   what kind of file it is
    2 x 8      length of the header, and of the whole file; little endian
    header     what ``torch.save`` writes of a dict of plain values and small tensors
    tensors    their elements, row by row; each begins at a multiple of 64 bytes
    32 bytes   SHA-256 of everything before

Nothing in it is run: the header is loaded with ``weights_only=True``, after the checksum.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import math
import mmap
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tiger_ext.archive import CheckpointError, open_regular
from tiger_ext.files import unfinished_path

__all__ = ["Source", "bytes_of", "read_changes", "write_changes"]

_KIND = b"tiger_ext delta1"
_LENGTHS = struct.Struct("<QQ")
_START = len(_KIND) + _LENGTHS.size
_DIGEST = hashlib.sha256().digest_size
_ALIGNMENT = 64
_CHUNK = 1 << 22  # bytes that are gathered, hashed or written at a time


class Source:
    """A tensor on its way into a file: the whole of it, or some of its rows.

    Attributes:
        dtype: of its elements.
        shape: what the file will have.
    """

    def __init__(self, tensor: Tensor, rows: Tensor | None = None, dims: int = 1) -> None:
        """Take ``rows``, indices into the linearised first ``dims`` dimensions; None: all."""
        self._tensor, self._rows, self._dims = tensor.detach(), rows, dims
        self.dtype = tensor.dtype
        self.shape = list(tensor.shape)
        if rows is not None:
            self.shape = [len(rows), *tensor.shape[dims:]]

    def pieces(self) -> Iterator[Tensor]:
        """Yield the elements, as contiguous tensors on the CPU."""
        t, rows = self._tensor, self._rows
        if rows is None and t.device.type == "cpu" and t.is_contiguous():
            yield t
            return
        if t.dim() == 0:
            yield t.cpu()
            return
        length = len(t) if rows is None else len(rows)
        row_bytes = math.prod(t.shape[1 if rows is None else self._dims :]) * t.itemsize
        size = max(_CHUNK // max(row_bytes, 1), 1)
        for begin in range(0, length, size):
            if rows is None:
                piece = t[begin : begin + size]
            else:
                piece = rows_of(t, rows[begin : begin + size], self._dims)
            yield piece.cpu().contiguous()


def rows_of(t: Tensor, rows: Tensor, dims: int) -> Tensor:
    """Return a copy of rows of the linearised first ``dims`` dimensions."""
    if dims == 1:
        return t.index_select(0, rows)
    return t[torch.unravel_index(rows.long(), t.shape[:dims])]


def bytes_of(t: Tensor) -> Iterator[memoryview]:
    """Yield the memory of a contiguous tensor on the CPU, some of it at a time."""
    size = t.numel() * t.itemsize
    for begin in range(0, size, _CHUNK):
        part = ctypes.c_char * min(_CHUNK, size - begin)
        yield memoryview(part.from_address(t.data_ptr() + begin))


# --------------------------------------------------------------------------------- writing


def write_changes(path: str, header: dict[str, Any], sources: Sequence[Source]) -> None:
    """Write a file in the place of ``path``, once all of it is on the disk.

    Raises:
        ValueError: the header has a value that ``torch.load(weights_only=True)`` refuses.
        OSError: it cannot be written. What was at ``path`` is still there.
    """
    tensors = [(str(s.dtype).removeprefix("torch."), s.shape) for s in sources]
    header = {**header, "byteorder": sys.byteorder, "tensors": tensors}
    head = _serialized(header)
    ends = _places(len(head), tensors)
    target = os.path.realpath(path)
    new = unfinished_path(target)
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            digest = hashlib.sha256()

            def put(data: Any) -> None:
                digest.update(data)
                file.write(data)

            put(_KIND + _LENGTHS.pack(len(head), ends[-1][1] + _DIGEST) + head)
            end = _START + len(head)
            for source, (begin, finish) in zip(sources, ends[1:], strict=True):
                put(bytes(begin - end))
                written = 0
                for piece in source.pieces():
                    for part in bytes_of(piece):
                        put(part)
                        written += len(part)
                assert written == finish - begin
                end = finish
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    with contextlib.suppress(OSError):  # some file systems have no such thing
        descriptor = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _serialized(header: dict[str, Any]) -> bytes:
    """Return the header's bytes, after having read them as they will be read."""
    stream = io.BytesIO()
    try:
        torch.save(header, stream)
        stream.seek(0)
        torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        raise ValueError(
            "a parameter group or a parameter's state has a value that cannot be saved for "
            f"torch.load(weights_only=True): {type(error).__name__}: {last[:300]}"
        ) from error
    return stream.getvalue()


def _places(head: int, tensors: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[int, int]]:
    """Return where the header, and then each tensor, begins and ends."""
    places = [(_START, _START + head)]
    for dtype, shape in tensors:
        begin = -(-places[-1][1] // _ALIGNMENT) * _ALIGNMENT
        places.append((begin, begin + math.prod(shape) * getattr(torch, dtype).itemsize))
    return places


# --------------------------------------------------------------------------------- reading


def read_changes(path: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Return header and tensors of a file; the tensors lie in the file, mapped.

    Raises:
        CheckpointError: it is another file, or a bit of it is not what was written.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_START)
        if not start.startswith(_KIND):
            raise CheckpointError(
                "is empty" if size == 0 else f"is no file of save_changes: it begins {start[:16]!r}"
            )
        head, length = _LENGTHS.unpack(start[len(_KIND) :].ljust(_LENGTHS.size, b"\0"))
        if size != length or not _START + head + _DIGEST <= size:
            raise CheckpointError(
                f"is damaged: it has {size} bytes, expected {max(length, _START + _DIGEST)}"
            )
        # A private mapping: tensors on a read-only one would not be safe from writes.
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    digest = hashlib.sha256()
    with memoryview(memory) as view:
        for begin in range(0, size - _DIGEST, _CHUNK):
            digest.update(view[begin : min(begin + _CHUNK, size - _DIGEST)])
    if digest.digest() != memory[size - _DIGEST :]:
        raise CheckpointError(
            "is damaged: its bytes do not have the checksum that was written with them"
        )
    try:
        stream = io.BytesIO(memory[_START : _START + head])
        header = torch.load(stream, map_location="cpu", weights_only=True)
        tensors = _tensors(header, head, size, memory)
    except CheckpointError:
        raise
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        raise CheckpointError(f"cannot be read: {type(error).__name__}: {last[:300]}") from error
    return header, tensors


def _tensors(header: dict[str, Any], head: int, size: int, memory: mmap.mmap) -> list[Tensor]:
    if header["byteorder"] != sys.byteorder:
        raise CheckpointError(
            f"was written on a {header['byteorder']} endian machine, expected {sys.byteorder}"
        )
    places = _places(head, header["tensors"])
    if places[-1][1] + _DIGEST != size:
        raise CheckpointError(
            f"is damaged: its tensors end at byte {places[-1][1]}, expected {size - _DIGEST}"
        )
    found = []
    for (name, shape), (begin, end) in zip(header["tensors"], places[1:], strict=True):
        dtype = getattr(torch, name)
        if end == begin:
            found.append(torch.empty(shape, dtype=dtype, device="cpu"))
            continue
        count = (end - begin) // dtype.itemsize
        t = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)
        found.append(t.reshape(shape))
    return found
