"""Opening and naming: regular files only, and the system's refusals as errors of this project."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from ..errors import (
    DiskFullError,
    FileChangedError,
    FileError,
    FileMissingError,
    FileTooLargeError,
    NotWrittenError,
    UnreadableError,
)

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())
# Without O_NONBLOCK the opening of a pipe waits for a writer, for ever.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOINHERIT", 0)
    | getattr(os, "O_CLOEXEC", 0)
)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; never a pipe, a device, a socket or a folder.

    Raises ``FileMissingError``, ``UnreadableError``.
    """
    path = Path(path)
    with reading(path):
        try:
            _check_regular(path, os.stat(path))  # a device may act when it is opened
            handle = os.open(path, _FLAGS)
        except ValueError as error:  # NUL, or a letter that the file system cannot spell
            raise FileMissingError(path, "is a name that no file can have.") from error
        try:
            _check_regular(path, os.fstat(handle))  # it may be another file by now
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise


def read_bytes(path: str | Path, limit: int = 2**31) -> bytes:
    """The whole of a regular file of at most ``limit`` bytes.

    Raises ``FileMissingError``, ``UnreadableError``, ``FileTooLargeError``.
    """
    path = Path(path)
    with reading(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise FileTooLargeError(path, f"has {size} bytes; expected at most {limit}.")
        return file.read(size)


@contextmanager
def unchanged(path: Path, file: BufferedReader) -> Iterator[None]:
    """Raise ``FileChangedError`` at the end where somebody wrote into an open file meanwhile."""
    with reading(path):
        before = os.fstat(file.fileno())
    yield
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise FileChangedError(
            path, "was written to while it was read. Wait until the other program has finished, "
            "and try again."
        )  # fmt: skip


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Name what the system says while ``path`` is read.

    Raises ``FileMissingError`` or ``UnreadableError`` for an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _ABSENT:
            raise FileMissingError(path, "no such file.") from error
        raise UnreadableError(path, f"cannot be read ({_words(error)}). {_PERMIT}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name what the system says while ``path`` is written, and made room for.

    Raises ``DiskFullError`` or ``NotWrittenError`` for an ``OSError`` of the system.
    """
    try:
        yield
    except OSError as error:
        # Arrow reports a full disk as an OSError without errno on some systems.
        if error.errno in _FULL or "No space left" in str(error):
            raise DiskFullError(
                path,
                "the disk is full; nothing half-written was kept, and a file that was there "
                f"before is unchanged ({_words(error)}). Free some space and do the same again: "
                "finished parts are not done twice.",
            ) from error
        if error.errno is None:  # not the system's: a lock that is held is an OSError, too
            raise
        raise NotWrittenError(
            path,
            f"could not be written ({_words(error)}{_other(path, error)}). A file that was there "
            "before is unchanged. Check the permissions of the folder, or choose another.",
        ) from error


def named(error: OSError) -> FileError:
    """A system's error that met nobody who knew the file, by the name the system gives."""
    where = error.filename if isinstance(error.filename, str) and error.filename else "a file"
    if error.errno in _FULL:
        return DiskFullError(where, f"the disk is full ({_words(error)}). Free some space.")
    if error.errno in _ABSENT:
        return FileMissingError(where, f"no such file ({_words(error)}).")
    return UnreadableError(where, f"cannot be used ({_words(error)}). {_PERMIT}")


_PERMIT = "Check that it is there, whole, and that you are allowed to read it."


def _words(error: OSError) -> str:
    return error.strerror or str(error)


def _other(path: str | Path, error: OSError) -> str:
    """The file the system names, where it is not ``path`` or one beside it."""
    named = error.filename
    if not isinstance(named, str) or Path(named).parent == Path(path).parent:
        return ""
    return f": {named}"


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
    raise FileMissingError(path, f"is {kind}; expected a file.")
