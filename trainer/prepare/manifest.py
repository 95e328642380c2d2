"""What is already done: each task leaves a record of what it read, how, and what it wrote.

A record is written after its outputs, and each of them in one step (``checkpoint.replacing``).
So an output without a matching record is not there, whatever a crash left behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infinite_id_core.files.atomic import replacing

from ..errors import disk_errors

_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Target:
    """The outputs of one task and the record that says they are whole."""

    record: Path
    outputs: tuple[Path, ...]
    fingerprint: str
    """Of everything the outputs are made from: input and options."""


def finished(target: Target) -> dict[str, Any] | None:
    """The counts of a finished task, or None if any of it is missing, old or damaged."""
    try:
        values = json.loads(target.record.read_text(encoding="utf-8"))
        if values["fingerprint"] != target.fingerprint:
            return None
        for path in target.outputs:
            wanted = values["outputs"][path.name]
            if path.stat().st_size != wanted["size"] or file_sha256(path) != wanted["sha256"]:
                return None
        counts: dict[str, Any] = values["counts"]
        return counts
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finish(target: Target, counts: Mapping[str, Any]) -> None:
    """Record that the outputs are whole."""
    values = {
        "fingerprint": target.fingerprint,
        "outputs": {
            path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in target.outputs
        },
        "counts": dict(counts),
    }
    text = json.dumps(values, indent=1, sort_keys=True)
    with disk_errors(target.record), replacing(target.record) as temporary:
        temporary.write_text(text, encoding="utf-8")


def output_hashes(target: Target) -> list[str]:
    """SHA-256 of a finished task's outputs, from its record: the next stage's input."""
    values = json.loads(target.record.read_text(encoding="utf-8"))
    return [values["outputs"][path.name]["sha256"] for path in target.outputs]


def fingerprint_of(*values: object) -> str:
    """SHA-256 of plain values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remove_leftovers(folder: Path, keep: Sequence[Path] = ()) -> None:
    """Delete what a killed run left half-written (names of ``checkpoint.replacing``)."""
    for path in folder.rglob(".*.part"):
        if path not in keep:
            path.unlink(missing_ok=True)
