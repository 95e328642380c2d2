"""``inspect`` of what ``prepare`` made: the index of a dataset, a shard."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np
import pyarrow as pa

from infinite_id_core.errors import FileError
from infinite_id_core.files.system import open_regular, reading

from .data_index import Filters
from .findings import Findings, in_short
from .index_file import read_index
from .prepare.parts import files_not_used, photos_left_out
from .shards import SHARDS, ShardReader
from .tars import Member, TarError, read_members

_MAX_RECORD = 2**24  # bytes of one sample's JSON


def inspect_index(folder: Path, verify: bool) -> Findings:
    """A dataset's index and its shards; ``verify`` checks every photo's hash."""
    table, info = read_index(folder)
    kept = table.filter(np.array(table["dropped"].to_pylist()) == "")
    names = kept["identity"].to_pylist()
    splits = dict(zip(names, kept["split"].to_pylist(), strict=True))
    per_person = np.array(list(Counter(names).values()) or [0])
    findings = Findings(
        kind="index",
        facts={
            "recogniser": info.recogniser,
            "fingerprint": info.fingerprint,
            "photos kept": len(kept),
            "people": len(splits),
            "people held out": sum(split == "held_out" for split in splits.values()),
            "photos per person": f"{per_person.min()} to {per_person.max()}, "
            f"median {np.median(per_person):g}",
            "photos left by the default filters": int(Filters().mask(kept).sum()),
        },
    )
    photos = {"kept": info.counts.get("kept", 0), **photos_left_out(info.counts)}
    findings.tables["photos"] = [("what became of them", "photos"), *photos.items()]
    filters = Filters().masks(kept)
    findings.tables["filters"] = [
        ("default filter", "photos that it leaves out"),
        *((f"{name} = {getattr(Filters(), name)}", int((~passed).sum()))
          for name, passed in filters.items() if not passed.all()),
    ]  # fmt: skip
    others = files_not_used(info.counts)
    if others:
        findings.tables["other files"] = [("why they are not used", "files"), *others.items()]
    _look_at_shards(findings, folder, kept["shard"].to_pylist())
    _look_at_photos(findings, folder, kept, verify)
    return findings


def _look_at_shards(findings: Findings, folder: Path, names: Sequence[str]) -> None:
    """Whether the shards are there, and how much they hold."""
    findings.tables["shards"] = [("shard", "photos", "megabytes")]
    shards = Counter(names)
    for shard, photos in sorted(shards.items()):
        path = folder / SHARDS / shard
        size = path.stat().st_size if path.is_file() else 0
        findings.tables["shards"].append((shard, photos, round(size / 2**20, 2)))
        if not size:
            findings.problems.append(f"{SHARDS}/{shard} is missing or empty.")


def _look_at_photos(findings: Findings, folder: Path, kept: pa.Table, verify: bool) -> None:
    """Whether each photo lies in its shard, or with ``verify`` is the one that was written."""
    columns = ("shard", "offset", "size", "sha256", "face_offset")
    reader = ShardReader(folder)
    for row in kept.select(columns).to_pylist():
        end = row["offset"] + row["size"]
        path = folder / SHARDS / row["shard"]
        try:
            if verify:
                reader.photo(row["shard"], row["offset"], row["size"], row["sha256"])
                reader.face(row["shard"], row["face_offset"])
            elif path.is_file() and path.stat().st_size < end:
                findings.problems.append(f"{SHARDS}/{row['shard']} ends before byte {end}.")
        except FileError as error:
            findings.problems.append(f"{SHARDS}/{row['shard']}: {error.problem}")


def inspect_shard(path: Path) -> Findings:
    """A tar of samples: are they whole, and are people contiguous?"""
    findings = Findings(kind="shard")
    extensions: Counter[str] = Counter()
    people: list[str] = []
    problems: list[str] = []
    with reading(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            for member in read_members(file, size):
                if member.kind != "file":
                    extensions[f"({member.kind})"] += 1
                    continue
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                extensions[extension] += 1
                if extension == "json":
                    person, problem = _person(file, member, key)
                    people.append(person)
                    problems += [f"{member.name[:200]}: {problem}"] if problem else []
        except TarError as error:
            problems.append(f"it is damaged after {len(people)} samples ({error}).")
    findings.problems = in_short(problems)
    changes = 1 + sum(a != b for a, b in zip(people, people[1:], strict=False)) if people else 0
    findings.facts = {
        "samples": len(people),
        "people": len(set(people)),
        "megabytes": round(size / 2**20, 2),
    }
    findings.tables["members"] = [("extension", "count"), *sorted(extensions.items())]
    if changes > len(set(people)):
        findings.problems.append("its people are not contiguous: some photos stand apart.")
    if extensions["face.npy"] not in (0, len(people)):
        findings.problems.append(f"{extensions['face.npy']} embeddings for {len(people)} samples.")
    return findings


def _person(file: BufferedReader, member: Member, key: str) -> tuple[str, str]:
    """Whose photo a sample's record says it is, and what is wrong with the record."""
    if member.size > _MAX_RECORD:
        return key, f"has {member.size} bytes; expected a record of at most {_MAX_RECORD}."
    file.seek(member.offset)
    try:
        record = json.loads(file.read(member.size))
    except (ValueError, RecursionError) as error:
        return key, f"is not JSON ({str(error)[:200]})."
    if not isinstance(record, dict):
        return key, f"is {type(record).__name__}; expected an object."
    return str(record.get("identity", key)), ""
