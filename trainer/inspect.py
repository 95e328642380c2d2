"""``python -m trainer inspect FILE``: what a file holds, and whether it is sound."""

from __future__ import annotations

import argparse
import json
import math
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_core.checkpoint import (
    ADAPTER_FORMAT,
    IDENTITY_FORMAT,
    Header,
    read_adapter,
    read_header,
    read_identity,
)
from infinite_id_core.errors import FileError
from infinite_id_core.system_files import open_regular, reading

from .errors import UnknownFileError

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


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
    print(json.dumps(vars(findings), indent=1) if values.json else _as_text(values.file, findings))
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
        if start.startswith(_PICKLES):
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

    if (path / INDEX).is_file():
        return _index(path, verify)
    files = sorted(path.rglob("*.safetensors"))
    if not files:
        raise UnknownFileError(path, f"holds neither {INDEX} nor a .safetensors file.")
    findings = Findings(kind="folder", facts={"files": len(files)})
    rows: list[tuple[Any, ...]] = [("file", "kind", "tensors", "parameters")]
    for file in files:
        found = inspect_file(file)
        name = file.relative_to(path).as_posix()
        facts = found.facts
        rows.append((name, found.kind, facts.get("tensors", ""), facts.get("parameters", "")))
        findings.problems += [f"{name}: {problem}" for problem in found.problems]
    findings.tables["files"] = rows
    return findings


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
    return findings


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
    _read_back(findings, read_identity, path)
    if not findings.problems:
        identity = read_identity(path)
        lengths = identity.face.norm(dim=1)
        findings.facts["references"] = identity.references
        findings.facts["image encoder width"] = identity.clip_width
        findings.facts["weights"] = [round(w, 4) for w in identity.weight.tolist()]
        findings.facts["lengths of the face embeddings"] = [round(v, 4) for v in lengths.tolist()]
        if identity.config.embedding == "normed" and bool(((lengths - 1).abs() > 1e-2).any()):
            findings.problems.append("its config says normed, and its embeddings are not.")
    return findings


def _read_back(findings: Findings, read: Any, path: Path) -> None:
    """The full check: shapes, types, finite values."""
    try:
        read(path)
    except FileError as error:
        findings.problems.append(f"{type(error).__name__}: {error.problem}")


def _facts(header: Header) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "format": header.metadata.get("format"),
        "version": header.metadata.get("version"),
        **_sizes(header),
    }
    try:
        config = json.loads(header.metadata.get("config", "{}"))
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
    samples: Counter[str] = Counter()
    order: list[str] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                samples[extension] += 1
                if extension == "json":
                    file = archive.extractfile(member)
                    record = json.loads(file.read()) if file else {}
                    order.append(str(record.get("identity", key)))
            if path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                findings.problems.append("it has no end-of-archive marker: it was cut.")
    except (tarfile.TarError, ValueError, OSError) as error:
        findings.problems.append(f"it is damaged after {len(order)} samples ({error}).")
    changes = 1 + sum(a != b for a, b in zip(order, order[1:], strict=False)) if order else 0
    findings.facts = {
        "samples": len(order),
        "people": len(set(order)),
        "megabytes": round(path.stat().st_size / 2**20, 2),
    }
    findings.tables["members"] = [("extension", "count"), *sorted(samples.items())]
    if changes > len(set(order)):
        findings.problems.append("its people are not contiguous: some photos stand apart.")
    if samples["face.npy"] not in (0, len(order)):
        findings.problems.append(f"{samples['face.npy']} embeddings for {len(order)} samples.")
    return findings


# --- text ------------------------------------------------------------------------------------


def _as_text(path: Path, findings: Findings) -> str:
    lines = [f"{path}: {findings.kind}"]
    width = max((len(name) for name in findings.facts), default=0)
    lines += [f"  {name:{width}}  {_value(value)}" for name, value in findings.facts.items()]
    for title, rows in findings.tables.items():
        lines += ["", f"{title}:"]
        texts = [[_value(cell) for cell in row] for row in rows]
        widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
        for row in texts:
            cells = (f"{t:{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(
                zip(row, widths, strict=True)))  # fmt: skip
            lines.append("  " + "  ".join(cells))
    lines += ["", "health: " + ("sound" if not findings.problems else "PROBLEMS")]
    lines += [f"  - {problem}" for problem in findings.problems]
    return "\n".join(lines)


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
