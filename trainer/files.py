"""Small things about files that several parts of training need."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from infinite_id_core.errors import WrongFormatError
from infinite_id_core.system_files import open_regular, read_bytes, reading

_SAMPLES = 64
_SAMPLE_BYTES = 2**16


def sampled_sha256(*paths: Path) -> str:
    """A fingerprint of large files in milliseconds: size, head, tail and pieces between them.

    For safetensors the head holds every name, shape and type. Not proof against an adversary.
    Raises ``FileMissingError``, ``UnreadableError``.
    """
    digest = hashlib.sha256()
    for path in paths:
        with reading(path), open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(file.read(2**20))
            for i in range(1, _SAMPLES + 1):
                file.seek(max(0, size * i // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_text(path: str | Path, limit: int = 2**26) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises ``FileMissingError``, ``UnreadableError``, ``WrongFormatError``.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WrongFormatError(path, f"is not text in UTF-8 ({error}).") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises as ``read_text`` does."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise WrongFormatError(path, f"is not JSON ({error}).") from error
