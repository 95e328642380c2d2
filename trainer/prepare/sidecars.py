"""Which caption and which record belong to which photo, by their names."""

from __future__ import annotations

import os.path
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KINDS = (".json", ".txt")


@dataclass(frozen=True, kw_only=True)
class Named:
    """A file's or member's name, in parts."""

    folder: str
    base: str
    at: int = 0
    """Where it stands among all."""

    @classmethod
    def of(cls, path: str, at: int = 0) -> Named:
        """``path`` with ``/`` between its parts."""
        folder, _, base = path.removeprefix("./").rpartition("/")
        return cls(folder=folder, base=base, at=at)

    @property
    def suffix(self) -> str:
        """``.jpg`` of ``a.b.JPG``."""
        return os.path.splitext(self.base)[1].lower()

    @property
    def stem(self) -> str:
        """``x/a.b`` of ``x/a.b.jpg``."""
        return f"{self.folder}/{os.path.splitext(self.base)[0]}"

    @property
    def whole(self) -> str:
        """``x/a.b.jpg``: programs also write ``a.b.jpg.json``."""
        return f"{self.folder}/{self.base}"

    @property
    def sample(self) -> str:
        """``x/a`` of ``x/a.b.jpg``: what ``webdataset`` takes for the sample's name."""
        return f"{self.folder}/{self.base.partition('.')[0]}"


def in_folders(photos: Iterable[Named], others: Iterable[Named]) -> dict[int, dict[str, int]]:
    """The sidecars of each photo: ``{photo's at: {".json": at, ".txt": at}}``.

    ``a.json`` or ``a.jpg.json`` for ``a.jpg``. Capitals may differ where the name is nobody
    else's.
    """
    photos = list(photos)
    found: dict[int, dict[str, int]] = defaultdict(dict)
    left = [other for other in others if other.suffix in KINDS]
    for fold in (_same, _folded):
        known: dict[tuple[str, str], int] = {}
        for other in left:
            known.setdefault((fold(other.stem), other.suffix), other.at)
        used = set()
        for photo in photos:
            for kind in KINDS:
                for name in (photo.stem, photo.whole):
                    at = known.get((fold(name), kind))
                    if at is not None and kind not in found[photo.at]:
                        found[photo.at][kind] = at
                        used.add(at)
        left = [other for other in left if other.at not in used]
    return found


def _same(text: str) -> str:
    """macOS writes an accent as a letter of its own, others do not."""
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    return _same(text).casefold()


def in_tar(photos: Iterable[Named], others: Iterable[Named]) -> dict[int, dict[str, int]]:
    """As ``in_folders`` for a tar's members, ``at`` their place in it.

    A sidecar belongs to the photos of its own run of members of one sample: to that of its own
    name, or where it has the sample's name to all of them. Apart from its sample it belongs to
    the photo of its name where the tar has one such photo and one such sidecar.
    """
    photos = list(photos)
    sidecars = [other for other in others if other.suffix in KINDS]
    run_of = _runs([*photos, *sidecars])
    near: dict[tuple[int, str, str], int] = {}
    for other in sidecars:
        near.setdefault((run_of[other.at], other.stem.casefold(), other.suffix), other.at)
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for photo in photos:
        for kind in KINDS:
            for name in (photo.stem, photo.whole, photo.sample):
                at = near.get((run_of[photo.at], name.casefold(), kind))
                if at is not None and kind not in found[photo.at]:
                    found[photo.at][kind] = at
    used = {at for sides in found.values() for at in sides.values()}
    _join_apart(photos, [other for other in sidecars if other.at not in used], found)
    return found


def _runs(members: list[Named]) -> dict[int, int]:
    """The number of the run of one sample that each member stands in."""
    runs: dict[int, int] = {}
    number, sample, seen = 0, "", set[str]()
    for member in sorted(members, key=lambda member: member.at):
        if member.sample != sample or member.whole in seen:  # the same sample, written again
            number, sample, seen = number + 1, member.sample, set()
        seen.add(member.whole)
        runs[member.at] = number
    return runs


def _join_apart(
    photos: list[Named], left: list[Named], found: Mapping[int, dict[str, int]]
) -> None:
    by_name: dict[str, list[Named]] = defaultdict(list)
    for photo in photos:
        for name in {photo.stem, photo.whole}:
            by_name[name].append(photo)
    twice: dict[tuple[str, str], int] = defaultdict(int)
    for other in left:
        twice[other.stem, other.suffix] += 1
    for other in left:
        owners = by_name.get(other.stem, [])
        if len(owners) == 1 and twice[other.stem, other.suffix] == 1:
            found[owners[0].at].setdefault(other.suffix, other.at)
