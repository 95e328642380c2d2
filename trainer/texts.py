"""Text files as people's programs write them: with a mark, in UTF-16, in an 8-bit encoding."""

from __future__ import annotations

import re

_MARKS = (  # UTF-32's little-endian mark starts with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_PEEK = 4096  # bytes that tell UTF-16 without a mark


def decode_text(data: bytes) -> str:
    """A text file's contents without its mark (BOM).

    UTF-8, UTF-16 and UTF-32, with a mark or (UTF-8, UTF-16) without one; else Windows-1252, the
    8-bit encoding of western Europe, where the bytes look like it. Raises ``ValueError`` that
    says what to write instead.
    """
    text = _text_of(data)
    if _CONTROL.search(text):
        raise ValueError(f"holds control characters, so its encoding was not told. {_SAVE}")
    return text


def _text_of(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], encoding)
    wide = _wide_encoding(data[:_PEEK])
    if wide:
        return _decoded(data, wide)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _western(data)


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"starts as {encoding.upper()} text and is none. {_SAVE}") from error


def _wide_encoding(data: bytes) -> str:
    """UTF-16 without a mark: every other byte of plain letters is zero."""
    zeros, pairs = data.count(0), len(data) // 2
    if not pairs or zeros < pairs / 2:
        return ""
    high_first = data[0::2].count(0)
    if high_first == 0:
        return "utf-16-le"
    return "utf-16-be" if high_first == zeros else ""


def _western(data: bytes) -> str:
    """Windows-1252, where accented letters stand alone; other encodings have them in rows."""
    letters = _WESTERN_MARKS.sub(b" ", data)
    high = sum(byte >= 0x80 for byte in letters)
    rows = len(re.findall(rb"(?<=[\x80-\xff])[\x80-\xff]", letters))
    if b"\0" in data or rows > max(1, high // 4):
        raise ValueError(f"is neither UTF-8 nor UTF-16 nor Windows-1252 text. {_SAVE}")
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise ValueError(f"is neither UTF-8 nor UTF-16 nor Windows-1252 text. {_SAVE}") from error


# Dots, quotes, dashes, a fixed space, guillemets: beside letters in any text.
_WESTERN_MARKS = re.compile(rb"[\x85\x91-\x94\x96\x97\xa0\xa1\xab\xbb\xbf]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_SAVE = "Save it as UTF-8."
