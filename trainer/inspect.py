"""``python -m trainer inspect FILE``: what a file holds, and whether it is sound."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infinite_id_core.errors import FileError, UnknownFileError
from infinite_id_core.files.adapters import describe_adapter, read_adapter
from infinite_id_core.files.identities import IDENTITY_FORMAT, read_identity
from infinite_id_core.files.infinite_id_format import ADAPTER_FORMAT
from infinite_id_core.files.pickles import open_pickle
from infinite_id_core.files.safetensors_file import (
    Header,
    is_pickle,
    json_object,
    open_safetensors,
    read_header,
)
from infinite_id_core.files.stored_tensor import StoredTensor
from infinite_id_core.files.system import open_regular, reading
from infinite_id_core.method.features import NORMED, Feature

from .findings import Findings, as_text, in_short
from .train.state import STATE

_MAX_ENTRIES = 2**20


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
        else as_text(values.file, findings)
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
            from .index_file import INDEX
            from .inspect_data import inspect_index

            if path.name != INDEX:  # its shards are found from its name and place
                raise UnknownFileError(
                    path, f"is a Parquet file; expected a dataset's {INDEX}, or its folder."
                )
            return inspect_index(path.parent, verify)
        if start[257:262] == b"ustar":
            from .inspect_data import inspect_shard

            return inspect_shard(path)
        if is_pickle(start):
            return _pickle(path)
        if start[8:9] == b"{":
            return _safetensors(path)
    except UnknownFileError:
        raise
    except FileError as error:
        return Findings(kind=_guess(start), problems=[error.problem])
    raise UnknownFileError(
        path, "is no safetensors, Parquet, tar or pickle file; expected one that prepare, train "
        "or a node wrote."
    )  # fmt: skip


def _guess(start: bytes) -> str:
    return "index" if start.startswith(b"PAR1") else "safetensors"


def _folder(path: Path, verify: bool) -> Findings:
    from .index_file import INDEX
    from .inspect_data import inspect_index

    with reading(path):
        if (path / INDEX).is_file():
            return inspect_index(path, verify)
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
    seen: set[int] = set()
    entries = 0
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:  # each once: containers that hold one another have no end
            continue
        if isinstance(value, StoredTensor):
            found.append((name, value))
        elif isinstance(value, Mapping | list | tuple):
            entries += len(value)
            if entries > _MAX_ENTRIES:
                raise UnknownFileError(path, f"has more than {_MAX_ENTRIES} entries.")
            inside = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{str(key)[:200]}"[-200:], entry) for key, entry in inside]
        else:
            continue
        seen.add(id(value))
    size = sum(math.prod(t.shape) * t.dtype.itemsize for _, t in found)
    if size > 2 * path.stat().st_size:
        raise UnknownFileError(
            path, f"has {size} bytes of tensors, more than twice its own size: they share memory."
        )
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
    findings.facts |= _published(path)
    findings.tables["tensors"] = _by_prefix(header)
    findings.problems += _numbers(path)
    return findings


def _published(path: Path) -> dict[str, str]:
    """What kind of published adapter a file is, if it is one."""
    try:
        return {"adapter": "; ".join(describe_adapter(path).record.summary.splitlines())}
    except FileError:
        return {}


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
    return [*in_short(problems), *_not_finite(wrong)]


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
        findings.facts["references"] = identity.references
        findings.facts["weights"] = [round(w, 4) for w in identity.weight.tolist()]
        for name, feature in identity.features.items():
            _feature(findings, name, feature)
    return findings


def _feature(findings: Findings, name: str, feature: Feature) -> None:
    """What one feature of an identity is."""
    read = feature.reading
    findings.facts[name] = f"{read.output} of {read.model}, {list(read.shape)}"
    if read.is_embedding:
        lengths = feature.value.float().norm(dim=1)
        findings.facts[f"lengths of the {name} embeddings"] = [
            round(v, 4) for v in lengths.tolist()
        ]
        if read.output == NORMED and bool(((lengths - 1).abs() > 1e-2).any()):
            findings.problems.append(f"its config says normed, and its {name} embeddings are not.")


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
    size, known = {"megabytes": round(path.stat().st_size / 2**20, 2)}, _published(path)
    if known:  # read by the reader that can call nothing, as the nodes do
        return Findings(kind="pickle", facts={**size, **known})
    return Findings(
        kind="pickle",
        facts=dict(size),
        problems=[
            "a pickle can run code and was not opened. If you trust its source: "
            "python -m trainer convert IN OUT.safetensors"
        ],
    )
