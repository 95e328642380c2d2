"""Opening what is a file and nothing else: no pipe to wait at, no device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# Without O_NONBLOCK the opening of a pipe waits for a writer, for ever.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOINHERIT", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
NO_FILE = "no regular file, but a folder, a pipe, a device or a socket"


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file (or a link to one) for reading. Raises ``OSError``."""
    _check(os.stat(path).st_mode)  # a device may act when it is opened
    handle = os.open(path, _FLAGS)
    try:
        _check(os.fstat(handle).st_mode)  # it may be another file by now
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NO_FILE)
