"""What the input holds: photos in folders or in tars, cut into parts of stable contents."""

from __future__ import annotations

import os
from pathlib import Path

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.pictures import SUFFIXES

from ..errors import InputKindError, UnreadableError
from .folder_sources import ARCHIVES, cut, is_photo, photo_by_name, photos_below
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
    if not root.is_dir():
        _check_shard(root)
    kind = options.kind if options.kind != "auto" else _kind_of(root)
    if kind == "webdataset":
        return Listing(kind=kind, parts=tuple(tar_parts(root)))
    if not root.is_dir():
        raise InputKindError(f"{root}: expected a folder of photos, found a file.")
    sources, problems, stats = photos_below(root, by_folder=kind == "folders")
    if not sources and all(problem.reason in NOT_PHOTOS for problem in problems):
        raise InputKindError(f"{root}: not one photo below it ({_suffixes()}).")
    return Listing(kind=kind, parts=tuple(cut(sources, problems, stats)))


def _check_shard(file: Path) -> None:
    """Raise ``InputKindError`` for a file that is plainly no tar, with what to do."""
    name = file.name.lower()
    if name.endswith(PACKED_TARS):
        advice = "it is compressed: unpack it first (gunzip, or what fits)"
    elif file.suffix.lower() in ARCHIVES - {".tar"}:
        advice = "unpack the archive first and give the folder"
    elif is_photo(file):
        advice = "a single photo trains nothing: give the folder that it lies in"
    else:
        return
    raise InputKindError(f"{file}: expected a folder of photos, or a .tar shard; {advice}.")


def _kind_of(root: Path) -> Kind:
    if root.is_file():
        return "webdataset"
    try:
        entries = sorted(e for e in root.iterdir() if not is_hidden(e.name))
        folders = [e for e in entries if e.is_dir()]
    except OSError as error:
        raise UnreadableError(root, f"cannot be listed ({error.strerror}).") from error
    names = [e.name.lower() for e in entries if e not in set(folders)]
    shards = any(name.endswith(".tar") for name in names)
    found: list[Kind] = []
    if shards:
        found.append("webdataset")
    if any(is_photo(e) for e in entries if e not in set(folders)):
        found.append("heap")
    # Beside shards a folder may be the log of the program that made them: its files decide.
    if any(_has_photos(folder) for folder in folders) if shards else folders:
        found.append("folders")
    if not found and any(name.endswith(PACKED_TARS) for name in names):
        return "webdataset"  # which names what to do
    if len(found) == 1:
        return found[0]
    first = [e.name for e in entries[:5]]
    choice = " or ".join(f"--kind {kind}" for kind in found)
    raise InputKindError(
        f"{root}: expected a folder for each person, or photos, or .tar shards; found "
        f"{' and '.join(_WORDS[kind] for kind in found) or 'none of them'} (first entries: "
        f"{first}). " + (f"Say which with {choice}." if found else f"Photos end in {_suffixes()}.")
    )


_WORDS = {"webdataset": ".tar shards", "heap": "photos", "folders": "folders"}


def _has_photos(folder: Path) -> bool:
    below = os.walk(folder)
    return any(
        photo_by_name(os.path.splitext(f)[1].lower()) for _, _, files in below for f in files
    )


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))
