"""Photos in folders, with the captions and records beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from infinite_id_core.errors import FileError
from infinite_id_core.files.pictures import HEAD, SUFFIXES, picture_format
from infinite_id_core.files.system import open_regular, reading

from .folders import Problem, Status, Tree, printable, walk
from .manifest import fingerprint_of
from .parts import Blob, Part, Source
from .sidecars import KINDS, Named, in_folders

ARCHIVES = {".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4"}
_NO_PHOTOS = {*KINDS, *ARCHIVES, ".npy", ".npz", ".cls", ".parquet", ".csv", ".md", ".html"}


def photos_below(
    root: Path, *, by_folder: bool
) -> tuple[list[Source], list[Problem], dict[str, Status]]:
    """All photos below ``root`` in the order of their names."""
    tree = walk(root)
    # What cannot be looked into is taken, so that reading it tells why.
    photos = links_of(tree, [p for p in tree.links if is_photo(root / p, True)])
    stats = {**tree.files, **{p: tree.links[p][0] for p in photos}}
    photos = sorted([*photos, *(p for p in tree.files if is_photo(root / p, True))])
    chosen = set(photos)
    others = sorted(p for p in tree.files if p not in chosen)
    sides = in_folders(
        (Named.of(p, n) for n, p in enumerate(photos)),
        (Named.of(p, n) for n, p in enumerate(others)),
    )
    used = {others[at] for own in sides.values() for at in own.values()}
    linked = [p for p in tree.links if p not in chosen]
    unread = in_folders(
        (Named.of(p, n) for n, p in enumerate(photos)),
        (Named.of(p) for p in [*(p for p in others if p not in used), *linked]),
    )
    problems = [
        *tree.problems,
        *(Problem.of(p, "other_file", _other(p, chosen)) for p in others if p not in used),
    ]
    sources = []
    for number, path in enumerate(photos):
        if by_folder and "/" not in path:
            problems.append(Problem.of(path, "no_person", "not in a person's folder"))
            continue
        record, caption = (sides[number].get(kind) for kind in KINDS)
        sources.append(
            Source(
                name=printable(path),
                photo=Blob(path=path),
                record=None if record is None else Blob(path=others[record]),
                caption=None if caption is None else Blob(path=others[caption]),
                identity=printable(path.split("/")[0]) if by_folder else "",
                unread_record=KINDS[0] in unread.get(number, {}),
            )
        )
    return sources, problems, stats


def links_of(tree: Tree, wanted: Sequence[str]) -> list[str]:
    """The links to follow, each target once; the others become problems of ``tree``."""
    followed: list[str] = []
    first = dict(tree.real_files)
    chosen = set(wanted)
    for path, (_, target) in tree.links.items():
        if path not in chosen:
            tree.problems.append(Problem.of(path, "link", "a link, and no photo; not followed"))
        elif target in first:
            detail = f"leads to {first[target]}, which is read already"
            tree.problems.append(Problem.of(path, "link", detail))
        else:
            first[target] = path
            followed.append(path)
    return followed


def _other(path: str, photos: Collection[str]) -> str:
    """Why a file that is no photo is not used."""
    suffix = Named.of(path).suffix
    if suffix in KINDS:
        if path.removesuffix(suffix) in photos:
            return "a second one for its photo; only one is read"
        return "no photo of this name is beside it"
    if suffix in ARCHIVES:
        return "an archive; unpack it first"
    return not_read(suffix)


_CAPTIONS = {".caption", ".cap", ".tags", ".text", ".md"}  # what other trainers call them


def not_read(suffix: str) -> str:
    """Why a file of this suffix is not read."""
    if suffix in _CAPTIONS:
        return f"a caption is read from NAME.txt; rename it from NAME{suffix}"
    return "no picture of a format that is read"


def cut(
    sources: Sequence[Source], problems: list[Problem], stats: dict[str, Status]
) -> Iterator[Part]:
    """Parts of the photos; the first one has the problems of the whole input."""
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
                values(own),
            ),
            sources=piece,
            problems=own,
        )


def values(problems: Sequence[Problem]) -> list[list[str]]:
    """Problems as plain values, for a fingerprint."""
    return [[p.name, p.reason, p.detail] for p in problems]


def is_photo(path: Path, unreadable: bool = False) -> bool:
    """By its name; where that says nothing, by its first bytes; ``unreadable`` where these cannot
    be had."""
    known = photo_by_name(path.suffix.lower())
    if known is not None:
        return known
    try:
        with reading(path), open_regular(path) as file:
            return has_mark(file.read(HEAD))
    except FileError:
        return unreadable


def photo_by_name(suffix: str) -> bool | None:
    """Whether a file of this suffix is taken for a photo; None: its first bytes must say."""
    return suffix in SUFFIXES if suffix in SUFFIXES or suffix in _NO_PHOTOS else None


def has_mark(head: bytes) -> bool:
    """Whether a file that starts like this is a picture."""
    # A file's first bytes may look like the header of a TGA by accident: its name must say so.
    return picture_format(head) not in (None, "TGA")
