"""A mark of a file: another one as soon as a reader would find something else in it.

Size and time are not enough. Adapters of one kind are all of one size, and a file may be written
again within one tick of the clock: of milliseconds on some file systems, of two seconds on
others. So contents count as well, of large files samples of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

WHOLE = 16 * 2**20  # bytes: files up to this size are read whole
_PIECE = 4096  # bytes
_PIECES = 256  # of a larger file: training changes every tensor


def mark_of(path: Path) -> str:
    """The mark of a file, or of a folder with all files below it. Never raises ``OSError``."""
    if not os.path.isdir(path):
        return _mark(path)
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file())
    except OSError as error:
        return f"{path}: {error}"
    return "\n".join(_mark(file) for file in files)


def _mark(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            for start, length in _pieces(status.st_size):
                file.seek(start)
                digest.update(file.read(length))
    except OSError as error:
        return f"{path}: {error}"
    # Not its number as well: some network file systems give a file another one at each look.
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return f"{path}:{state}:{digest.hexdigest()}"


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """What is read of a file of ``size`` bytes, as start and length; the end is in it."""
    if size <= WHOLE:
        yield 0, size
        return
    for number in range(_PIECES):
        yield (size - _PIECE) * number // (_PIECES - 1), _PIECE
