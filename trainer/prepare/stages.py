"""The stages: functions from part to part. An engine runs them; each leaves a finished record.

``detect`` reads the photos once (decode, hash, detect, align, score) and keeps the aligned faces,
so that another recogniser needs only ``embed`` again. ``write`` makes one shard. Between them
``group`` sees everything at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infinite_id_core.errors import InfiniteIDError
from infinite_id_core.faces.detect import DetectedFace
from infinite_id_core.files.atomic import replacing
from infinite_id_core.method.face_clip import FACE_WIDTH

from ..errors import DatasetError, disk_errors
from ..index_file import SCHEMA, table_of
from ..shards import ShardWriter
from . import faces
from .faces import FaceModels
from .manifest import Target, finish, finished
from .options import PrepareOptions
from .parts import Blob, Part, Source
from .photo import (
    Photo,
    PhotoError,
    Picture,
    difference_hash,
    open_photo,
    pose,
    reencoded,
    sharpness,
)
from .reading import Sidecars, read_blob, read_sidecars, text_of
from .tar_sources import list_tar

_FLOAT = pa.float32()
_ALIGNED = faces.ALIGNED_SIZE

# What ``write`` needs: where a photo's bytes are (file names may be any bytes, so not text), and
# whether they are stored as they are.
PLACE = pa.schema(
    [
        ("path", pa.binary()),
        ("place", pa.int64()),
        ("length", pa.int64()),
        ("extension", pa.string()),
        ("keep_bytes", pa.bool_()),
    ]
)

# One row per face; a photo without a usable face has one row with ``face`` -1.
FACES = pa.schema(
    [
        ("photo", pa.int32()),  # number within the part
        ("face", pa.int32()),  # number within the photo, largest first
        ("name", pa.string()),
        *PLACE,
        *[SCHEMA.field(n) for n in ("identity", "source", "licence", "caption", "source_sha256")],
        *[SCHEMA.field(n) for n in ("width", "height", "phash", "faces", "box", "landmarks")],
        *[SCHEMA.field(n) for n in ("det_score", "face_size", "face_share", "blur")],
        *[SCHEMA.field(n) for n in ("yaw", "pitch", "roll", "dropped", "detail")],
        ("aligned", pa.binary()),  # RGB [112, 112, 3]
    ]
)
EMBEDDINGS = pa.schema([("embedding", pa.list_(_FLOAT, FACE_WIDTH))])


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of a stage: everything a worker on any machine needs."""

    stage: str
    target: Target
    arguments: DetectArguments | EmbedArguments | WriteArguments


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a task."""

    stage: str
    counts: dict[str, Any]
    fresh: bool
    """False where an earlier run had done it."""
    error: InfiniteIDError | None = None


def run_task(task: Task) -> Outcome:
    """Do a task unless it is done. Named errors come back as values: they cross processes."""
    counts = finished(task.target)
    if counts is not None:
        return Outcome(stage=task.stage, counts=counts, fresh=False)
    try:
        task.target.record.unlink(missing_ok=True)
        counts = _STAGES[task.stage](task.arguments, task.target.outputs)
        finish(task.target, counts)
    except InfiniteIDError as error:
        return Outcome(stage=task.stage, counts={}, fresh=True, error=error)
    return Outcome(stage=task.stage, counts=counts, fresh=True)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a stage's table in one step. Raises ``DiskFullError``."""
    with disk_errors(path), replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


# --- detect ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DetectArguments:
    """``detect``: a part of the input -> ``FACES``."""

    root: Path
    part: Part
    labelled: bool
    models: FaceModels
    options: PrepareOptions


def detect_part(arguments: DetectArguments, outputs: tuple[Path, ...]) -> dict[str, int]:
    """Read, decode, detect, align and score all photos of a part."""
    part = arguments.part
    sources, problems = list(part.sources), list(part.problems)
    if part.tar:
        sources, found = list_tar(arguments.root, part.tar)
        problems += found
    rows: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        beside = read_sidecars(arguments.root, source, arguments.options.identity_field)
        problems += beside.problems
        rows += [{"photo": number, **row} for row in _photo_rows(arguments, source, beside)]
    for extra, problem in enumerate(problems, start=len(sources)):
        row = {"photo": extra, "face": -1, "name": problem.name, "source": problem.name}
        rows.append({**row, "faces": 0, "dropped": problem.reason, "detail": problem.detail})
    table = pa.Table.from_pylist(rows, schema=FACES)
    write_table(outputs[0], table)
    return {"photos": len(sources), "faces": sum(row["face"] >= 0 for row in rows)}


def _photo_rows(
    arguments: DetectArguments, source: Source, beside: Sidecars
) -> list[dict[str, Any]]:
    """One row per face, or one that says why there is none."""
    options, record = arguments.options, beside.record
    # A licence that cannot be read is unknown: the general one is for photos without a record.
    licence = "" if beside.record_is_bad else options.licence
    row: dict[str, Any] = {
        "face": -1,
        "name": source.name,
        "path": os.fsencode(source.photo.path),
        "place": source.photo.offset,
        "length": source.photo.size,
        "identity": source.identity or text_of(record, options.identity_field),
        "source": text_of(record, "url", "source") or source.name,
        "licence": text_of(record, "licence", "license") or licence,
        "caption": beside.caption,
        "faces": 0,
        "dropped": "",
        "detail": "",
    }
    try:
        data = read_blob(arguments.root, source.photo, options.max_bytes)
        row["length"] = len(data)
        row["source_sha256"] = hashlib.sha256(data).hexdigest()
        photo = open_photo(data, max_side=options.max_side, max_pixels=options.max_pixels)
    except PhotoError as error:
        return [{**row, "dropped": error.reason, "detail": error.detail}]
    row["width"], row["height"] = photo.stored_size
    row["extension"], row["keep_bytes"] = photo.extension, photo.keep_bytes
    row["phash"] = f"{difference_hash(photo.picture):016x}"
    found = faces.detect(arguments.models, photo.picture, retry=arguments.labelled)
    if not found:
        return [{**row, "dropped": "no_face", "detail": "the detector found none"}]
    row["faces"] = len(found)
    kept = faces.candidates(found, labelled=arguments.labelled, every=options.faces == "all")
    return [{**row, "face": n, **_face_row(photo, face)} for n, face in enumerate(kept)]


def _face_row(photo: Photo, face: DetectedFace) -> dict[str, Any]:
    x0, y0, x1, y1 = (value * photo.scale for value in face.box)
    width, height = photo.stored_size
    yaw, pitch, roll = pose(face.landmarks.astype(np.float32))
    return {
        "box": [x0, y0, x1, y1],
        "landmarks": (face.landmarks * photo.scale).ravel().tolist(),
        "det_score": face.score,
        "face_size": min(x1 - x0, y1 - y0),
        "face_share": (x1 - x0) * (y1 - y0) / (width * height),
        "blur": sharpness(faces.align(photo.picture, face, faces.SHARPNESS_SIZE)),
        "yaw": yaw,
        "pitch": pitch,
        "roll": roll,
        "aligned": faces.align(photo.picture, face).tobytes(),
    }


# --- embed -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EmbedArguments:
    """``embed``: ``FACES`` -> ``EMBEDDINGS``, row by row; null where there is no face."""

    faces: Path
    models: FaceModels


def embed_part(arguments: EmbedArguments, outputs: tuple[Path, ...]) -> dict[str, Any]:
    """Read the aligned faces of a part with the recogniser."""
    values = pq.read_table(arguments.faces, columns=["aligned"])["aligned"].to_pylist()
    has_face = np.array([value is not None for value in values], bool)
    vectors = np.zeros((len(values), FACE_WIDTH), np.float32)
    if has_face.any():
        aligned = [_picture(value) for value in values if value is not None]
        vectors[has_face] = faces.face_embeddings(arguments.models, aligned)
    column = pa.FixedSizeListArray.from_arrays(
        vectors.ravel(), FACE_WIDTH, mask=pa.array(~has_face)
    )
    write_table(outputs[0], pa.table([column], schema=EMBEDDINGS))
    return {"faces": int(has_face.sum()), "recogniser": faces.recogniser_of(arguments.models)}


def _picture(raw: bytes) -> Picture:
    return np.frombuffer(raw, np.uint8).reshape(_ALIGNED, _ALIGNED, 3)


# --- write -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WriteArguments:
    """``write``: one row group of the grouped photos -> a shard and its index rows."""

    root: Path
    grouped: Path
    row_group: int
    options: PrepareOptions


def write_shard(arguments: WriteArguments, outputs: tuple[Path, ...]) -> dict[str, int]:
    """Write the photos of one shard and where they are.

    Raises ``DatasetError`` where a photo has changed since it was read, ``DiskFullError``.
    """
    shard, index = outputs
    rows = pq.ParquetFile(arguments.grouped).read_row_group(arguments.row_group).to_pylist()
    with disk_errors(shard), replacing(shard) as temporary, temporary.open("wb") as file:
        writer = ShardWriter(file)
        placed = [_write_photo(writer, arguments, shard.name, row) for row in rows]
        writer.close()
    write_table(index, table_of(placed))
    return {"photos": len(placed), "bytes": shard.stat().st_size}


def _write_photo(
    writer: ShardWriter, arguments: WriteArguments, shard: str, row: dict[str, Any]
) -> dict[str, Any]:
    options = arguments.options
    path = os.fsdecode(row.pop("path"))
    blob = Blob(path=path, offset=row.pop("place"), size=row.pop("length"))
    embedding = np.asarray(row.pop("embedding"), np.float32)
    try:
        data = read_blob(arguments.root, blob, options.max_bytes)
    except PhotoError as error:
        raise DatasetError(arguments.root / path, f"{error.detail}. {_CHANGED}") from error
    if hashlib.sha256(data).hexdigest() != row["source_sha256"]:
        raise DatasetError(arguments.root / path, _CHANGED)
    extension = row.pop("extension")
    if not row.pop("keep_bytes"):
        photo = open_photo(data, max_side=options.max_side, max_pixels=options.max_pixels)
        data = reencoded(photo)
    record = {name: row[name] for name in _IN_JSON}
    place = writer.add(row["key"], data, extension, embedding, record)
    return {
        **row,
        "shard": shard,
        "offset": place.offset,
        "size": place.size,
        "face_offset": place.face_offset,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


_IN_JSON = ("identity", "split", "source", "licence", "caption", "width", "height", "box",
            "landmarks")  # fmt: skip
_CHANGED = "changed while prepare was running. Run the same command again; it reads this part anew."

_STAGES: Mapping[str, Callable[[Any, tuple[Path, ...]], dict[str, Any]]] = {
    "detect": detect_part,
    "embed": embed_part,
    "write": write_shard,
}
