"""The members of a tar, told from its headers alone, in one pass and little memory.

Not ``tarfile``: it calls itself once for each long-name header in a row, takes quadratic time for
some pax headers and expands sparse maps, and a photo's shard may come from anybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

BLOCK = 512
MAX_MEMBERS = 2**21
MAX_NAME = 4096  # bytes, as file systems have it
MAX_NAMES = 2**28  # bytes of all names of one tar
_MAX_HEADER = 2**20  # bytes of one pax header
_PADDING = 2**20  # zeros after the end marker; another tar may follow

MemberKind = Literal["file", "folder", "link", "special", "sparse"]

_KINDS: dict[bytes, MemberKind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "link", b"2": "link", b"5": "folder",
    b"S": "sparse",
}  # fmt: skip
_WITHOUT_DATA = {b"1", b"2", b"3", b"4", b"5", b"6"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of a tar."""

    name: str
    """Any bytes: what is no UTF-8 stands as surrogates, as file names do."""
    kind: MemberKind
    offset: int
    """Of its data in the tar."""
    size: int


class TarError(Exception):
    """Where a tar ends being one. ``first``: nothing of it was a tar."""

    def __init__(self, problem: str, *, first: bool = False) -> None:
        super().__init__(problem)
        self.first = first


def read_members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The whole members of an open tar of ``size`` bytes, in order.

    Raises ``TarError`` after the last whole one where the tar is cut, damaged or too large.
    """
    at, names, count = 0, 0, 0
    extra = _Extra()
    while True:
        block = _block(file, at, size)
        if not block.strip(b"\0"):
            at = _after_zeros(file, at + BLOCK, size)
            if at < 0:
                return
            extra = _Extra()
            continue
        header = _Header.read(block, at)
        data, at = at + BLOCK, at + BLOCK
        if header.type in (b"L", b"K", b"x", b"X", b"g"):
            at = data + _padded(header.size)
            if at > size:
                raise _cut(size)
            extra.read(file, header, data)
            continue
        if header.type == b"S":
            data = at = _after_sparse_map(file, block, at, size)
        length = header.size if extra.size is None else extra.size
        if header.type not in _WITHOUT_DATA:
            at = data + _padded(length)
        if data + (length if header.type not in _WITHOUT_DATA else 0) > size:
            raise _cut(size)
        member = _member(header, extra, data, length)
        count, names = count + 1, names + len(member.name)
        if count > MAX_MEMBERS or names > MAX_NAMES:
            raise TarError(f"has more than {MAX_MEMBERS} members; the rest is not read. Split it.")
        yield member
        extra = _Extra()


@dataclass(frozen=True, kw_only=True)
class _Header:
    name: bytes
    type: bytes
    size: int

    @classmethod
    def read(cls, block: bytes, at: int) -> _Header:
        """Raises ``TarError`` for what is no header."""
        bare = block[:148] + b" " * 8 + block[156:]
        try:
            checksum, size = _number(block[148:156]), _number(block[124:136])
        except ValueError:
            checksum, size = -1, 0
        signed = sum(bare) - 256 * sum(byte >= 128 for byte in bare)
        if checksum not in (sum(bare), signed):
            where = "is no tar" if at == 0 else f"has no valid header at byte {at}; the rest is not"
            raise TarError(where if at == 0 else f"{where} read", first=at == 0)
        name = block[:100].partition(b"\0")[0]
        prefix = block[345:500].partition(b"\0")[0]
        if prefix and block[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        return cls(name=name, type=block[156:157], size=size)


class _Extra:
    """What the headers before a member say of it."""

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.sparse = False

    def read(self, file: BinaryIO, header: _Header, data: int) -> None:
        """Take the contents of a long-name or pax header. Raises ``TarError``."""
        if header.type in (b"K", b"g"):  # a link's target; what holds for all members
            return
        if header.size > _MAX_HEADER:
            raise TarError(f"has a header of {header.size} bytes; the rest is not read")
        file.seek(data)
        content = file.read(header.size)
        if header.type == b"L":
            self.name = content.partition(b"\0")[0]
            return
        for key, value in _pax(content):
            if key == b"path":
                self.name = value.partition(b"\0")[0]
            elif key == b"size" and value.isdigit() and len(value) < 20:
                self.size = int(value)
            elif key.startswith(b"GNU.sparse."):
                self.sparse = True


def _pax(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Records ``LENGTH KEY=VALUE\\n``, up to the first that is none."""
    at = 0
    while at < len(content):
        space = content.find(b" ", at, at + 20)
        digits = content[at:space] if space > at else b""
        length = int(digits) if digits.isdigit() else 0
        if space < 0 or at + length > len(content) or at + length <= space + 1:
            return
        key, _, value = content[space + 1 : at + length - 1].partition(b"=")
        yield key, value
        at += length


def _member(header: _Header, extra: _Extra, data: int, length: int) -> Member:
    raw = header.name if extra.name is None else extra.name
    kind: MemberKind = _KINDS.get(header.type, "special")
    if extra.sparse and kind == "file":
        kind = "sparse"
    if kind == "file" and raw.endswith(b"/"):  # how the oldest tars mark a folder
        kind = "folder"
    if len(raw) > MAX_NAME:
        raw, kind = raw[:200] + b"...", "special"
    name = raw.decode("utf-8", "surrogateescape")
    return Member(name=name, kind=kind, offset=data, size=length)


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary for large numbers. Raises ``ValueError``."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(field)
    return int(digits or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _block(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(min(at, size))
    block = file.read(BLOCK)
    if len(block) == BLOCK:
        return block
    if at == 0:
        raise TarError(f"is no tar: it has {size} bytes", first=True)
    if not block:
        raise TarError("has no end-of-archive marker; photos may be missing")
    raise _cut(size)


def _cut(size: int) -> TarError:
    return TarError(f"ends inside a member, at byte {size}; the rest is lost")


def _after_zeros(file: BinaryIO, at: int, size: int) -> int:
    """Where another tar follows the end marker; -1: nowhere."""
    file.seek(at)
    rest = file.read(min(_PADDING, max(0, size - at)))
    zeros = len(rest) - len(rest.lstrip(b"\0"))
    return -1 if zeros == len(rest) else at + zeros // BLOCK * BLOCK


def _after_sparse_map(file: BinaryIO, block: bytes, at: int, size: int) -> int:
    """Past the blocks that go on with an old GNU sparse map."""
    more = block[482]
    while more:
        if at + BLOCK > size:
            raise _cut(size)
        more = _block(file, at, size)[504]
        at += BLOCK
    return at
