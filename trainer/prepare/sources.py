"""What the input holds: photos in folders or in tars, cut into parts of stable contents."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.pictures import HEAD, SUFFIXES, picture_format

from ..errors import InputKindError, UnreadableError
from ..texts import decode_text
from .folders import Problem, Status, Tree, is_hidden, walk
from .manifest import fingerprint_of
from .options import Kind, PrepareOptions
from .photo import PhotoError
from .plain_files import open_regular
from .sidecars import KINDS, Named, in_folders, in_tar
from .tars import Member, TarError, read_members

NOT_PHOTOS = frozenset({"hidden", "link", "other_file", "scattered", "bad_sidecar", "no_photos",
                        "not_a_shard", "shard_cut"})  # fmt: skip
"""Reasons of what is no photo, but came with them."""

_SIDECAR_LIMIT = 2**20  # bytes of a caption or a JSON record
_DETAIL = 300  # characters of what a decoder says
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_ARCHIVES = {".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4"}
_NO_PHOTOS = {*KINDS, *_ARCHIVES, ".npy", ".npz", ".cls", ".parquet", ".csv", ".md", ".html"}


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
    sources, problems, stats = _photos_below(root, by_folder=kind == "folders")
    if not sources and all(problem.reason in NOT_PHOTOS for problem in problems):
        raise InputKindError(f"{root}: not one photo below it ({_suffixes()}).")
    return Listing(kind=kind, parts=tuple(_cut(sources, problems, stats)))


def _kind_of(root: Path) -> Kind:
    if root.is_file():
        return "webdataset"
    try:
        entries = sorted(e for e in root.iterdir() if not is_hidden(e.name))
        files = [e for e in entries if not e.is_dir()]
    except OSError as error:
        raise UnreadableError(root, f"cannot be listed ({error.strerror}).") from error
    tars = any(e.name.lower().endswith((".tar", *_PACKED_TARS)) for e in files)
    photos = any(_is_photo(e) for e in files)
    folders = len(files) < len(entries)
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
    return " ".join(sorted(SUFFIXES))


def _is_photo(path: Path) -> bool:
    """By its name; where that says nothing, by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or suffix in _NO_PHOTOS:
        return suffix in SUFFIXES
    try:
        with open_regular(path) as file:
            return _has_mark(file.read(HEAD))
    except OSError:
        return False


def _has_mark(head: bytes) -> bool:
    # A file's first bytes may look like the header of a TGA by accident: its name must say so.
    return picture_format(head) not in (None, "TGA")


# --- folders ---------------------------------------------------------------------------------


def _photos_below(
    root: Path, *, by_folder: bool
) -> tuple[list[Source], list[Problem], dict[str, Status]]:
    """All photos below ``root`` in the order of their names."""
    tree = walk(root)
    photos = _links_of(tree, [p for p in tree.links if _is_photo(root / p)])
    stats = {**tree.files, **{p: tree.links[p][0] for p in photos}}
    photos = sorted([*photos, *(p for p in tree.files if _is_photo(root / p))])
    chosen = set(photos)
    others = sorted(p for p in tree.files if p not in chosen)
    sides = in_folders(
        (Named.of(p, n) for n, p in enumerate(photos)),
        (Named.of(p, n) for n, p in enumerate(others)),
    )
    used = {others[at] for own in sides.values() for at in own.values()}
    problems = [
        *tree.problems,
        *(_problem(p, "other_file", _other(p)) for p in others if p not in used),
    ]
    sources = []
    for number, path in enumerate(photos):
        if by_folder and "/" not in path:
            problems.append(_problem(path, "no_person", "not in a person's folder"))
            continue
        record, caption = (sides[number].get(kind) for kind in KINDS)
        sources.append(
            Source(
                name=printable(path),
                photo=Blob(path=path),
                record=None if record is None else Blob(path=others[record]),
                caption=None if caption is None else Blob(path=others[caption]),
                identity=printable(path.split("/")[0]) if by_folder else "",
            )
        )
    return sources, [_problem(p.name, p.reason, p.detail) for p in problems], stats


def _links_of(tree: Tree, wanted: Sequence[str]) -> list[str]:
    """The links to follow, each target once; the others become problems of ``tree``."""
    followed: list[str] = []
    first = dict(tree.real_files)
    chosen = set(wanted)
    for path, (_, target) in tree.links.items():
        if path not in chosen:
            tree.problems.append(_problem(path, "link", "a link, and no photo; not followed"))
        elif target in first:
            detail = f"leads to {first[target]}, which is read already"
            tree.problems.append(_problem(path, "link", detail))
        else:
            first[target] = path
            followed.append(path)
    return followed


def _problem(name: str, reason: str, detail: str) -> Problem:
    return Problem(name=printable(name), reason=reason, detail=printable(detail))


def _other(path: str) -> str:
    """Why a file that is no photo is not used."""
    suffix = Named.of(path).suffix
    if suffix in KINDS:
        return "no photo of this name is beside it"
    if suffix in _ARCHIVES:
        return "an archive; unpack it first"
    return "no picture of a format that is read"


def _cut(
    sources: Sequence[Source], problems: list[Problem], stats: dict[str, Status]
) -> Iterator[Part]:
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
                _values(own),
            ),
            sources=piece,
            problems=own,
        )


def _values(problems: Sequence[Problem]) -> list[list[str]]:
    return [[p.name, p.reason, p.detail] for p in problems]


# --- tars ------------------------------------------------------------------------------------


def _tar_parts(root: Path) -> Iterator[Part]:
    if root.is_file():
        status = root.stat()
        found, problems = {root.name: (status.st_size, status.st_mtime_ns)}, list[Problem]()
    else:
        found, problems = _tars_below(root)
    if not found:
        packed = [p.name for p in problems if p.name.lower().endswith(_PACKED_TARS)]
        raise InputKindError(
            f"{root}: expected .tar shards, found none."
            + (f" {packed[0]} is compressed: unpack it first (gunzip)." if packed else "")
        )
    for number, (name, status_of) in enumerate(sorted(found.items())):
        own = tuple(problems) if number == 0 else ()
        yield Part(
            number=number,
            fingerprint=fingerprint_of(printable(name), *status_of, _values(own)),
            tar=name,
            problems=own,
        )


def _tars_below(root: Path) -> tuple[dict[str, Status], list[Problem]]:
    """The shards below a folder, and everything else there."""
    tree = walk(root)
    links = _links_of(tree, [p for p in tree.links if p.lower().endswith(".tar")])
    tars = {p: status for p, status in tree.files.items() if p.lower().endswith(".tar")}
    problems = list(tree.problems)
    for path in sorted(tree.files.keys() - tars.keys()):
        if path.lower().endswith(_PACKED_TARS):
            problems.append(_problem(path, "not_a_shard", "compressed; unpack it first (gunzip)"))
        else:
            problems.append(_problem(path, "other_file", "beside the shards; no shard itself"))
    return {**tars, **{p: tree.links[p][0] for p in links}}, problems


def list_tar(root: Path, tar: str) -> tuple[list[Source], list[Problem]]:
    """The photos of one tar, and every member that is none and belongs to none.

    A cut tar gives its whole members and a problem.
    """
    members: list[Member] = []
    photos: list[Named] = []
    others: list[Named] = []
    problems: list[Problem] = []
    try:
        with open_regular(root / tar) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                for member in read_members(file, size):
                    detail = _unused(member)
                    if detail is not None:
                        problems += [_problem(f"{tar}/{member.name}", *detail)] if detail else []
                        continue
                    named = Named.of(member.name, len(members))
                    (photos if _is_photo_member(file, named, member) else others).append(named)
                    members.append(member)
            except TarError as error:
                problems.append(
                    _problem(tar, "not_a_shard" if error.first else "shard_cut", str(error))
                )
    except OSError as error:
        problems.append(_problem(tar, "unreadable", error.strerror or type(error).__name__))
        return [], problems
    if not photos and not any(p.reason in ("not_a_shard", "shard_cut") for p in problems):
        problems.append(_problem(tar, "no_photos", _holds(members)))
    sides = in_tar(photos, others)
    used = {at for own in sides.values() for at in own.values()}
    problems += [
        _problem(f"{tar}/{members[o.at].name}", *_scattered(o)) for o in others if o.at not in used
    ]

    def blob(at: int | None) -> Blob | None:
        if at is None:
            return None
        return Blob(path=tar, offset=members[at].offset, size=members[at].size)

    sources = [
        Source(
            name=printable(f"{tar}/{members[photo.at].name}"),
            photo=Blob(path=tar, offset=members[photo.at].offset, size=members[photo.at].size),
            record=blob(sides[photo.at].get(".json")),
            caption=blob(sides[photo.at].get(".txt")),
        )
        for photo in photos
    ]
    return sources, problems


def _unused(member: Member) -> tuple[str, str] | tuple[()] | None:
    """Why a member is not looked at; empty for a folder, None for one that is."""
    if member.kind == "folder":
        return ()
    if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..")):
        return "hidden", "hidden, or made by the system"
    if member.kind == "link":
        return "link", "a link inside a tar; not followed"
    if member.kind != "file":
        return "unreadable", "a sparse file; pack it without --sparse" if (
            member.kind == "sparse"
        ) else "no regular file"  # fmt: skip
    return None


def _is_photo_member(file: BinaryIO, named: Named, member: Member) -> bool:
    if named.suffix in SUFFIXES or named.suffix in _NO_PHOTOS:
        return named.suffix in SUFFIXES
    file.seek(member.offset)
    return _has_mark(file.read(min(HEAD, member.size)))


def _holds(members: Sequence[Member]) -> str:
    names = ", ".join(printable(member.name) for member in members[:3])
    return f"{len(members)} members and no photo ({names} ...)" if members else "it is empty"


def _scattered(named: Named) -> tuple[str, str]:
    if named.suffix in KINDS:
        return "scattered", "apart from its photo, or of none; a sample's members stand together"
    return "other_file", "no picture of a format that is read"


# --- reading ---------------------------------------------------------------------------------


def read_blob(root: Path, blob: Blob, max_bytes: int) -> bytes:
    """The bytes of a blob. Raises ``PhotoError`` where they cannot be had or are too many."""
    try:
        with open_regular(root / blob.path) as file:
            size = os.fstat(file.fileno()).st_size if blob.size < 0 else blob.size
            if size > max_bytes:
                raise PhotoError("too_large", f"{size} bytes; at most {max_bytes} are read")
            file.seek(blob.offset)
            data = file.read(size)
    except OSError as error:
        raise PhotoError("unreadable", error.strerror or type(error).__name__) from error
    if len(data) != size:
        raise PhotoError("truncated", f"{len(data)} of {size} bytes")
    return data


@dataclass(frozen=True, kw_only=True)
class Sidecars:
    """What stands beside a photo."""

    record: dict[str, Any]
    caption: str
    record_is_bad: bool
    """It has a record that cannot be read: its licence is unknown, not absent."""
    problems: tuple[Problem, ...]


def read_sidecars(root: Path, source: Source) -> Sidecars:
    """The JSON record and the caption of a photo. What cannot be read is empty, and a problem."""
    record: dict[str, Any] = {}
    caption = ""
    problems = []
    if source.record:
        try:
            values = json.loads(_text_at(root, source.record))
            if not isinstance(values, dict):
                raise ValueError("is JSON and no object; expected {...}.")
            record = values
        except (PhotoError, ValueError, RecursionError, MemoryError) as error:
            problems.append(_bad_sidecar(source, ".json", error))
    record_is_bad = bool(problems)
    if source.caption:
        try:
            caption = _text_at(root, source.caption)
        except (PhotoError, ValueError) as error:
            problems.append(_bad_sidecar(source, ".txt", error))
    return Sidecars(
        record=record,
        caption=printable(caption.strip()) or text_of(record, "caption"),
        record_is_bad=record_is_bad,
        problems=tuple(problems),
    )


def _text_at(root: Path, blob: Blob) -> str:
    return decode_text(read_blob(root, blob, _SIDECAR_LIMIT))


def _bad_sidecar(source: Source, kind: str, error: Exception) -> Problem:
    told = error.detail if isinstance(error, PhotoError) else str(error)
    what = "record" if kind == ".json" else "caption"
    return _problem(
        f"{os.path.splitext(source.name)[0]}{kind}",
        "bad_sidecar",
        f"the {what} of {source.name}: {told[:_DETAIL] or type(error).__name__}",
    )


def text_of(record: dict[str, Any], *names: str) -> str:
    """The first entry of a record that is text (or a number)."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return printable(str(value).strip())
    return ""


_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def printable(text: str) -> str:
    """Text that can be written as UTF-8: file names may hold any bytes, JSON half letters."""
    whole = _LONE.sub("\ufffd", text)
    return whole.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
