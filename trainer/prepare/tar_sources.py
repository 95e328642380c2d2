"""Photos in tars, with the captions and records that belong to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from infinite_id_core.errors import FileError
from infinite_id_core.files.pictures import HEAD
from infinite_id_core.files.system import open_regular, reading

from ..errors import InputKindError
from ..tars import Member, TarError, read_members
from .folder_sources import has_mark, links_of, not_read, photo_by_name, values
from .folders import MAX_NAME, Problem, Status, is_hidden, printable, walk
from .manifest import fingerprint_of
from .parts import Blob, Part, Source
from .sidecars import KINDS, Named, in_tar

PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


def tar_parts(root: Path) -> Iterator[Part]:
    """A part for each tar below ``root``, or for ``root``. Raises ``InputKindError`` for none."""
    if root.is_file():
        status = root.stat()
        found, problems = {root.name: (status.st_size, status.st_mtime_ns)}, list[Problem]()
    else:
        found, problems = _tars_below(root)
    if not found:
        packed = [p.name for p in problems if p.name.lower().endswith(PACKED_TARS)]
        raise InputKindError(
            f"{root}: expected .tar shards, found none."
            + (f" {packed[0]} is compressed: unpack it first (gunzip)." if packed else "")
        )
    for number, (name, status_of) in enumerate(sorted(found.items())):
        own = tuple(problems) if number == 0 else ()
        yield Part(
            number=number,
            fingerprint=fingerprint_of(printable(name), *status_of, values(own)),
            tar=name,
            problems=own,
        )


def _tars_below(root: Path) -> tuple[dict[str, Status], list[Problem]]:
    """The shards below a folder, and everything else there."""
    tree = walk(root)
    links = links_of(tree, [p for p in tree.links if p.lower().endswith(".tar")])
    tars = {p: status for p, status in tree.files.items() if p.lower().endswith(".tar")}
    problems = list(tree.problems)
    for path in sorted(tree.files.keys() - tars.keys()):
        if path.lower().endswith(PACKED_TARS):
            problems.append(Problem.of(path, "not_a_shard", "compressed; unpack it first (gunzip)"))
        else:
            problems.append(Problem.of(path, "other_file", "beside the shards; no shard itself"))
    return {**tars, **{p: tree.links[p][0] for p in links}}, problems


def list_tar(root: Path, tar: str) -> tuple[list[Source], list[Problem]]:
    """The photos of one tar, and every member that is none and belongs to none.

    A cut tar gives its whole members and a problem.
    """
    found = _Members(tar)
    try:
        with reading(root / tar), open_regular(root / tar) as file:
            found.read(file)
    except FileError as error:
        return [], [*found.problems, Problem.of(tar, "unreadable", error.problem)]
    sides = in_tar(found.photos, found.others)
    used = {at for own in sides.values() for at in own.values()}
    for other in found.others:
        if other.at not in used:
            found.problem(found.members[other.at], *_scattered(other))
    return [found.source(photo, sides[photo.at]) for photo in found.photos], found.problems


class _Members:
    """What the members of one tar are."""

    def __init__(self, tar: str) -> None:
        self.tar = tar
        self.members: list[Member] = []
        self.photos: list[Named] = []
        self.others: list[Named] = []
        self.problems: list[Problem] = []

    def read(self, file: BinaryIO) -> None:
        """Take all members up to the end, or to where it is no tar any more."""
        try:
            for member in read_members(file, os.fstat(file.fileno()).st_size):
                self._take(file, member)
        except TarError as error:
            reason = "not_a_shard" if error.first else "shard_cut"
            self.problems.append(Problem.of(self.tar, reason, str(error)))
            return
        if not self.photos:
            self.problems.append(Problem.of(self.tar, "no_photos", _holds(self.members)))

    def _take(self, file: BinaryIO, member: Member) -> None:
        unused = _unused(member)
        if unused is not None:
            self.problem(member, *unused)
        elif member.kind != "folder":
            named = Named.of(member.name, len(self.members))
            (self.photos if _is_photo(file, named, member) else self.others).append(named)
            self.members.append(member)

    def problem(self, member: Member, reason: str, detail: str) -> None:
        """Count a member that is not used."""
        self.problems.append(Problem.of(f"{self.tar}/{member.name}", reason, detail))

    def source(self, photo: Named, sides: Mapping[str, int]) -> Source:
        """A photo with its sidecars, which are given by their places."""
        record, caption = (sides.get(kind) for kind in KINDS)
        return Source(
            name=printable(f"{self.tar}/{self.members[photo.at].name}"),
            photo=self._blob(photo.at),
            record=None if record is None else self._blob(record),
            caption=None if caption is None else self._blob(caption),
        )

    def _blob(self, at: int) -> Blob:
        member = self.members[at]
        return Blob(path=self.tar, offset=member.offset, size=member.size)


def _unused(member: Member) -> tuple[str, str] | None:
    """Why a member that is no folder is not looked at; None for one that is."""
    if member.kind == "folder":
        return None
    if any(is_hidden(part) for part in member.name.split("/") if part not in (".", "..")):
        return "hidden", "hidden, or made by the system"
    if len(member.name) > MAX_NAME:
        return "unreadable", f"a name of {len(member.name)} letters; at most {MAX_NAME} are taken"
    if member.kind == "link":
        return "link", "a link inside a tar; not followed"
    if member.kind == "sparse":
        return "unreadable", "a sparse file; pack it without --sparse"
    return None if member.kind == "file" else ("unreadable", "no regular file")


def _is_photo(file: BinaryIO, named: Named, member: Member) -> bool:
    known = photo_by_name(named.suffix)
    if known is not None:
        return known
    file.seek(member.offset)
    return has_mark(file.read(min(HEAD, member.size)))


def _holds(members: Sequence[Member]) -> str:
    names = ", ".join(printable(member.name) for member in members[:3])
    return f"{len(members)} members and no photo ({names} ...)" if members else "it is empty"


def _scattered(named: Named) -> tuple[str, str]:
    if named.suffix in KINDS:
        return "scattered", "apart from its photo, or of none; a sample's members stand together"
    return "other_file", not_read(named.suffix)
