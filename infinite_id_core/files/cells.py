"""Text of other people in tables: CSV that no spreadsheet computes, Markdown that stays text."""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

# What spreadsheets take for the start of a formula; the last four are the wide forms.
_FORMULA = tuple("=+-@\t\r\n") + ("\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_QUOTED = re.compile(r"'+(?:[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")
# Signs that mean something anywhere, or at a line's start, or (_) at a word's edge.
_MARKUP = re.compile(r"([\\`*\[\]|~]|^[#+-]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def csv_cell(value: object) -> str:
    """Text for a cell of a CSV file: what a spreadsheet would compute gets an apostrophe first.

    Numbers stay numbers. ``from_csv_cell`` takes the apostrophe off.
    """
    text = str(value)
    formula = text.startswith(_FORMULA) and not _NUMBER.fullmatch(text)
    return "'" + text if formula or _QUOTED.match(text) else text


def from_csv_cell(text: str) -> str:
    """What ``csv_cell`` was given."""
    return text[1:] if _QUOTED.match(text) else text


def markdown_cell(value: object) -> str:
    """Text for a line or a table's cell of Markdown: no markup, no HTML, one line."""
    line = " ".join(str(value).split())
    return _MARKUP.sub(r"\\\1", html.escape(line, quote=False))


def code_cell(value: object) -> str:
    """Text in a code span of Markdown: one line, and no end before its own."""
    return "`" + " ".join(str(value).split()).replace("`", "'").replace("|", "/") + "`"


def shown_path(path: str | Path, base: str | Path) -> str:
    """A path for a report: below ``base`` from there on, else its last two parts."""
    whole, start = Path(path).absolute(), Path(base).absolute()
    if whole.is_relative_to(start):
        return whole.relative_to(start).as_posix()
    return "/".join(whole.parts[1:][-2:])


def without_folders(text: str) -> str:
    """An option's text with absolute paths cut to their names: ``a=/home/me/x.bin`` to ``a=x.bin``.

    Paths end at a comma or an equals sign, as options with several parts are written.
    """
    return "".join(_named(piece) for piece in re.split(r"([,=])", text))


def _named(piece: str) -> str:
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(piece)
        if path.is_absolute() or piece.startswith(("~/", "~\\")):
            return path.name or piece
    return piece
