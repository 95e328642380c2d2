"""Writing that loses nothing: whole new files or none, and never two under one name."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# What file systems without hard links answer (FAT, some network shares).
_NO_LINKS = {
    getattr(errno, name)
    for name in ("EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EINVAL", "EACCES")
    if hasattr(errno, name)
}


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The data is on disk (fsync) before the rename, so a crash or ``kill -9`` at any moment leaves
    either the old file or the whole new one. On an exception nothing changes. The new file has
    the old one's permissions, or those the umask gives.
    """
    path = Path(path)
    with _written_beside(path) as temporary:
        yield temporary.path
        temporary.finish()
        os.replace(temporary.path, path)
        _sync_folder(path.parent)


@contextmanager
def creating(path: str | Path) -> Iterator[Path]:
    """As ``replacing``, for a file that must not be there yet, whoever else writes.

    Raises ``FileExistsError`` where it is: before anything is written, or at the end where
    another process was faster. Nothing is left behind then.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    with _written_beside(path) as temporary:
        yield temporary.path
        temporary.finish()
        _rename_to_free(temporary.path, path)
        _sync_folder(path.parent)


@dataclass(frozen=True, kw_only=True)
class _Temporary:
    """A file that is written before it gets its name."""

    path: Path
    mode: int
    """Its permissions in the end."""

    def finish(self) -> None:
        """Set the permissions and see that everything is on the disk."""
        if stat.S_IMODE(self.path.stat().st_mode) != self.mode:  # safetensors' are its owner's only
            with suppress(OSError):  # not every file system has permissions
                self.path.chmod(self.mode)
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def _written_beside(path: Path) -> Iterator[_Temporary]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its files are for their owner alone, and so would be what replaces `path`.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    temporary.open("xb").close()
    mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
    try:
        yield _Temporary(path=temporary, mode=mode)
    except BaseException:
        with suppress(OSError):  # the folder itself may be gone
            temporary.unlink(missing_ok=True)
        raise


def _rename_to_free(temporary: Path, path: Path) -> None:
    """Give ``temporary`` the name ``path`` only if nobody has it, in one step."""
    if os.name == "nt":
        os.rename(temporary, path)  # there it fails where the name is taken
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.open("xb").close()  # ours from here on, though empty for a moment
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return
    temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no such call and needs none."""
    if os.name == "posix":
        with suppress(OSError):  # the file is in place; some network file systems refuse this
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
