"""``python -m trainer inspect FILE``: what a file holds, and whether it is sound."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_core.errors import FileError, UnknownFileError, printable
from infinite_id_core.files.checkpoint import (
    ADAPTER_FORMAT,
    IDENTITY_FORMAT,
    read_adapter,
    read_identity,
)
from infinite_id_core.files.pickles import open_pickle
from infinite_id_core.files.safetensors_file import (
    PICKLES,
    Header,
    json_object,
    open_safetensors,
    read_header,
)
from infinite_id_core.files.stored_tensor import StoredTensor
from infinite_id_core.files.system import open_regular, reading

from .tars import Member, TarError, read_members
from .train.state import STATE

_MAX_RECORD = 2**24  # bytes of one sample's JSON
_MAX_ENTRIES = 2**20
_SHOWN = 20  # problems of one kind


@dataclass(kw_only=True)
class Findings:
    """What was found in one file."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Single values, in the order to show them."""
    tables: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    """Rows by title; the first row is the heading."""
    problems: list[str] = field(default_factory=list)
    """Empty where the file is sound."""


def main(argv: Sequence[str]) -> int:
    """Print the findings; exit status 1 if there are problems."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer inspect",
        description="What an adapter, identity, checkpoint, shard or index holds.",
    )
    parser.add_argument("file", type=Path, help="a file, or a folder that prepare or train made")
    parser.add_argument("--verify", action="store_true", help="index: check every photo's hash")
    parser.add_argument("--json", action="store_true", help="print JSON")
    values = parser.parse_args(argv)
    findings = inspect_file(values.file, verify=values.verify)
    text = (
        json.dumps(vars(findings), indent=1, default=str)
        if values.json
        else _as_text(values.file, findings)
    )
    encoding = sys.stdout.encoding or "utf-8"  # not every console has every letter
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 1 if findings.problems else 0


def inspect_file(path: Path, *, verify: bool = False) -> Findings:
    """Look into a file by its contents, never by its name.

    Raises ``FileMissingError``, ``UnknownFileError``; damage is listed in ``problems``.
    """
    if path.is_dir():
        return _folder(path, verify)
    with reading(path), open_regular(path) as file:
        start = file.read(512)
    try:
        if start.startswith(b"PAR1"):
            return _index(path.parent, verify)
        if start[257:262] == b"ustar":
            return _shard(path)
        if start.startswith(PICKLES):
            return _pickle(path)
        if start[8:9] == b"{":
            return _safetensors(path)
    except FileError as error:
        return Findings(kind=_guess(start), problems=[error.problem])
    raise UnknownFileError(
        path, "is no safetensors, Parquet, tar or pickle file; expected one that prepare, train "
        "or a node wrote."
    )  # fmt: skip


def _guess(start: bytes) -> str:
    return "index" if start.startswith(b"PAR1") else "safetensors"


def _folder(path: Path, verify: bool) -> Findings:
    from .data_index import INDEX

    with reading(path):
        if (path / INDEX).is_file():
            return _index(path, verify)
        files = sorted([*path.rglob("*.safetensors"), *path.rglob(STATE)])
    if not files:
        raise UnknownFileError(path, f"holds neither {INDEX} nor a .safetensors file.")
    findings = Findings(kind="folder", facts={"files": len(files)})
    rows: list[tuple[Any, ...]] = [("file", "kind", "tensors", "parameters")]
    for file in files:
        name = file.relative_to(path).as_posix()
        try:
            found = _state(file) if file.name == STATE else inspect_file(file)
        except FileError as error:
            found = Findings(kind="unreadable", problems=[error.problem])
        facts = found.facts
        rows.append((name, found.kind, facts.get("tensors", ""), facts.get("parameters", "")))
        findings.problems += [f"{name}: {problem}" for problem in found.problems]
    findings.tables["files"] = rows
    return findings


def _state(path: Path) -> Findings:
    """A checkpoint's optimiser: its numbers, read by the reader that can call nothing."""
    findings = Findings(kind="training state")
    with open_pickle(path) as values:
        tensors = _tensors_of(path, values)
        wrong = [
            name
            for name, stored in tensors
            if stored.dtype.is_floating_point and not bool(stored.read().isfinite().all())
        ]
    findings.facts = {
        "tensors": len(tensors),
        "parameters": sum(math.prod(stored.shape) for _, stored in tensors),
    }
    findings.problems += _not_finite(wrong)
    return findings


def _tensors_of(path: Path, values: Any) -> list[tuple[str, StoredTensor]]:
    """All tensors of nested dictionaries and lists, with their places."""
    found: list[tuple[str, StoredTensor]] = []
    waiting: list[tuple[str, Any]] = [("", values)]
    seen = 0
    while waiting:
        name, value = waiting.pop()
        seen += 1
        if seen > _MAX_ENTRIES:  # containers that hold one another have no end
            raise UnknownFileError(path, f"has more than {_MAX_ENTRIES} entries.")
        if isinstance(value, StoredTensor):
            found.append((name, value))
        elif isinstance(value, Mapping):
            waiting += [(f"{name}.{key}"[-200:], entry) for key, entry in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{name}.{i}"[-200:], entry) for i, entry in enumerate(value)]
    return found


def _not_finite(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} tensors hold NaN or infinity, e.g. {', '.join(names[:3])}."]


# --- tensors ---------------------------------------------------------------------------------


def _safetensors(path: Path) -> Findings:
    header = read_header(path)
    kind = header.metadata.get("format", "")
    if kind == ADAPTER_FORMAT:
        return _adapter(path, header)
    if kind == IDENTITY_FORMAT:
        return _identity(path, header)
    names = header.tensors
    ip_adapter = any(n.startswith("ip_adapter.") for n in names)
    findings = Findings(kind="ip-adapter" if ip_adapter else "safetensors")
    findings.facts = {**_sizes(header), "metadata": dict(header.metadata) or "none"}
    findings.tables["tensors"] = _by_prefix(header)
    findings.problems += _numbers(path)
    return findings


def _numbers(path: Path) -> list[str]:
    """What is wrong with the numbers of a file; read in pieces."""
    problems, wrong = [], []
    with open_safetensors(path) as file:
        for name in file.header.tensors:
            try:
                if not file.finite(name):
                    wrong.append(name)
            except FileError as error:
                problems.append(error.problem)
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"and {more} more."] if more > 0 else []), *_not_finite(wrong)]


def _adapter(path: Path, header: Header) -> Findings:
    findings = Findings(kind="adapter", facts={**_facts(header)})
    pairs = [n for n in header.tensors if n.endswith(".to_k.weight")]
    findings.facts["cross-attention layers"] = len(pairs)
    blocks = Counter((n.split(".transformer_blocks")[0], header.tensors[n].shape) for n in pairs)
    findings.tables["layers"] = [
        ("block", "depth", "width", "context"),
        *[(block[7:], depth, *shape) for (block, shape), depth in blocks.items()],
    ]
    findings.tables["parameters"] = _by_prefix(header)
    _read_back(findings, read_adapter, path)
    return findings


def _identity(path: Path, header: Header) -> Findings:
    findings = Findings(kind="identity", facts={**_facts(header)})
    identity = _read_back(findings, read_identity, path)
    if identity is not None:
        lengths = identity.face.norm(dim=1)
        findings.facts["references"] = identity.references
        findings.facts["image encoder width"] = identity.clip_width
        findings.facts["weights"] = [round(w, 4) for w in identity.weight.tolist()]
        findings.facts["lengths of the face embeddings"] = [round(v, 4) for v in lengths.tolist()]
        if identity.config.embedding == "normed" and bool(((lengths - 1).abs() > 1e-2).any()):
            findings.problems.append("its config says normed, and its embeddings are not.")
    return findings


def _read_back(findings: Findings, read: Any, path: Path) -> Any:
    """The full check: shapes, types, finite values."""
    try:
        return read(path)
    except FileError as error:
        findings.problems.append(f"{type(error).__name__}: {error.problem}")
        return None


def _facts(header: Header) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "format": header.metadata.get("format"),
        "version": header.metadata.get("version"),
        **_sizes(header),
    }
    try:
        config = json_object(header.metadata.get("config", "{}"))
        facts |= {f"config: {name}": value for name, value in sorted(config.items())}
    except (ValueError, AttributeError):
        facts["config"] = "unreadable"
    return facts


def _sizes(header: Header) -> dict[str, Any]:
    dtypes = Counter(entry.dtype for entry in header.tensors.values())
    count = sum(math.prod(entry.shape) for entry in header.tensors.values())
    return {
        "tensors": len(header.tensors),
        "parameters": count,
        "megabytes": round(sum(e.end - e.start for e in header.tensors.values()) / 2**20, 2),
        "types": ", ".join(f"{dtype} x {n}" for dtype, n in sorted(dtypes.items())),
    }


def _by_prefix(header: Header) -> list[tuple[Any, ...]]:
    counts: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for name, entry in header.tensors.items():
        prefix = name.split(".")[0]
        counts[prefix] += 1
        parameters[prefix] += math.prod(entry.shape)
    rows = [(name, counts[name], parameters[name]) for name in counts]
    return [("part", "tensors", "parameters"), *rows]


def _pickle(path: Path) -> Findings:
    return Findings(
        kind="pickle",
        facts={"megabytes": round(path.stat().st_size / 2**20, 2)},
        problems=[
            "a pickle can run code and was not opened. If you trust its source: "
            "python -m trainer convert IN OUT.safetensors"
        ],
    )


# --- data ------------------------------------------------------------------------------------


def _index(folder: Path, verify: bool) -> Findings:
    from .data_index import Filters, read_index
    from .shards import SHARDS, ShardReader

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
    findings.tables["photos"] = [("what became of them", "photos"), *info.counts.items()]
    findings.tables["shards"] = [("shard", "photos", "megabytes")]
    shards = Counter(kept["shard"].to_pylist())
    for shard, photos in sorted(shards.items()):
        path = folder / SHARDS / shard
        size = path.stat().st_size if path.is_file() else 0
        findings.tables["shards"].append((shard, photos, round(size / 2**20, 2)))
        if not size:
            findings.problems.append(f"{SHARDS}/{shard} is missing or empty.")
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
    return findings


def _shard(path: Path) -> Findings:
    """A tar of samples: are they whole, and are people contiguous?"""
    findings = Findings(kind="shard")
    extensions: Counter[str] = Counter()
    people: list[str] = []
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
                    findings.problems += [f"{member.name[:200]}: {problem}"] if problem else []
        except TarError as error:
            findings.problems.append(f"it is damaged after {len(people)} samples ({error}).")
    more = len(findings.problems) - _SHOWN
    if more > 0:
        findings.problems[_SHOWN:] = [f"and {more} more."]
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


# --- text ------------------------------------------------------------------------------------


def _as_text(path: Path, findings: Findings) -> str:
    lines = [f"{path}: {findings.kind}"]
    width = max((len(name) for name in findings.facts), default=0)
    lines += [
        f"  {printable(name):{width}}  {_value(value)}" for name, value in findings.facts.items()
    ]
    for title, rows in findings.tables.items():
        lines += ["", f"{title}:"]
        texts = [[_value(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
        for row in texts:
            cells = (f"{t:{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(
                zip(row, widths, strict=True)))  # fmt: skip
            lines.append("  " + "  ".join(cells))
    lines += ["", "health: " + ("sound" if not findings.problems else "PROBLEMS")]
    lines += [f"  - {printable(problem)}" for problem in findings.problems]
    return "\n".join(lines)


def _value(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else printable(str(value))
