"""The people to paint or to compare with: a folder of reference photos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.pictures import SUFFIXES

from ..errors import NoPicturesError, UnreadableError
from ..prepare.folders import is_hidden


@dataclass(frozen=True, kw_only=True)
class Person:
    """One person's photos; the first is the reference."""

    name: str
    photos: tuple[Path, ...]


def read_people(folder: Path) -> list[Person]:
    """A subfolder is a person with its photos in the order of their names; a photo directly in
    the folder is a person of its own.

    Raises ``FileMissingError``, ``NoPicturesError``, ``UnreadableError``.
    """
    if not folder.is_dir():
        raise FileMissingError(folder, "no such folder of reference photos.")
    try:
        people = [person for entry in sorted(folder.iterdir()) for person in _person(entry)]
    except OSError as error:
        raise UnreadableError(
            error.filename or folder, f"cannot be listed ({error.strerror})."
        ) from error
    if not people:
        raise NoPicturesError(
            f"{folder} holds no photo ({', '.join(sorted(SUFFIXES))}). Put photos there, or a "
            "subfolder with photos for each person."
        )
    return people


def _person(entry: Path) -> Iterator[Person]:
    """Nobody, or the person of one entry of the folder."""
    if entry.is_dir() and not is_hidden(entry.name):
        photos = tuple(sorted(p for p in entry.iterdir() if _is_photo(p)))
        if photos:
            yield Person(name=entry.name, photos=photos)
    elif _is_photo(entry):
        yield Person(name=entry.stem, photos=(entry,))


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not is_hidden(path.name) and path.is_file()
