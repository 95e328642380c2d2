"""What the input holds: photos in folders or in tars, cut into parts of stable contents."""

from __future__ import annotations

from pathlib import Path

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.pictures import SUFFIXES

from ..errors import InputKindError, UnreadableError
from .folder_sources import cut, is_photo, photos_below
from .folders import is_hidden
from .options import Kind, PrepareOptions
from .parts import NOT_PHOTOS, Listing
from .tar_sources import PACKED_TARS, tar_parts


def list_input(root: Path, options: PrepareOptions) -> Listing:
    """List the input and cut it into parts.

    Raises ``FileMissingError``, ``UnreadableError``, ``InputKindError``.
    """
    if not root.exists():
        raise FileMissingError(root, "no such folder.")
    kind = options.kind if options.kind != "auto" else _kind_of(root)
    if kind == "webdataset":
        return Listing(kind=kind, parts=tuple(tar_parts(root)))
    if not root.is_dir():
        raise InputKindError(f"{root}: expected a folder of photos, found a file.")
    sources, problems, stats = photos_below(root, by_folder=kind == "folders")
    if not sources and all(problem.reason in NOT_PHOTOS for problem in problems):
        raise InputKindError(f"{root}: not one photo below it ({_suffixes()}).")
    return Listing(kind=kind, parts=tuple(cut(sources, problems, stats)))


def _kind_of(root: Path) -> Kind:
    if root.is_file():
        return "webdataset"
    try:
        entries = sorted(e for e in root.iterdir() if not is_hidden(e.name))
        files = [e for e in entries if not e.is_dir()]
    except OSError as error:
        raise UnreadableError(root, f"cannot be listed ({error.strerror}).") from error
    tars = any(e.name.lower().endswith((".tar", *PACKED_TARS)) for e in files)
    photos = any(is_photo(e) for e in files)
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
