"""The columns that decisions are made from, and the reasons for what is left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Texts = NDArray[Any]

_KEY_DIGITS = 24
_EMBEDDING = pa.list_(pa.float32(), 512)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns decisions are made from; one row per face."""

    photo: Ints
    """Number of the photo, over all parts."""
    face: Ints
    sha256: Texts
    key: Texts
    """Unique among what may be kept: of the photo, or where each face counts of the face."""
    label: Texts
    name: Texts
    """The photo's name for people."""
    embedding: Floats
    """Unit length, ``[rows, 512]``."""
    phash: Texts
    quality: Doubles
    """Pixels, bytes, sharpness ``[rows, 3]``: of near-duplicates the one with most stays."""


class Reasons:
    """Why each row is left out; a row keeps its first reason."""

    def __init__(self, table: pa.Table) -> None:
        self.dropped = _text(table, "dropped")
        self.detail = _text(table, "detail")

    @property
    def open(self) -> Bools:
        """Rows not left out so far."""
        return cast(Bools, self.dropped == "")

    def drop(self, rows: Bools, reason: str, detail: str | Sequence[str]) -> None:
        """Leave rows out; ``detail`` is one text or one per row of ``rows``."""
        self.dropped[rows] = reason
        self.detail[rows] = detail if isinstance(detail, str) else np.array(detail, object)


def columns_of(table: pa.Table, *, every: bool = False) -> Columns:
    """Columns for decisions from a table of faces; rows without a face have embedding 0.

    ``every``: each face of a photo may be kept.
    """
    column = table["embedding"].combine_chunks().fill_null(pa.scalar([0.0] * 512, _EMBEDDING))
    raw = column.flatten().to_numpy().reshape(len(table), -1)
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    pixels = _number(table, "width") * _number(table, "height")
    face, sha256 = _number(table, "face").astype(np.int64), _text(table, "source_sha256")
    return Columns(
        photo=_number(table, "photo").astype(np.int64),
        face=face,
        sha256=sha256,
        key=_keys(sha256, face if every else np.zeros_like(face)),
        label=_text(table, "identity"),
        name=_text(table, "name"),
        embedding=(raw / np.maximum(length, 1e-12)).astype(np.float32),
        phash=_text(table, "phash"),
        quality=np.stack([pixels, _number(table, "length"), _number(table, "blur")], axis=1),
    )


def _text(table: pa.Table, name: str) -> Texts:
    values = table[name].fill_null("").to_numpy(zero_copy_only=False)
    return np.array(values, dtype=object)


def _number(table: pa.Table, name: str) -> Doubles:
    return cast(Doubles, table[name].fill_null(0).to_numpy().astype(np.float64))


def _keys(sha256: Texts, face: Ints) -> Texts:
    """The photo's hash; of its second face and later ones a hash of that and the number."""
    keys = [
        hashlib.sha256(f"{photo}:{number}".encode()).hexdigest() if number > 0 else str(photo)
        for photo, number in zip(sha256, face, strict=True)
    ]
    return np.array([key[:_KEY_DIGITS] for key in keys], dtype=object)


def rows_of_people(names: Texts, rows: Bools) -> Iterator[Ints]:
    """Row numbers of each person among ``rows``."""
    numbers = np.nonzero(rows)[0]
    if len(numbers):
        _, label = np.unique(names[numbers].astype(str), return_inverse=True)
        yield from (numbers[members] for members in rows_by(label))


def rows_by(label: NDArray[Any]) -> Iterator[Ints]:
    """Row numbers of each label, in the order of the labels."""
    order = np.argsort(label, kind="stable")
    bounds = np.nonzero(np.diff(label[order]))[0] + 1
    yield from (np.asarray(rows, np.int64) for rows in np.split(order, bounds) if len(rows))


def centroid(embedding: Floats) -> Floats:
    mean = embedding.mean(0)
    return cast(Floats, mean / max(float(np.linalg.norm(mean)), 1e-12))
