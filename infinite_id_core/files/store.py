"""A folder of identities: saving under a name without losing what is there."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from ..errors import NameNotAllowedError, NameTakenError, OptionError, shown
from ..method.identity import Identity
from .identities import write_identity

IfExists = Literal["keep both", "overwrite", "error"]
IF_EXISTS: tuple[IfExists, ...] = get_args(IfExists)


def save_identity(
    identity: Identity, folder: str | Path, name: str, if_exists: IfExists = "keep both"
) -> Path:
    """Write ``<folder>/<name>.safetensors`` atomically and return its path.

    Where the name is taken: ``keep both`` appends a number, ``overwrite`` replaces the file,
    ``error`` raises ``NameTakenError``. Raises ``NameNotAllowedError`` for a name that is none.
    """
    if if_exists not in IF_EXISTS:
        raise OptionError(
            f"if_exists must be one of {', '.join(IF_EXISTS)}; got {shown(if_exists)}."
        )
    path = identity_path(folder, name)
    if if_exists == "overwrite":
        write_identity(path, _named(identity, path))
        return path
    # Another process may save under the same name at this moment: the file decides, not a look.
    for candidate in _names(path) if if_exists == "keep both" else [path]:
        if candidate.exists() and if_exists == "keep both":
            continue
        try:
            write_identity(candidate, _named(identity, candidate), exclusive=True)
            return candidate
        except NameTakenError:
            if if_exists == "error":
                raise
    raise AssertionError("unreachable: the numbers do not end")


def identity_path(folder: str | Path, name: str) -> Path:
    """The file of an identity by its name; the name never leaves ``folder``.

    Allowed: letters and digits of any script, spaces and ``-_.()+``, starting with a letter or
    digit, at most 100 characters and 200 bytes (file systems end at 255), not a name Windows
    reserves. Raises ``NameNotAllowedError``.
    """
    stem = unicodedata.normalize("NFC", name.strip().removesuffix(".safetensors"))
    # Letters of many scripts carry marks (category M), which \w leaves out.
    plain = all(c in " -_.()+" or unicodedata.category(c)[0] in "LMN" for c in stem)
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|(com|lpt)[\d¹²³])\s*(\..*)?", stem)
    fits = len(stem) <= 100 and len(stem.encode("utf-8", "replace")) <= 200
    if not (plain and fits and stem[:1].isalnum() and stem[-1] not in ". ") or reserved:
        raise NameNotAllowedError(
            "Expected a plain name such as 'anna' (at most 100 letters, digits, spaces, - _ . ( ) "
            f"+), got {shown(name)}. Folders are not part of the name."
        )
    return Path(folder) / f"{stem}.safetensors"


def _named(identity: Identity, path: Path) -> Identity:
    return replace(identity, name=path.stem)


def _names(path: Path) -> Iterator[Path]:
    """``path`` itself, then with the numbers from 2 on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem} {number}{path.suffix}")
