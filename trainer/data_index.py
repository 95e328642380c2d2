"""A prepared dataset: the photos that pass the filters, by row number."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from infinite_id_core.errors import OptionError

from .errors import FilterError, ShardDamagedError
from .index_file import Row as Row
from .index_file import Split, read_index
from .shards import SHARDS, Embedding, ShardReader, decode_photo


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
        """The photo upright in RGB; ``row(number).box`` is in its pixels.

        Raises ``ShardDamagedError``, also where it has another size than the index says.
        """
        photo, row = decode_photo(self.photo_bytes(number)), self.row(number)
        if photo.size != (row.width, row.height):
            raise ShardDamagedError(
                self.folder / SHARDS / row.shard, f"{row.key} is {photo.width} x {photo.height} "
                f"pixels; the index says {row.width} x {row.height}."
            )  # fmt: skip
        return photo

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
