"""What ``torch.save`` wrote, with tensors that still lie in the file, and nothing that could run.

Both of its containers are read: the zip archive, and the stream that came before it. The pickle in
them is read by ``unpickler.py``, which cannot call anything.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from ..errors import (
    FileError,
    NotConvertibleError,
    TruncatedFileError,
    UnknownFileError,
    UnreadableError,
    UnsafePickleError,
)
from .system import open_regular, reading, unchanged
from .unpickler import Reader

MAX_PICKLE = 2**23  # bytes without the tensors; each may become a hundred in memory
_MAX_MEMBERS = 200_000
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP_MEMBER = b"PK\x03\x04"

_UNSAFE = (
    "It holds more than tensors and was not loaded; nothing of it ran. Ask its author for "
    "safetensors."
)


@contextmanager
def open_pickle(path: str | Path) -> Iterator[Any]:
    """Give what ``torch.save`` wrote: plain containers, with ``StoredTensor`` for each tensor.

    Tensors can be read while the file is open. Raises ``UnsafePickleError`` for a pickle that
    asks for more, ``NotConvertibleError`` for tensors that are not dense,
    ``UnknownFileError``, ``TruncatedFileError``, ``FileMissingError``, ``UnreadableError``, and
    at the end ``FileChangedError`` where somebody wrote into the file meanwhile.
    """
    path = Path(path)
    with open_regular(path) as file, unchanged(path, file):
        with _named(path), reading(path):
            start = file.read(16)
            safetensors = start[8:9] == b"{"  # even where its header's size begins like a pickle
            if safetensors or not start.startswith((_ZIP_MEMBER, b"\x80")):
                kind = "a safetensors file" if safetensors else "of an unknown kind"
                raise UnknownFileError(
                    path, f"is {kind}, not a pickle; there is nothing to convert."
                )
            file.seek(0)
            zipped = start.startswith(_ZIP_MEMBER)
            values = _read_zip(path, file) if zipped else _read_stream(path, file)
        yield values


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """The many errors of a damaged archive or pickle, by name."""
    try:
        yield
    except (FileError, OSError):
        raise
    except (EOFError, zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise TruncatedFileError(
            path, f"cannot be read ({_line(error)}). Download or copy it again."
        ) from error
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "exhausted" in str(error):
            raise TruncatedFileError(
                path, f"is cut ({_line(error)}). Download or copy it again."
            ) from error
        raise UnsafePickleError(path, f"{_line(error)} {_UNSAFE}") from error
    except MemoryError as error:
        raise UnreadableError(path, "asks for more memory than there is.") from error
    except Exception as error:  # opcodes in an order that no honest file has: anything may fail
        raise UnsafePickleError(path, f"is no sound pickle ({_line(error)}). {_UNSAFE}") from error


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


class _Archive:
    """The members of a zip archive by their place in the file; none is compressed."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if len(members) > _MAX_MEMBERS or sum(m.file_size for m in members) > size:
            raise UnsafePickleError(
                path, f"claims {len(members)} members larger than itself ({size} bytes); it is "
                "made to fill the memory. It was not loaded."
            )  # fmt: skip
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise UnsafePickleError(
                    path, f"has a compressed member {member.filename[:100]!r}, which torch.save "
                    "never writes. It was not loaded."
                )  # fmt: skip
        # The first folder is named after the file; every member lies in it.
        self._members = {m.filename.partition("/")[2]: m for m in members}
        if len(self._members) != len(members):
            raise UnsafePickleError(path, "has two members of one name. It was not loaded.")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def claim(self, key: str, elements: int, width: int) -> int:
        return self.size(key)

    def size(self, key: str) -> int:
        return self._members[f"data/{key}"].file_size

    def read(self, key: str, start: int, size: int) -> bytearray:
        return self.bytes(f"data/{key}", start, size)

    def whole(self, name: str, limit: int) -> bytes:
        size = self._members[name].file_size
        if size > limit:
            raise UnsafePickleError(
                self.path, f"{name} has {size} bytes; expected at most {limit}. It was not loaded."
            )
        return bytes(self.bytes(name, 0, size))

    def bytes(self, name: str, start: int, size: int) -> bytearray:
        at = self._members[name].header_offset
        self._file.seek(at)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != _ZIP_MEMBER:
            raise TruncatedFileError(self.path, f"has no member {name[:100]!r} where it should be.")
        skipped, extra = struct.unpack("<HH", header[26:30])
        return _exactly(self.path, self._file, at + 30 + skipped + extra + start, size)


def _exactly(path: Path, file: BufferedReader, at: int, size: int) -> bytearray:
    if at + size > os.fstat(file.fileno()).st_size:
        raise TruncatedFileError(path, "ends inside a tensor. Download or copy it again.")
    with reading(path):
        data = bytearray(size)
        file.seek(at)
        if file.readinto(data) != size:
            raise TruncatedFileError(path, "was cut while it was read. Download or copy it again.")
    return data


def _read_zip(path: Path, file: BufferedReader) -> Any:
    archive = _Archive(path, file)
    if "constants.pkl" in archive:
        raise UnsafePickleError(path, f"is a TorchScript archive. {_UNSAFE}")
    if "data.pkl" not in archive:
        raise UnknownFileError(
            path, "is a zip archive without data.pkl: torch.save did not make it."
        )
    if "byteorder" in archive and archive.whole("byteorder", 16) != b"little":
        raise NotConvertibleError(path, "was saved by a machine of the other byte order.")
    data = archive.whole("data.pkl", MAX_PICKLE)
    return Reader(path, io.BytesIO(data), archive).load()


class _Stream:
    """Storages one after another behind the pickles, each after its number of elements."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self._file = path, file
        self._claimed: dict[str, tuple[int, int]] = {}
        """Elements and bytes an element, by key, as the tensors say."""
        self._places: dict[str, tuple[int, int]] = {}

    def claim(self, key: str, elements: int, width: int) -> int:
        self._claimed[key] = elements, width
        return elements * width

    def size(self, key: str) -> int:
        # Where the storages lie is known only after the tensors; see ``find``.
        elements, width = self._claimed[key]
        return elements * width

    def find(self, keys: Any) -> None:
        """Walk over the storages. Raises where they are not those the tensors named."""
        listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not listed or len(keys) != len(self._claimed) or set(keys) != set(self._claimed):
            raise pickle.UnpicklingError("the list of storages is not that of the tensors")
        at, end = self._file.tell(), os.fstat(self._file.fileno()).st_size
        for key in keys:
            elements, width = self._claimed[key]
            self._file.seek(at)
            found = int.from_bytes(self._file.read(8), "little")
            at += 8
            if found != elements or at + elements * width > end:
                raise TruncatedFileError(
                    self.path, f"ends inside storage {key[:40]}, or it has another size than its "
                    "tensors say. Download or copy it again."
                )  # fmt: skip
            self._places[key] = at, elements * width
            at += elements * width

    def read(self, key: str, start: int, size: int) -> bytearray:
        return _exactly(self.path, self._file, self._places[key][0] + start, size)


class _Limited:
    """A file that gives no more than a pickle's worth of bytes, whatever is asked for."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._left = MAX_PICKLE

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(min(4096, self._left)))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _read_stream(path: Path, file: BufferedReader) -> Any:
    limited, source = _Limited(file), _Stream(path, file)

    def load() -> Any:
        return Reader(path, limited, source).load()

    first = load()
    if first != _MAGIC:
        # A bare pickle of plain values, or of something that is refused on the way.
        raise NotConvertibleError(path, "is a pickle that torch.save did not write.")
    if load() != _PROTOCOL:
        raise NotConvertibleError(path, "was written by a version of torch that nobody knows.")
    load()  # sizes of the types of the machine that wrote it
    values = load()
    source.find(load())
    return values
