# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, checked before what they say of themselves is believed.

``torch.load(mmap=True)`` takes a zip archive's directory at its word: it maps compressed bytes as
if they were numbers, and where a tensor's bytes are too few it goes on in what follows. So the
archive's directory is compared with its headers and with what its pickle asks for. This reads no
tensor: 30 bytes a member and the pickle. Checksums of what lies uncompressed are not compared:
that would read every byte once more, and ``torch.save`` may write none
(``torch.serialization.set_crc32_options``).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sized
from typing import IO, Any, ClassVar

import torch

__all__ = ["CheckpointError", "load_checked"]

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_SIGNATURE = b"PK\x03\x04"
_LEGACY_COUNT = struct.Struct("<q")
# A pickled number, of protocol 2 or later and before.
_LEGACY_MAGIC = (b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"L119547037146038801333356L\n.")
_LEGACY_HEAD = 28  # what comes before it, protocol and frame, and itself
# A pickle may be this large, or as large as its file: one that deflates to nearly nothing could
# otherwise ask for any number of objects.
_SMALL_PICKLE = 1 << 24
_READ_BYTES = 1 << 20


class CheckpointError(Exception):
    """A file cannot be read, or is not what is needed of it; the message names both."""


def load_checked(path: str) -> Any:
    """Return what ``torch.load(path, weights_only=True)`` does, memory-mapped where it can be.

    A file whose tensors are compressed, or that is no zip archive (older than torch 1.6), is read
    into memory.

    Raises:
        CheckpointError: the file is damaged, or of a pickle protocol that torch.load does not take.
            What torch and zipfile raise besides is passed on.
    """
    with open_regular(path) as file:
        zipped = file.read(len(_SIGNATURE)) == _SIGNATURE
        file.seek(0)
        try:
            mapped = _check_archive(file) if zipped else False
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f"is a damaged zip archive, or one that was cut: {error}"
            ) from error
        if not zipped:
            _check_legacy(file)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def open_regular(path: str) -> IO[bytes]:
    """Open a file for reading, but no pipe or device, which may wait or go on for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise CheckpointError("is a directory, expected a file")
    if not stat.S_ISREG(mode):
        raise CheckpointError("is a pipe or device, expected a file")
    return open(path, "rb")


def _check_legacy(file: IO[bytes]) -> None:
    """Raise CheckpointError if a file of before torch 1.6 is damaged: pickles, then the data."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise CheckpointError("is empty, expected what torch.save writes")
    head = file.read(_LEGACY_HEAD)
    if not any(magic in head for magic in _LEGACY_MAGIC):
        raise CheckpointError("is no file of torch.save, neither a zip archive nor an older one")
    file.seek(0)
    for _ in range(3):  # magic number, version, machine
        _Survey(file, size).find()
    survey = _Survey(file, size)
    survey.find()
    keys = _Survey(file, size).find()
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(survey.bytes_of) != sorted(keys)
    ):
        raise CheckpointError("is damaged: the list of its tensor data is not that of its tensors")
    end = file.tell()
    for key in keys:
        file.seek(end)
        (count,) = _LEGACY_COUNT.unpack(file.read(_LEGACY_COUNT.size).ljust(_LEGACY_COUNT.size))
        if count != survey.count_of[key]:
            raise CheckpointError(
                f"is damaged: at byte {end} it announces {count} elements, expected "
                f"{survey.count_of[key]}"
            )
        end += _LEGACY_COUNT.size + survey.bytes_of[key]
    if end != size:
        raise CheckpointError(f"is damaged: it has {size} bytes, expected {end}")


def _check_archive(file: IO[bytes]) -> bool:
    """Raise CheckpointError if the archive is damaged; return whether it may be mapped."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            # torch finds members whatever the case of their names.
            if members.setdefault(member.filename.lower(), member) is not member:
                raise CheckpointError(f"is damaged: it has two members {_cut(member.filename)}")
        begins = _data_begins(file, archive)
        folder = next(iter(members), "").partition("/")[0]
        pickled = members.get(f"{folder}/data.pkl")
        if pickled is None:
            raise CheckpointError(
                f"is a zip archive without {_cut(f'{folder}/data.pkl')}, expected what torch.save "
                "writes"
            )
        if pickled.file_size > max(size, _SMALL_PICKLE):
            raise CheckpointError(
                f"is refused: its {_cut(pickled.filename)} unpacks to {pickled.file_size} bytes, "
                f"the whole file has {size}"
            )
        if pickled.compress_type == zipfile.ZIP_STORED:
            file.seek(begins[pickled.filename])
            text = file.read(pickled.file_size)
        else:
            text = archive.read(pickled)
        survey = _Survey(io.BytesIO(text), len(text))
        survey.find()
        packed = []
        for key, count in survey.bytes_of.items():
            name = f"{folder}/data/{key}"
            found = members.get(name.lower())
            if found is None:
                raise CheckpointError(
                    f"is damaged: it has no member {_cut(name)}, in which {count} bytes of a "
                    "tensor are to be"
                )
            if found.file_size != count:
                raise CheckpointError(
                    f"is damaged: its member {_cut(name)} has {found.file_size} bytes, expected "
                    f"the {count} of a tensor"
                )
            if found.compress_type != zipfile.ZIP_STORED:
                packed.append(found)
        if packed:
            _check_packed(archive, packed)
    return not packed


def _data_begins(file: IO[bytes], archive: zipfile.ZipFile) -> dict[str, int]:
    """Return where each member's data begin, after checking that no two share a byte."""
    begins = {}
    end, before = 0, ""
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        name, start = member.filename, member.header_offset
        if not before and start != 0:
            raise CheckpointError(
                f"is damaged: its first member {_cut(name)} is to begin at byte {start}, expected 0"
            )
        if start < end:
            raise CheckpointError(
                f"is damaged: its member {_cut(name)} is to begin at byte {start}, but {before} "
                f"ends at byte {end}"
            )
        file.seek(start)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_SIGNATURE):
            raise CheckpointError(
                f"is damaged: at byte {start} there is no header of its member {_cut(name)}"
            )
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        begins[name] = start + _LOCAL_HEADER.size + name_length + extra_length
        here = file.read(name_length)
        if here != name.encode("utf-8" if member.flag_bits & 0x800 else "cp437"):
            raise CheckpointError(
                f"is damaged: its directory has {_cut(name)} at byte {start}, where the file has "
                f"{here[:100]!r}"
            )
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise CheckpointError(
                f"cannot be read: its member {_cut(name)} is encrypted or compressed by method "
                f"{member.compress_type}, expected 0 (stored) or 8 (deflated)"
            )
        if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
            raise CheckpointError(
                f"is damaged: its member {_cut(name)} is stored in {member.compress_size} bytes, "
                f"but is to have {member.file_size}"
            )
        end, before = begins[name] + member.compress_size, f"its member {_cut(name)}"
    if end > archive.start_dir:
        raise CheckpointError(
            f"is damaged: {before} ends at byte {end}, but its directory begins at byte "
            f"{archive.start_dir}"
        )
    return begins


def _cut(name: Any) -> str:
    """Return how messages print a name from a file, which may be of any length."""
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"


def _check_packed(archive: zipfile.ZipFile, packed: list[zipfile.ZipInfo]) -> None:
    """Raise CheckpointError if members do not unpack to what they are to be, or to too much."""
    total = sum(member.file_size for member in packed)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total > memory:
        raise CheckpointError(
            f"cannot be read: its compressed tensors unpack to {total} bytes, this machine has "
            f"{memory} bytes of memory"
        )
    for member in packed:
        with archive.open(member) as data:  # which compares size and checksum at the end
            while data.read(_READ_BYTES):
                pass


class _Global:
    """A class or function that a pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Made:
    """What such a function would have made, from arguments with so many items.

    Attributes:
        elements: of tensor data, how many there are.
        shared: of a tensor, whether it may have more elements than its data.
    """

    def __init__(self, size: int, elements: int = 0, shared: bool = False) -> None:
        self._size = size
        self.elements = elements
        self.shared = shared

    def __len__(self) -> int:
        return self._size


class _MadeDict(dict[Any, Any]):
    """The same of a dictionary, which is filled afterwards."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __len__(self) -> int:
        return super().__len__() + self._size


def _may_share(data: Any, shape: Any) -> bool:
    """Return whether a tensor of this shape may have more elements than its data."""
    if not isinstance(data, _Made) or not isinstance(shape, tuple) or len(shape) > 64:
        return True
    if not all(isinstance(length, int) for length in shape):
        return True
    return math.prod(shape) > data.elements


def _has_shared(args: tuple[Any, ...]) -> bool:
    """Return whether a sparse tensor has such parts: torch may go through all of their elements."""
    parts = args[1] if len(args) > 1 and isinstance(args[1], tuple) else ()
    return any(isinstance(part, _Made) and part.shared for part in parts)


# The one in Python: the one in C reserves memory for whatever memo number it meets.
class _Survey(pickle._Unpickler):
    """Finds which tensor data a pickle asks for; makes nothing of what it names.

    It refuses the calls with which a short pickle could take any time or memory, and takes the
    opcodes that ``torch.load(weights_only=True)`` takes.

    Attributes:
        bytes_of: key of the data -> their bytes.
        count_of: key of the data -> their elements.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.bytes_of: dict[str, int] = {}
        self.count_of: dict[str, int] = {}
        self._items_left = 16 * size
        # A length in the pickle may be any; a read would reserve memory for it.
        self._file_read = lambda count: file.read(min(count, size))

    def find(self) -> Any:
        """Read one pickle; return a likeness of it."""
        try:
            return self.load()
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # the bytes may be any
            raise CheckpointError(
                f"is damaged: its pickle cannot be read: {type(error).__name__}: {error}"
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch" and name.endswith("Storage"):
            kind = getattr(torch, name, None)
            if kind is torch.UntypedStorage:
                return torch.uint8
            if isinstance(kind, type) and issubclass(kind, torch.TypedStorage):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # these storages are old
                    return getattr(kind, "dtype", None)
        # Protocol 2 has Python 2's names.
        return _Global(f"{'builtins' if module == '__builtin__' else module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if not (
            isinstance(pid, tuple)
            and len(pid) in (5, 6)
            and isinstance(pid[1], torch.dtype)
            and isinstance(pid[2], str)
            and type(pid[4]) is int
            and pid[4] >= 0
            and pid[5:] in ((), (None,))  # no views of other data
        ):
            raise CheckpointError("is damaged: its pickle asks for data that are no tensor's")
        _, dtype, key, _, count = pid[:5]
        size = count * dtype.itemsize
        self.count_of[key] = count
        if self.bytes_of.setdefault(key, size) != size:
            raise CheckpointError(
                f"is damaged: its pickle asks for {self.bytes_of[key]} and for {size} bytes of the "
                f"same data {_cut(key)}"
            )
        return _Made(0, elements=count)

    def _call(self) -> None:
        args, made = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self.stack.append(self._made(made, args))  # type: ignore[attr-defined]

    def _made(self, made: Any, args: Any) -> Any:
        name = made.name if isinstance(made, _Global) else ""
        if not name or not isinstance(args, tuple):
            raise CheckpointError("is damaged: its pickle calls what is no function")
        size = sum(len(each) for each in args if isinstance(each, Sized))
        self._items_left -= size
        if (
            self._items_left < 0
            or (name == "builtins.bytearray" and any(isinstance(each, int) for each in args))
            or (name == "_codecs.encode" and args[1:] != ("latin1",))
            or (name.startswith("torch.") and name.endswith("Tensor") and args)
            or "_device_tensor" in name
            or (name.endswith("._rebuild_sparse_tensor") and _has_shared(args))
        ):
            raise CheckpointError(
                f"is refused: its pickle calls {_cut(name)} with what may take any time or memory"
            )
        if name.endswith("._rebuild_from_type_v2") and len(args) > 2:
            return self._made(args[0], args[2])
        if name.startswith("torch._utils._rebuild_tensor") and len(args) > 2:
            return _Made(size, shared=_may_share(args[0], args[2]))
        return _MadeDict(size) if name.startswith("collections.") else _Made(size)

    def _refuse(self) -> None:
        protocol: int = self.proto  # type: ignore[attr-defined]
        if protocol > 3:
            raise CheckpointError(
                f"cannot be read: it was saved with pickle_protocol={protocol}, which "
                "torch.load(weights_only=True) does not take: save it anew with torch.save's own, 2"
            )
        told = "is damaged" if protocol else "is damaged, or was saved with pickle_protocol=0 or 1"
        raise CheckpointError(f"{told}: its pickle has opcodes that torch.load does not take")

    def _set_state(self) -> None:
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = (
        dict.fromkeys(range(256), _refuse)
        | {
            code[0]: pickle._Unpickler.dispatch[code[0]]  # type: ignore[attr-defined]
            for code in (
                *(pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.BINPERSID, pickle.MARK),
                *(pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
                *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
                *(pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE, pickle.EMPTY_TUPLE),
                *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET),
                *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
                *(pickle.BINUNICODE, pickle.SHORT_BINSTRING),
                *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
            )
        }
        | {pickle.REDUCE[0]: _call, pickle.NEWOBJ[0]: _call, pickle.BUILD[0]: _set_state}
    )
