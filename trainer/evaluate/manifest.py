"""Which pictures to score: a CSV file or JSON lines, by this project or about any other method."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infinite_id_core.errors import FileMissingError
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.cells import csv_cell, from_csv_cell
from infinite_id_core.files.system import read_bytes

from ..errors import ManifestError, MissingPicturesError, disk_errors
from ..texts import decode_text

COLUMNS = ("image", "reference", "identity", "prompt", "seed", "method")
_FILLED = ("image", "reference", "identity", "method")  # never empty
_LIMIT = 2**28  # bytes of a file
_LISTED = 5  # missing files named in the message


@dataclass(frozen=True, kw_only=True)
class Row:
    """One generated picture and what it should show."""

    image: Path
    reference: Path
    """The photo of the person."""
    identity: str
    """Who: intervals resample these."""
    prompt: str = ""
    """Empty: no CLIP-T."""
    seed: str = ""
    method: str
    category: str = ""
    """Of the prompt, such as "clothing"; an extra column, may be absent."""


def read_manifest(path: str | Path) -> list[Row]:
    """The rows of a ``.csv``, or of JSON lines under any other name.

    Relative paths start at the manifest's folder; columns beyond ours are ignored. Raises
    ``FileMissingError``, ``UnreadableError``, ``FileTooLargeError``, ``ManifestError``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileMissingError(path, "no such manifest.")
    try:
        text = decode_text(read_bytes(path, _LIMIT))
    except ValueError as error:
        raise ManifestError(path, str(error)) from error
    read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    rows = [_row(path, line, record) for line, record in read(path, text)]
    if not rows:
        raise ManifestError(path, "names no picture.")
    return rows


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        _check_columns(path, reader.fieldnames or [])
        for record in reader:
            cells = {k: from_csv_cell(v) for k, v in record.items() if isinstance(v, str)}
            yield reader.line_num, cells
    except csv.Error as error:
        raise ManifestError(path, f"line {reader.line_num} is no CSV ({error}).") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ManifestError(path, f"line {number} is no JSON ({error}).") from error
        if not isinstance(record, dict):
            raise ManifestError(path, f"line {number} is no JSON object.")
        _check_columns(path, list(record), f"line {number} ")
        yield number, record


def _check_columns(path: Path, found: Sequence[str], where: str = "") -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ManifestError(
            path, f"{where}lacks {', '.join(missing)}; found {', '.join(map(str, found)) or 'none'}"
            f". A manifest has the columns {', '.join(COLUMNS)}; prompt and seed may be empty."
        )  # fmt: skip


def _row(path: Path, line: int, record: Mapping[str, Any]) -> Row:
    values = {
        name: "" if record.get(name) is None else str(record[name]).strip()
        for name in (*COLUMNS, "category")
    }
    empty = [name for name in _FILLED if not values[name]]
    if empty:
        raise ManifestError(path, f"line {line} has no {' and no '.join(empty)}.")
    image, reference = (path.parent / values.pop(name) for name in ("image", "reference"))
    return Row(image=image, reference=reference, **values)


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV that ``read_manifest`` takes, with paths relative to it where that is possible.

    Raises ``DiskFullError``.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*COLUMNS, "category"), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        places = {n: _relative(getattr(row, n), path.parent) for n in ("image", "reference")}
        cells = {**asdict(row), **places}
        writer.writerow({name: csv_cell(value) for name, value in cells.items()})
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def check_files(source: Path, rows: Sequence[Row]) -> None:
    """Raise ``MissingPicturesError`` where pictures or references are not there."""
    named = dict.fromkeys(path for row in rows for path in (row.image, row.reference))
    missing = [path for path in named if not path.is_file()]
    if missing:
        listed = "; ".join(map(str, missing[:_LISTED]))
        more = f"; and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise MissingPicturesError(
            source, f"{len(missing)} of {len(named)} files are not there: {listed}{more}. Relative "
            "paths start at the manifest's folder."
        )  # fmt: skip
