"""``index.parquet``: one row per photo, and the filters that act when it is read.

The index is the commit point of a dataset: it is written last, so a folder that has one is whole.
Rows of left-out photos stay in it with the reason in ``dropped``; they have no shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from infinite_id_core.errors import FileMissingError, NewerVersionError, OptionError
from infinite_id_core.files.system import open_regular, reading

from .errors import DatasetError, FilterError
from .shards import Embedding, ShardReader, decode_photo, is_shard_name

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


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which photos and pairs are used. Raises ``OptionError`` for impossible values.

    Defaults follow published identity sets: short side 512 and face 256 px (PhotoMaker), cosine
    0.5 to the identity's centroid, pairs of cosine 0.35 to 0.85. 0 switches a minimum off.
    """

    min_short_side: int = 512
    """Pixels of the photo's short side."""
    min_face_size: float = 256.0
    """Pixels of the face box's short side."""
    min_face_share: float = 0.0
    """Face area over photo area. PhotoMaker's 10 % is of its crop; the trainer crops itself."""
    min_det_score: float = 0.5
    """The detector's confidence."""
    min_similarity: float = 0.5
    """Cosine to the identity's centroid."""
    min_sharpness: float = 0.0
    """Column ``blur``: variance of the Laplacian on the aligned face."""
    max_yaw: float = 90.0
    """Degrees, either way; likewise pitch and roll."""
    max_pitch: float = 90.0
    max_roll: float = 180.0
    max_faces: int = 0
    """Most faces in a photo; 0 is no limit."""
    licences: tuple[str, ...] = ()
    """Allowed values of ``licence``; empty allows all."""
    min_photos: int = 2
    """Photos a person must have left after the other filters."""
    min_pair_cosine: float = 0.35
    """Reference and target less alike than this are not a pair."""
    max_pair_cosine: float = 0.85
    """More alike than this is nearly the same photo and teaches copying."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "licences", tuple(self.licences))  # TOML gives lists
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"filter {name} must lie in [{low}, {high}], got {value!r}.")
        if self.min_pair_cosine > self.max_pair_cosine:
            raise OptionError(
                f"filter min_pair_cosine {self.min_pair_cosine} is above max_pair_cosine "
                f"{self.max_pair_cosine}."
            )

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Which rows pass: ``[rows]`` bool. ``min_photos`` and pairs come after this."""
        return cast(NDArray[np.bool_], np.logical_and.reduce(list(self.masks(table).values())))

    def masks(self, table: pa.Table) -> dict[str, NDArray[np.bool_]]:
        """Which rows pass each filter by itself, by the filter's name."""

        def column(name: str) -> NDArray[Any]:
            return cast(NDArray[Any], table[name].to_numpy())

        faces, licence = column("faces"), column("licence")
        return {
            "min_short_side": np.minimum(column("width"), column("height")) >= self.min_short_side,
            "min_face_size": column("face_size") >= self.min_face_size,
            "min_face_share": column("face_share") >= self.min_face_share,
            "min_det_score": column("det_score") >= self.min_det_score,
            "min_similarity": column("similarity") >= self.min_similarity,
            "min_sharpness": column("blur") >= self.min_sharpness,
            "max_yaw": np.abs(column("yaw")) <= self.max_yaw,
            "max_pitch": np.abs(column("pitch")) <= self.max_pitch,
            "max_roll": np.abs(column("roll")) <= self.max_roll,
            "max_faces": faces <= (self.max_faces or np.inf),
            "licences": np.isin(licence, self.licences) if self.licences else faces >= 0,
        }


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("min_short_side", 0, 1 << 20),
    ("min_face_size", 0, 1 << 20),
    ("min_face_share", 0, 1),
    ("min_det_score", 0, 1),
    ("min_similarity", -1, 1),
    ("min_sharpness", 0, 1e9),
    ("max_yaw", 0, 90),
    ("max_pitch", 0, 90),
    ("max_roll", 0, 180),
    ("max_faces", 0, 1 << 20),
    ("min_photos", 1, 1 << 20),
    ("min_pair_cosine", -1, 1),
    ("max_pair_cosine", -1, 1),
)


class Dataset:
    """The kept photos of a prepared folder that pass the filters, by row number.

    Rows stand in shard order, so one identity's rows are consecutive. Nothing but the index is
    held in memory; photos and embeddings are read when asked for. Safe in worker processes.
    """

    def __init__(
        self,
        folder: str | Path,
        filters: Filters | None = None,
        split: Split | None = "train",
    ) -> None:
        """``filters`` None takes the defaults; ``split`` None takes both splits.

        Raises ``DatasetError`` for a folder without a whole index, ``FilterError`` where no
        identity with ``min_photos`` photos is left.
        """
        self.folder = Path(folder)
        self.filters = filters or Filters()
        self.split = split
        table, self.info = read_index(self.folder)
        table = table.filter(pc.equal(table["dropped"], ""))
        if split is not None:
            table = table.filter(pc.equal(table["split"], split))
            if split == "held_out" and not table.num_rows:
                raise FilterError(
                    f"{self.folder}: nobody is held out of training, so there is nobody for "
                    "previews and validation. Prepare the photos again with a larger --held-out "
                    "(finished parts are kept), or set previews.every = 0 and validation.every = 0."
                )
        self._table = self._filtered(table)
        self._reader = ShardReader(self.folder)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def table(self) -> pa.Table:
        """All columns of all rows (``SCHEMA``)."""
        return self._table

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """Names of all people, in row order."""
        return tuple(self._rows_of)

    def rows_of(self, identity: str) -> range:
        """Row numbers of one person's photos (consecutive, at least ``min_photos``)."""
        return self._rows_of[identity]

    def row(self, number: int) -> Row:
        """One photo's record."""
        values = self._table.slice(number, 1).to_pylist()[0]
        values["box"] = tuple(values["box"])
        points = values["landmarks"]
        values["landmarks"] = tuple(zip(points[0::2], points[1::2], strict=True))
        return Row(**{f.name: values[f.name] for f in fields(Row)})

    def photo_bytes(self, number: int) -> bytes:
        """The stored file, checked against its hash. Raises ``ShardDamagedError``."""
        row = self.row(number)
        return self._reader.photo(row.shard, row.offset, row.size, row.sha256)

    def photo(self, number: int) -> Image.Image:
        """The photo upright in RGB; ``row(number).box`` is in its pixels."""
        return decode_photo(self.photo_bytes(number))

    def face(self, number: int) -> Embedding:
        """The raw (not normed) face embedding, ``[512]`` float32."""
        row = self.row(number)
        return self._reader.face(row.shard, row.face_offset)

    def pairs_of(self, identity: str) -> tuple[tuple[int, int], ...]:
        """Allowed (reference, target) row numbers of one person, both directions, in order.

        Allowed is a cosine in [``min_pair_cosine``, ``max_pair_cosine``]. May be empty.
        """
        rows = list(self.rows_of(identity))
        faces = np.stack([self.face(row) for row in rows])
        allowed = pair_mask(faces, self.filters)
        return tuple((rows[a], rows[b]) for a, b in np.argwhere(allowed))

    @cached_property
    def _rows_of(self) -> dict[str, range]:
        names = self._table["identity"].to_numpy(zero_copy_only=False)
        starts: NDArray[np.intp] = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
        ends = [*starts[1:], len(names)]
        return {str(names[a]): range(int(a), int(b)) for a, b in zip(starts, ends, strict=True)}

    def _filtered(self, table: pa.Table) -> pa.Table:
        masks = self.filters.masks(table)
        passed = table.filter(pa.array(self.filters.mask(table)))
        names = passed["identity"].to_numpy(zero_copy_only=False)
        unique, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
        enough = counts[inverse] >= self.filters.min_photos if len(unique) else np.zeros(0, bool)
        result = passed.filter(pa.array(enough, pa.bool_()))
        if result.num_rows == 0:
            failed = ", ".join(
                f"{name}={getattr(self.filters, name)!r} removes {int((~mask).sum())}"
                for name, mask in masks.items()
                if not mask.all()
            )
            raise FilterError(
                f"{self.folder}: {table.num_rows} photos in split {self.split or 'any'!r}, of "
                f"which {passed.num_rows} pass the filters and none belongs to a person with "
                f"min_photos={self.filters.min_photos} ({failed or 'no filter removes any'}). "
                "Loosen the filters or prepare more photos."
            )
        return result


def pair_mask(faces: Embedding, filters: Filters) -> NDArray[np.bool_]:
    """Which photos of one person may be paired: embeddings ``[n, 512]`` -> ``[n, n]`` bool."""
    normed = faces / np.maximum(np.linalg.norm(faces, axis=1, keepdims=True), 1e-12)
    cosine = normed @ normed.T
    allowed = (cosine >= filters.min_pair_cosine) & (cosine <= filters.max_pair_cosine)
    np.fill_diagonal(allowed, False)
    return cast(NDArray[np.bool_], allowed)


# --- the file --------------------------------------------------------------------------------


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
    people = kept["identity"].to_numpy(zero_copy_only=False)
    if len(people) and 1 + int((people[1:] != people[:-1]).sum()) != len(set(people)):
        raise DatasetError(path, "has people whose photos do not stand together.")


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
