"""``index.parquet``: one row per photo, written last and read without trust.

The index is the commit point of a dataset: a folder that has one is whole. Rows of left-out
photos stay in it with the reason in ``dropped``; they have no shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infinite_id_core.errors import FileMissingError, NewerVersionError
from infinite_id_core.files.system import open_regular, reading

from .errors import DatasetError
from .shards import is_shard_name

INDEX = "index.parquet"
FORMAT = "infinite-id-dataset"
VERSION = 1
METADATA = b"infinite_id"
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
_FLOAT = pa.float32()
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # 24 hex digits, unique among kept photos
        ("shard", pa.string()),  # file name under shards/, null where dropped
        ("offset", pa.int64()),  # of the photo's bytes in the shard
        ("size", pa.int64()),
        ("face_offset", pa.int64()),  # of the embedding's .npy in the shard
        ("sha256", pa.string()),  # of the stored bytes
        ("source_sha256", pa.string()),  # of the bytes that came in
        ("identity", pa.string()),
        ("split", pa.string()),  # train or held_out, by a hash of the identity
        ("source", pa.string()),  # URL where known, else the path below the input folder
        ("licence", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),  # of the stored picture, upright
        ("height", pa.int32()),
        ("box", pa.list_(_FLOAT, 4)),  # x0 y0 x1 y1 in pixels of the stored picture
        ("landmarks", pa.list_(_FLOAT, 10)),  # x y of: two eyes, nose, two mouth corners
        ("det_score", _FLOAT),
        ("faces", pa.int32()),  # faces found in the photo
        ("face_size", _FLOAT),  # short side of the box, pixels
        ("face_share", _FLOAT),  # box area over picture area
        ("blur", _FLOAT),  # variance of the Laplacian on the aligned face: small is blurred
        ("yaw", _FLOAT),  # degrees, estimated from the landmarks
        ("pitch", _FLOAT),
        ("roll", _FLOAT),
        ("similarity", _FLOAT),  # cosine to the identity's centroid
        ("phash", pa.string()),  # 64-bit difference hash, 16 hex digits
        ("group", pa.string()),  # key of the photo that stands for this group of near-duplicates
        ("dropped", pa.string()),  # empty, or why the photo was left out
        ("detail", pa.string()),  # more about it, for people
    ]
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kept photo. Fields as in ``SCHEMA``."""

    key: str
    shard: str
    offset: int
    size: int
    face_offset: int
    sha256: str
    identity: str
    split: Split
    source: str
    licence: str
    caption: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    det_score: float
    faces: int
    face_size: float
    face_share: float
    blur: float
    yaw: float
    pitch: float
    roll: float
    similarity: float


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What a dataset says of itself."""

    recogniser: str
    """Which recogniser made the embeddings, e.g. ``buffalo_l/w600k_r50``; they are stored raw."""
    fingerprint: str
    """SHA-256 over keys, photos and identities of all kept rows, 64 hex digits."""
    counts: dict[str, int]
    """Photos by what became of them: ``kept`` and each reason of ``dropped``."""
    options: dict[str, Any]
    """The options of ``prepare``."""


def read_index(folder: str | Path) -> tuple[pa.Table, DatasetInfo]:
    """The whole index, dropped rows included, and what the dataset says of itself.

    Every row of a kept photo is checked: what it names lies in the dataset, and its numbers are
    possible. Raises ``DatasetError``, ``NewerVersionError``, ``UnreadableError``.
    """
    path = Path(folder) / INDEX
    try:
        with reading(path), open_regular(path) as file:
            table = _read_table(path, file)
    except FileMissingError as error:
        raise DatasetError(
            path, f"{error.problem} This is no prepared folder, or prepare did not finish. Run "
            "'python -m trainer prepare INPUT OUTPUT' (again: it goes on where it stopped)."
        ) from error  # fmt: skip
    info = _info(path, table)
    try:
        if table["dropped"].null_count:
            raise DatasetError(path, "does not say of every row whether it was left out (dropped).")
        _check_rows(path, table.filter(pc.equal(table["dropped"], "")))
    except (pa.ArrowException, ValueError) as error:
        raise DatasetError(path, f"has impossible rows ({_short(error)}).") from error
    return table, info


_ROW = 8  # bytes a row takes at the very least: it holds two hashes
_ROOM = 2**16  # bytes of an index that do not belong to rows
_RATIO = 1000  # a page that grows more than this is no index's
_TEXT = 2**20  # bytes of one text, a caption at most
_TEXTS = 2**31  # bytes of all texts of a column
_THRIFT = {"thrift_string_size_limit": 2**24, "thrift_container_size_limit": 2**20}


def _read_table(path: Path, file: BinaryIO) -> pa.Table:
    """The rows as ``SCHEMA``. Sizes are checked before anything is unpacked."""
    texts = [field.name for field in SCHEMA if field.type == pa.string()]
    try:
        known = pq.ParquetFile(file, **_THRIFT)
        _check_claims(path, known, os.fstat(file.fileno()).st_size)
        # Texts stay in their dictionaries: one long caption of a million rows is stored once.
        parquet = pq.ParquetFile(file, read_dictionary=texts, **_THRIFT)
        table = parquet.read()
        table.validate(full=True)
        for name in texts:
            _check_texts(path, name, table[name])
        return table.cast(SCHEMA).replace_schema_metadata(parquet.schema_arrow.metadata)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        # Arrow tells of a damaged file by an OSError, too; the system's have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DatasetError(path, f"is not a readable Parquet file ({_short(error)}).") from error


def _check_claims(path: Path, parquet: pq.ParquetFile, size: int) -> None:
    """What the file says of itself, before a page of it is unpacked."""
    schema, known = parquet.schema_arrow, parquet.metadata
    _metadata_version(path, schema.metadata or {})
    if schema.names != SCHEMA.names:
        raise DatasetError(path, f"has the columns {schema.names}; expected {SCHEMA.names}.")
    unpacked = sum(known.row_group(i).total_byte_size for i in range(known.num_row_groups))
    if known.num_rows * _ROW > size + _ROOM or unpacked > _RATIO * size + _ROOM:
        raise DatasetError(
            path, f"claims {known.num_rows} rows of {unpacked} bytes in a file of {size}. It is "
            "damaged, or made to fill the memory."
        )  # fmt: skip


def _check_texts(path: Path, name: str, column: pa.ChunkedArray) -> None:
    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
        if (pc.max(lengths).as_py() or 0) > _TEXT or total > _TEXTS:
            raise DatasetError(
                path, f"column {name} has texts of more than {_TEXT} bytes, or {_TEXTS} in all."
            )


def _metadata_version(path: Path, metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        values = json.loads(metadata.get(METADATA, b"{}"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DatasetError(path, f"is not an index of this project (format {FORMAT!r}).")
    version = values.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version < 2**31:
        raise DatasetError(path, f"version must be a whole number, found {str(version)[:40]!r}.")
    if version > VERSION:
        raise NewerVersionError(
            path, f"was written in version {version} of the format; this release reads up to "
            f"{VERSION}. Update Infinite-ID."
        )  # fmt: skip
    return values


def _info(path: Path, table: pa.Table) -> DatasetInfo:
    values = _metadata_version(path, table.schema.metadata)
    kinds = {"recogniser": str, "fingerprint": str, "counts": dict, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise DatasetError(path, f"says of itself no {name} (expected {kind.__name__}).")
    if not all(type(count) is int for count in values["counts"].values()):
        raise DatasetError(path, "says of itself counts that are no whole numbers.")
    return DatasetInfo(**{name: values[name] for name in kinds})


def _check_rows(path: Path, kept: pa.Table) -> None:
    """Raise ``DatasetError`` for the first column of kept photos with an impossible value."""

    def check(name: str, wanted: str, good: NDArray[np.bool_]) -> None:
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            value = repr(kept[name][row].as_py())[:100]
            raise DatasetError(path, f"row {row}: {name} is {value}; expected {wanted}.")

    def numbers(name: str) -> NDArray[Any]:
        return cast(NDArray[Any], kept[name].to_numpy())

    for field in fields(Row):
        check(field.name, "a value", pc.is_valid(kept[field.name]).to_numpy())
    names = {name: is_shard_name(name) for name in kept["shard"].unique().to_pylist()}
    check(
        "shard",
        "the plain name of a .tar file",
        np.array([names[name] for name in kept["shard"].to_pylist()], bool),
    )
    check("split", f"one of {SPLITS}", np.isin(kept["split"].to_pylist(), SPLITS))
    for name, least, most in _POSSIBLE:
        values = numbers(name)
        check(name, f"{least} to {most}", (values >= least) & (values <= most))
    for name, width in (("box", 4), ("landmarks", 10)):
        flat = kept[name].combine_chunks().flatten()
        good = pc.is_finite(flat).fill_null(False).to_numpy(zero_copy_only=False)
        check(name, f"{width} finite numbers", good.reshape(len(kept), width).all(1))
    _check_faces(kept, check)
    people = kept["identity"].to_numpy(zero_copy_only=False)
    if len(set(kept["key"].to_pylist())) < len(kept):
        raise DatasetError(path, "has two rows of one key.")
    sides = dict(zip(people, kept["split"].to_pylist(), strict=True))
    check("identity", "a name", np.array([bool(name) for name in people], bool))
    check(
        "split",
        "the same for all photos of a person",
        np.array([sides[p] for p in people]) == np.array(kept["split"].to_pylist()),
    )
    if len(people) and 1 + int((people[1:] != people[:-1]).sum()) != len(set(people)):
        raise DatasetError(path, "has people whose photos do not stand together.")


def _check_faces(kept: pa.Table, check: Callable[[str, str, NDArray[np.bool_]], None]) -> None:
    """Boxes and landmarks lie about the picture, and scores are numbers."""
    if not len(kept):
        return
    sides = np.stack([kept["width"].to_numpy(), kept["height"].to_numpy()], axis=1)
    box = kept["box"].combine_chunks().flatten().to_numpy().reshape(-1, 2, 2)
    points = kept["landmarks"].combine_chunks().flatten().to_numpy().reshape(-1, 5, 2)
    reach = 2.0 * sides[:, None, :]  # a face may reach out of its picture
    about = ((box >= -reach) & (box <= 2 * reach)).all((1, 2))
    check("box", "a place in its picture", about & (box[:, 0] < box[:, 1]).all(1))
    near = ((points >= -reach) & (points <= 2 * reach)).all((1, 2))
    apart = np.ptp(points, axis=1).max(1) > 0
    check("landmarks", "five places in its picture", near & apart)
    for name in _NUMBERS:
        check(name, "a finite number", np.isfinite(kept[name].to_numpy()))


_NUMBERS = ("det_score", "face_size", "face_share", "blur", "yaw", "pitch", "roll", "similarity")
_POSSIBLE: tuple[tuple[str, int, int], ...] = (
    ("offset", 0, 2**62),
    ("size", 1, 2**31),
    ("face_offset", 0, 2**62),
    ("width", 1, 2**24),
    ("height", 1, 2**24),
    ("faces", 1, 2**31),
)


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def write_index(path: Path, table: pa.Table, info: DatasetInfo) -> None:
    """Write rows of ``SCHEMA`` to ``path``; equal rows and info give equal bytes."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        **{f.name: getattr(info, f.name) for f in fields(info)},
    }
    text = json.dumps(values, sort_keys=True)
    pq.write_table(
        table.cast(SCHEMA).replace_schema_metadata({METADATA: text.encode()}),
        path,
        compression="zstd",
    )


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table of ``SCHEMA``; absent entries are null."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)
