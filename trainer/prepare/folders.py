"""What lies in a folder: every file once, links followed to folders, nothing opened."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}

MAX_NAME = 2**12  # letters: what a file system takes

Status = tuple[int, int]
"""Bytes and time of change in ns."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's: hidden, or made beside the files of people."""
    return name.startswith(".") or name.casefold() in _SYSTEM


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something of the input that is not used."""

    name: str
    reason: str
    detail: str

    @classmethod
    def of(cls, name: str, reason: str, detail: str) -> Problem:
        """Of a name and a detail that may hold anything, of any length."""
        name, detail = (text[:MAX_NAME] for text in (name, detail))
        return cls(name=printable(name), reason=reason, detail=printable(detail))


_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def printable(text: str) -> str:
    """Text that can be written as UTF-8: file names may hold any bytes, JSON half letters."""
    whole = _LONE.sub("\ufffd", text)
    return whole.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(kw_only=True)
class Tree:
    """The files below a folder, by their path below it, ``/`` between the parts."""

    files: dict[str, Status] = field(default_factory=dict)
    """Regular files; in the order of their names within a folder."""
    links: dict[str, tuple[Status, str]] = field(default_factory=dict)
    """Files that are links to regular files, and where those really are."""
    problems: list[Problem] = field(default_factory=list)
    real_files: dict[str, str] = field(default_factory=dict)
    """Path of each of ``files`` by where it really is."""


def walk(root: Path) -> Tree:
    """Everything below ``root``. Folders that are links are read once each, after the others."""
    tree = Tree()
    read: set[str] = set()
    waiting = list(_walk_real(root, "", tree, read))
    while waiting:
        linked = waiting.pop(0)
        target = os.path.realpath(root / linked)
        own = os.path.realpath(root / os.path.dirname(linked))
        if Path(own).is_relative_to(target):
            _problem(tree, linked, "link", "a link that leads in a circle")
        elif target in read:
            _problem(tree, linked, "link", "leads to a folder that is read already")
        else:
            waiting += _walk_real(root, linked, tree, read)
    return tree


def _walk_real(root: Path, start: str, tree: Tree, read: set[str]) -> Iterator[str]:
    """Fill ``tree`` from one folder down; yields the folders that are links."""
    stack = [start]
    while stack:
        folder = stack.pop()
        real = os.path.realpath(root / folder)
        if real in read:
            _problem(tree, folder, "link", "a folder that is read already under another name")
            continue
        read.add(real)
        try:
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            _problem(tree, folder or ".", "unreadable", error.strerror or type(error).__name__)
            continue
        below = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            kind = _take(entry, path, real, tree)
            if kind == "folder":
                below.append(path)
            elif kind == "link":
                yield path
        stack += reversed(below)


def _take(entry: os.DirEntry[str], path: str, real: str, tree: Tree) -> str:
    """Put a file into ``tree``; ``folder`` or ``link`` where it is one to look into."""
    try:
        if is_hidden(entry.name):
            end = "/" if entry.is_dir(follow_symlinks=False) else ""
            _problem(tree, path + end, "hidden", "hidden, or made by the system")
            return ""
        linked = entry.is_symlink()
        status = entry.stat()
    except OSError as error:
        if _is_link(entry):
            _problem(tree, path, "link", "a link to nowhere, or in a circle")
        else:
            _problem(tree, path, "unreadable", error.strerror or type(error).__name__)
        return ""
    if stat.S_ISDIR(status.st_mode):
        return "link" if linked else "folder"
    if not stat.S_ISREG(status.st_mode):
        _problem(tree, path, "unreadable", "is a pipe, a device or a socket; expected a file.")
    elif linked:
        target = os.path.realpath(entry.path)
        tree.links[path] = ((status.st_size, status.st_mtime_ns), target)
    else:
        tree.files[path] = (status.st_size, status.st_mtime_ns)
        tree.real_files[os.path.join(real, entry.name)] = path
    return ""


def _is_link(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink()
    except OSError:
        return False


def _problem(tree: Tree, path: str, reason: str, detail: str) -> None:
    tree.problems.append(Problem.of(path, reason, detail))
