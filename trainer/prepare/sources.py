"""What the input holds: photos in folders or in tars, cut into parts of stable contents."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infinite_id_core.errors import FileMissingError

from ..errors import InputKindError, UnreadableError
from .manifest import fingerprint_of
from .options import Kind, PrepareOptions
from .photo import PhotoError

PHOTOS = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
          ".heic", ".heif"}  # fmt: skip
_SIDECAR_LIMIT = 2**20  # bytes of a caption or a JSON record


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Some bytes of the input: a file below it, or a piece of one."""

    path: str
    offset: int = 0
    size: int = -1
    """-1: to the end of the file."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One photo before it is read."""

    name: str
    """Unique, for people: the path below the input, for tars with the member's name."""
    photo: Blob
    record: Blob | None = None
    """Its JSON (url, licence, identity)."""
    caption: Blob | None = None
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something of the input that holds photos and cannot be read."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one task works on."""

    number: int
    fingerprint: str
    sources: tuple[Source, ...] = ()
    problems: tuple[Problem, ...] = ()
    tar: str = ""
    """Instead of sources: a tar, which its task lists."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The whole input."""

    kind: Kind
    parts: tuple[Part, ...]

    @property
    def labelled(self) -> bool:
        """Whether folders say who is who."""
        return self.kind == "folders"


def list_input(root: Path, options: PrepareOptions) -> Listing:
    """List the input and cut it into parts.

    Raises ``FileMissingError``, ``UnreadableError``, ``InputKindError``.
    """
    if not root.exists():
        raise FileMissingError(root, "no such folder.")
    kind = options.kind if options.kind != "auto" else _kind_of(root)
    if kind == "webdataset":
        return Listing(kind=kind, parts=tuple(_tar_parts(root)))
    if not root.is_dir():
        raise InputKindError(f"{root}: expected a folder of photos, found a file.")
    sources, problems, stats = _walk(root, by_folder=kind == "folders")
    if not sources and not problems:
        raise InputKindError(f"{root}: not one photo below it ({_suffixes()}).")
    return Listing(kind=kind, parts=tuple(_cut(sources, problems, stats)))


def _kind_of(root: Path) -> Kind:
    if root.is_file():
        return "webdataset"
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UnreadableError(root, f"cannot be listed ({error.strerror}).") from error
    files = [e for e in entries if not e.is_dir()]
    tars = any(e.suffix.lower() == ".tar" for e in files)
    photos = any(e.suffix.lower() in PHOTOS for e in files)
    folders = any(e.is_dir() and not e.name.startswith(".") for e in entries)
    found: list[Kind] = []
    if tars:
        found.append("webdataset")
    if photos:
        found.append("heap")
    if folders and not tars:
        found.append("folders")
    if len(found) == 1:
        return found[0]
    names = [e.name for e in entries[:5]]
    raise InputKindError(
        f"{root}: expected a folder per person, photos, or .tar shards; found "
        f"{' and '.join(found) or 'none of them'} (first entries: {names}). "
        + ("Say which with --kind." if found else f"Photos end in {_suffixes()}.")
    )


def _suffixes() -> str:
    return " ".join(sorted(PHOTOS))


# --- folders ---------------------------------------------------------------------------------

Stats = dict[str, tuple[int, int]]  # path -> size, mtime in ns


def _walk(root: Path, *, by_folder: bool) -> tuple[list[Source], list[Problem], Stats]:
    """All photos below ``root`` in the order of their names."""
    stats: Stats = {}
    problems: list[Problem] = []

    def unreadable(error: OSError) -> None:
        name = os.path.relpath(error.filename, root).replace(os.sep, "/")
        problems.append(
            Problem(name=printable(name), reason="unreadable", detail=str(error.strerror))
        )

    for folder, below, names in os.walk(root, onerror=unreadable, followlinks=False):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            try:
                status = os.stat(path)
                stats[relative] = (status.st_size, status.st_mtime_ns)
            except OSError:  # a broken link; reading it names the problem
                stats[relative] = (-1, 0)
    photos = sorted(p for p in stats if os.path.splitext(p)[1].lower() in PHOTOS)
    if by_folder:
        loose = [p for p in photos if "/" not in p]
        problems += [
            Problem(name=printable(p), reason="no_person", detail="not in a person's folder")
            for p in loose
        ]
        photos = [p for p in photos if "/" in p]
    return [_source(p, stats, by_folder) for p in photos], problems, stats


def _source(path: str, stats: Stats, by_folder: bool) -> Source:
    stem = os.path.splitext(path)[0]
    return Source(
        name=printable(path),
        photo=Blob(path=path),
        record=Blob(path=f"{stem}.json") if f"{stem}.json" in stats else None,
        caption=Blob(path=f"{stem}.txt") if f"{stem}.txt" in stats else None,
        identity=printable(path.split("/")[0]) if by_folder else "",
    )


def _cut(sources: Sequence[Source], problems: list[Problem], stats: Stats) -> Iterator[Part]:
    # Enough parts to keep workers busy, few enough to keep their bookkeeping small. The size
    # depends on the input only, so that another machine or engine makes the same parts.
    size = min(256, max(16, len(sources) // 64))
    for number, start in enumerate(range(0, max(1, len(sources)), size)):
        piece = tuple(sources[start : start + size])
        blobs = [b for s in piece for b in (s.photo, s.record, s.caption) if b]
        own = tuple(problems) if number == 0 else ()
        yield Part(
            number=number,
            fingerprint=fingerprint_of(
                [[printable(b.path), *stats[b.path]] for b in blobs],
                [s.identity for s in piece],
                [[p.name, p.reason, p.detail] for p in own],
            ),
            sources=piece,
            problems=own,
        )


# --- tars ------------------------------------------------------------------------------------


def _tar_parts(root: Path) -> Iterator[Part]:
    folder = root.parent if root.is_file() else root
    tars = [root] if root.is_file() else sorted(root.rglob("*.tar"))
    if not tars:
        raise InputKindError(f"{root}: expected .tar shards, found none.")
    for number, tar in enumerate(tars):
        status = tar.stat()
        name = tar.relative_to(folder).as_posix()
        yield Part(
            number=number,
            fingerprint=fingerprint_of(printable(name), status.st_size, status.st_mtime_ns),
            tar=name,
        )


def list_tar(root: Path, tar: str) -> tuple[list[Source], list[Problem]]:
    """The samples of one tar. A cut tar gives its whole samples and a problem."""
    members: list[tuple[str, int, int]] = []
    problems: list[Problem] = []

    def problem(reason: str, detail: str) -> None:
        problems.append(Problem(name=printable(tar), reason=reason, detail=detail))

    path = root / tar
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            try:
                for member in archive:
                    if member.isreg():
                        members.append((member.name, member.offset_data, member.size))
            except (tarfile.TarError, OSError) as error:
                problem("shard_cut", f"ends inside a member ({error}); the rest is lost")
            else:
                end = archive.offset
                if size < end + tarfile.BLOCKSIZE:
                    problem("shard_cut", "has no end-of-archive marker; photos may be missing")
    except (tarfile.TarError, EOFError) as error:
        problem("not_a_shard", f"is no plain tar ({error}); unpack .tar.gz first")
    except OSError as error:
        problem("unreadable", str(error.strerror))
    return list(_samples(tar, [m for m in members if m[1] + m[2] <= size])), problems


def _samples(tar: str, members: list[tuple[str, int, int]]) -> Iterator[Source]:
    """Consecutive members of one key make a sample, as in the ``webdataset`` library."""
    key, blobs = "", dict[str, Blob]()
    for name, offset, size in [*members, ("", 0, 0)]:
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if (folder + "/" + stem) != key:
            yield from _sample(tar, blobs)
            key, blobs = folder + "/" + stem, {}
        blobs[extension.lower()] = Blob(path=tar, offset=offset, size=size)
        if "." + extension.lower() in PHOTOS:
            blobs["photo"] = blobs[extension.lower()]
            blobs["name"] = Blob(path=name)


def _sample(tar: str, blobs: dict[str, Blob]) -> Iterator[Source]:
    if "photo" in blobs:
        yield Source(
            name=printable(f"{tar}/{blobs['name'].path}"),
            photo=blobs["photo"],
            record=blobs.get("json"),
            caption=blobs.get("txt"),
        )


# --- reading ---------------------------------------------------------------------------------


def read_blob(root: Path, blob: Blob, max_bytes: int) -> bytes:
    """The bytes of a blob. Raises ``PhotoError`` where they cannot be had or are too many."""
    path = root / blob.path
    try:
        size = path.stat().st_size if blob.size < 0 else blob.size
        if size > max_bytes:
            raise PhotoError("too_large", f"{size} bytes; at most {max_bytes} are read")
        with path.open("rb") as file:
            file.seek(blob.offset)
            data = file.read(size)
    except OSError as error:
        raise PhotoError("unreadable", str(error.strerror or error)) from error
    if len(data) != size:
        raise PhotoError("truncated", f"{len(data)} of {size} bytes")
    return data


def read_sidecars(root: Path, source: Source) -> tuple[dict[str, Any], str]:
    """The JSON record and the caption of a photo; what cannot be read is empty."""
    record: dict[str, Any] = {}
    caption = ""
    try:
        if source.record:
            values = json.loads(read_blob(root, source.record, _SIDECAR_LIMIT))
            record = values if isinstance(values, dict) else {}
        if source.caption:
            caption = read_blob(root, source.caption, _SIDECAR_LIMIT).decode(errors="replace")
    except (PhotoError, ValueError, RecursionError):
        pass
    caption = caption.strip() or text_of(record, "caption")
    return record, printable(caption)


def text_of(record: dict[str, Any], *names: str) -> str:
    """The first entry of a record that is text (or a number)."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return printable(str(value).strip())
    return ""


def printable(text: str) -> str:
    """Text that can be written as UTF-8: file names may hold any bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
