"""Small things about files that several parts of training need."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infinite_id_core.errors import WrongFormatError
from infinite_id_core.files.system import open_regular, read_bytes, reading

from .errors import BusyError, UnreadableError, disk_errors

_SAMPLES = 64
_SAMPLE_BYTES = 2**16


def sampled_sha256(*paths: Path) -> str:
    """A fingerprint of large files in milliseconds: size, head, tail and pieces between them.

    For safetensors the head holds every name, shape and type. Not proof against an adversary.
    Raises ``FileMissingError``, ``UnreadableError``.
    """
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(file.read(2**20))
            for i in range(1, _SAMPLES + 1):
                file.seek(max(0, size * i // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


LOCK = ".lock"
# Data workers of a killed run hold its lock until they notice, which takes them five seconds.
_WAIT = 10.0


@contextmanager
def locked(folder: Path, who: str, wait: float | None = None) -> Iterator[None]:
    """Hold a folder for this process, made where it is not there; a killed process lets go of it.

    ``who`` completes "another ... is writing"; ``wait``: seconds for a killed process's
    workers to let go. Raises ``BusyError`` where another process holds it, ``UnreadableError``
    where it cannot be written to, ``DiskFullError``.
    """
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, timeout=_WAIT if wait is None else wait)
            lock.acquire()
    except Timeout as error:
        raise BusyError(
            folder,
            f"another {who} is writing to this folder. Wait for it, or choose another folder.",
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise UnreadableError(folder, "is, or lies in, a file; expected a folder.") from error
    except PermissionError as error:
        raise UnreadableError(folder, f"cannot be written to ({error.strerror}).") from error
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Whether a folder can be written to, or made; nothing is made. Raises ``UnreadableError``."""
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        raise UnreadableError(folder, "is, or lies in, a file; expected a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UnreadableError(folder, f"cannot be written to ({place} does not allow it).")


def is_locked(folder: Path) -> bool:
    """Whether another process holds the folder just now; nothing is made or waited for."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def read_text(path: str | Path, limit: int = 2**26) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises ``FileMissingError``, ``UnreadableError``, ``WrongFormatError``.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WrongFormatError(path, f"is not text in UTF-8 ({error}).") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises as ``read_text`` does."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise WrongFormatError(path, f"is not JSON ({error}).") from error
