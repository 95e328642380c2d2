"""The bytes of a photo and what stands beside it, read without trust."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infinite_id_core.errors import FileError
from infinite_id_core.files.system import open_regular, reading

from ..texts import decode_text
from .folders import Problem, printable
from .parts import Blob, Source
from .photo import PhotoError

_SIDECAR_LIMIT = 2**20  # bytes of a caption or a JSON record
_DETAIL = 300  # characters of what a decoder says
_LETTERS = 2**14  # of one text; what is longer is no caption, no licence and no name
_LICENCE = ("licence", "license")
_READ = ("caption", "url", "source", *_LICENCE)


def read_blob(root: Path, blob: Blob, max_bytes: int) -> bytes:
    """The bytes of a blob. Raises ``PhotoError`` where they cannot be had or are too many."""
    try:
        path = root / blob.path
        with reading(path), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size if blob.size < 0 else blob.size
            if size > max_bytes:
                raise PhotoError("too_large", f"{size} bytes; at most {max_bytes} are read")
            file.seek(blob.offset)
            data = file.read(size)
    except FileError as error:
        raise PhotoError("unreadable", error.problem) from error
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


def read_sidecars(root: Path, source: Source, identity_field: str = "") -> Sidecars:
    """The JSON record and the caption of a photo. What cannot be read is empty, and a problem, as
    is a text of more than 16,384 letters.

    ``identity_field``: the record's entry that names the person, if one does.
    """
    record: dict[str, Any] = {}
    caption = ""
    problems = []
    if source.record:
        try:
            values = json.loads(_text_at(root, source.record))
            if not isinstance(values, dict):
                raise ValueError("is JSON and no object; expected {...}.")
            record = _lower(values)
        except (PhotoError, ValueError, RecursionError, MemoryError) as error:
            problems.append(_bad_sidecar(source, ".json", error))
    record_is_bad = bool(problems) or source.unread_record
    if source.unread_record:  # which may name another licence than the one that is read
        record = {name: value for name, value in record.items() if name not in _LICENCE}
    for name in _LICENCE:
        value = record.get(name)
        if value is not None and not (_is_text(value) and str(value).strip()):
            told = ValueError(f"{name!r} is {type(value).__name__}; expected text.")
            problems.append(_bad_sidecar(source, ".json", told))
            record_is_bad = True
    for name in {name: None for name in (*_READ, identity_field)}:
        if _is_too_long(record.get(name)):
            told = ValueError(f"{name!r} {_TOO_LONG}")
            problems.append(_bad_sidecar(source, ".json", told))
            record_is_bad = record_is_bad or name in _LICENCE
            del record[name]
    if source.caption:
        try:
            caption = _text_at(root, source.caption).strip()
            if _is_too_long(caption):
                caption = ""
                raise ValueError(_TOO_LONG)
        except (PhotoError, ValueError) as error:
            problems.append(_bad_sidecar(source, ".txt", error))
    return Sidecars(
        record=record,
        caption=printable(caption) or text_of(record, "caption"),
        record_is_bad=record_is_bad,
        problems=tuple(problems),
    )


def _lower(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the names that are read in small letters, as people also capitalise them."""
    small = {name.lower(): value for name, value in record.items() if name.lower() in _READ}
    return {**small, **record}


def _is_text(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


_TOO_LONG = f"has more than {_LETTERS} letters; it is not used."


def _is_too_long(value: object) -> bool:
    return isinstance(value, str) and len(value) > _LETTERS


def _text_at(root: Path, blob: Blob) -> str:
    return decode_text(read_blob(root, blob, _SIDECAR_LIMIT))


def _bad_sidecar(source: Source, kind: str, error: Exception) -> Problem:
    told = error.detail if isinstance(error, PhotoError) else str(error)
    what = "record" if kind == ".json" else "caption"
    return Problem.of(
        f"{os.path.splitext(source.name)[0]}{kind}",
        "bad_sidecar",
        f"the {what} of {source.name}: {told[:_DETAIL] or type(error).__name__}",
    )


def text_of(record: dict[str, Any], *names: str) -> str:
    """The first entry of a record that is text (or a number)."""
    for name in names:
        value = record.get(name)
        if _is_text(value) and str(value).strip():
            return printable(str(value).strip())
    return ""
