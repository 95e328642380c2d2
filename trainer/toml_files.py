"""TOML as people write it: any text encoding, and Windows paths that TOML would read otherwise."""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.system import read_bytes
from infinite_id_core.packages import require

from .errors import ConfigSyntaxError
from .texts import decode_text

# A text in double quotes with a single backslash, as in "C:\data".
_PATH = re.compile(r'(?m)^[^#\n]*?"((?:[^"\\\n]|\\\\)*\\(?![\\"])[^"\n]*)"')
# ... that is a drive's, or starts no escape of TOML's.
_NO_ESCAPE = re.compile(r'[A-Za-z]:|(?:[^\\]|\\\\)*\\(?![\\"btnfre]|[uU][0-9A-Fa-f]{4})')
_LIMIT = 2**24  # bytes of a file
_CONTROL = re.compile("[\x00\b\t\f\r\x1b]")  # NUL, and what \b, \t, \f, \r and \e stand for
_ONE_WORD = re.compile(r"[^\s]+\n[^\s]+")  # of a path; texts of two lines have spaces
_DRIVE = re.compile(r"[A-Za-z]:[\x00-\x1f]")


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file, in UTF-8 or another encoding, with a mark (BOM) or without.

    Raises ``FileMissingError``, ``UnreadableError``, ``FileTooLargeError``,
    ``ConfigSyntaxError``, which for a Windows path says how to write it.
    """
    if not path.is_file():
        raise FileMissingError(path, "no such configuration file.")
    try:
        text = decode_text(read_bytes(path, _LIMIT))
    except ValueError as error:
        raise ConfigSyntaxError(f"{path}: {error}") from error
    return parse_toml(text.replace("\r\n", "\n"), str(path))


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """As ``read_toml`` for a text; ``source`` names it in messages."""
    try:
        values = cast(dict[str, Any], toml_module().loads(text))
    except (ValueError, RecursionError) as error:
        written = (found.group(1) for found in _PATH.finditer(text))
        advice = next((_advice(path) for path in written if _NO_ESCAPE.match(path)), "")
        problem = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ConfigSyntaxError(f"{source}: is not TOML ({problem}).{advice}") from error
    for place, value in _texts(values):
        if _CONTROL.search(value) or _DRIVE.match(value) or _ONE_WORD.fullmatch(value):
            raise ConfigSyntaxError(
                f"{source}: {place} holds a tab or another sign that no path has ({value!r})."
                + _advice(_as_written(value))
            )
    return values


def _texts(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{before}{key}.")
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str):
                yield f"{before}{key}", entry


def _as_written(value: str) -> str:
    """The text between the quotes that became ``value``."""
    return value.translate(
        {8: r"\b", 9: r"\t", 10: r"\n", 12: r"\f", 13: r"\r", 27: r"\e", 0x5C: r"\\"}
    )


def _advice(written: str) -> str:
    plain = written.replace("\\\\", "\\")
    return (
        " In double quotes a backslash starts a special sign. Write a Windows path in single "
        f"quotes, '{plain}', or with forward slashes, \"{plain.replace(chr(92), '/')}\"."
    )


def toml_module() -> types.ModuleType:
    """Python's reader of TOML. Raises ``MissingPackageError``."""
    if sys.version_info >= (3, 11):
        return importlib.import_module("tomllib")
    return require("tomli", "to read TOML with this version of Python", "tomli")
