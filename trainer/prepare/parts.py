"""The input in pieces: where each photo's bytes are, and what one task works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .folders import Problem
from .options import Kind

NOT_PHOTOS = frozenset({"hidden", "link", "other_file", "scattered", "bad_sidecar", "no_photos",
                        "not_a_shard", "shard_cut"})  # fmt: skip
"""Reasons of what is no photo, but came with them."""


def photos_left_out(counts: Mapping[str, int]) -> dict[str, int]:
    """Photos that are not used, by reason; ``counts`` as a dataset has them."""
    return {r: n for r, n in counts.items() if r != "kept" and r not in NOT_PHOTOS}


def files_not_used(counts: Mapping[str, int]) -> dict[str, int]:
    """What is no photo and is not used, by reason."""
    return {reason: n for reason, n in counts.items() if reason in NOT_PHOTOS}


@dataclass(frozen=True, kw_only=True)
class Blob:
    """Some bytes of the input: a file below it, or a piece of one."""

    path: str
    offset: int = 0
    size: int = -1
    """-1: to the end of the file."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One photo before it is read."""

    name: str
    """Unique, for people: the path below the input, for tars with the member's name."""
    photo: Blob
    record: Blob | None = None
    """Its JSON (url, licence, identity)."""
    caption: Blob | None = None
    identity: str = ""
    unread_record: bool = False
    """It has another record, which is not read: a second one, or a link."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one task works on."""

    number: int
    fingerprint: str
    sources: tuple[Source, ...] = ()
    problems: tuple[Problem, ...] = ()
    tar: str = ""
    """Instead of sources: a tar, which its task lists."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The whole input."""

    kind: Kind
    parts: tuple[Part, ...]

    @property
    def labelled(self) -> bool:
        """Whether folders say who is who."""
        return self.kind == "folders"
