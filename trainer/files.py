"""Small things about files that several parts of training need."""

from __future__ import annotations

import hashlib
from pathlib import Path

from infinite_id_core.errors import FileMissingError

_SAMPLES = 64
_SAMPLE_BYTES = 2**16


def sampled_sha256(*paths: Path) -> str:
    """A fingerprint of large files in milliseconds: size, head, tail and pieces between them.

    For safetensors the head holds every name, shape and type. Not proof against an adversary.
    Raises ``FileMissingError``.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise FileMissingError(path, "no such file.")
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            for i in range(1, _SAMPLES + 1):
                file.seek(max(0, size * i // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
