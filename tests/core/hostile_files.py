"""Files that must be refused, as runnable builders, and the sound files they are made from.

Everything is put together byte by byte, without the code under test and without safetensors.
Run it to have every file on disk: ``python tests/core/hostile_files.py FOLDER``.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

KINDS = ("adapter", "identity", "features")  # the last: version 2 of an identity
D, C, T = 6, 4, 2  # clip width, context width, face tokens
LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0": 8,
    "mid_block.attentions.0.transformer_blocks.1": 16,
}
FIRST_K = f"layers.{next(iter(LAYERS))}.to_k.weight"
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1, "F8_E4M3": 1}
HUGE = 2**40


@dataclass
class Entry:
    """One tensor: its dtype and shape as the header gives them, and its bytes."""

    dtype: str
    shape: list[Any]
    data: bytes


@dataclass
class File:
    """A safetensors file in parts; tensors lie in the order of ``tensors``."""

    kind: str
    tensors: dict[str, Entry]
    metadata: dict[str, Any]
    config: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Header entries that replace the true ones."""
    trailer: bytes = b""

    def header(self) -> dict[str, Any]:
        """The header's JSON value."""
        entries: dict[str, Any] = {}
        position = 0
        for name, tensor in self.tensors.items():
            end = position + len(tensor.data)
            entries[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [position, end],
            }
            position = end
        metadata = {"config": json.dumps(self.config), **self.metadata}
        metadata = {k: v for k, v in metadata.items() if v is not None}
        return {"__metadata__": metadata, **entries, **self.entries}

    def data(self) -> bytes:
        """All tensors' bytes."""
        return b"".join(tensor.data for tensor in self.tensors.values()) + self.trailer

    def bytes(self, header: bytes | None = None) -> bytes:
        """The whole file."""
        raw = json.dumps(self.header()).encode() if header is None else header
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + self.data()


def tensor(shape: list[int], dtype: str = "F16", value: float = 0.0) -> Entry:
    """A sound tensor of one value."""
    one = {"F16": "<e", "F32": "<f"}.get(dtype)
    data = struct.pack(one, value) * prod(shape) if one else bytes(prod(shape) * WIDTHS[dtype])
    return Entry(dtype, shape, data)


def adapter() -> File:
    """A sound adapter file of two layers."""
    shapes: dict[str, list[int]] = {}
    for mapper, (width, hidden, out) in {
        "clip_mapper": (D, D, C),
        "face_mapper": (512, 1024, T * C),
    }.items():
        shapes[f"{mapper}.proj_in.weight"] = [hidden, width]
        shapes[f"{mapper}.proj_in.bias"] = [hidden]
        shapes[f"{mapper}.proj_out.weight"] = [out, hidden]
        shapes[f"{mapper}.proj_out.bias"] = [out]
        shapes[f"{mapper}.norm.weight"] = [C]
        shapes[f"{mapper}.norm.bias"] = [C]
    for path, width in LAYERS.items():
        shapes[f"layers.{path}.to_k.weight"] = [width, C]
        shapes[f"layers.{path}.to_v.weight"] = [width, C]
    return File(
        kind="adapter",
        tensors={name: tensor(shape) for name, shape in shapes.items()},
        metadata={"format": "infinite-id-adapter", "version": "1"},
        config={
            "clip_width": D,
            "context_width": C,
            "face_tokens": T,
            "recogniser": "made/reader",
            "clip_model": "made-14",
        },
    )


def identity(references: int = 2) -> File:
    """A sound identity file."""
    return File(
        kind="identity",
        tensors={
            "face": tensor([references, 512], "F32", 0.5),
            "clip": tensor([references, 257, D], "F16", 0.25),
            "weight": tensor([references], "F32", 1.0),
        },
        metadata={"format": "infinite-id-identity", "version": "1"},
        config={"recogniser": "made/reader", "clip_model": "made-14", "name": "made"},
    )


def features(references: int = 2) -> File:
    """A sound identity file of version 2: three features, one with a null."""
    return File(
        kind="features",
        tensors={
            "face.value": tensor([references, 512], "F32", 0.5),
            "clip.value": tensor([references, 257, D], "F16", 0.25),
            "pooled.null": tensor([8], "F16", 0.125),
            "pooled.value": tensor([references, 8], "F32", 2.0),
            "weight": tensor([references], "F32", 1.0),
        },
        metadata={"format": "infinite-id-identity", "version": "2"},
        config={
            "features": {
                "face": {"model": "made/reader", "output": "normed", "shape": [512], "cut": ""},
                "clip": {"model": "made-14", "output": "last", "shape": [257, D]},
                "pooled": {"model": "made-L", "output": "pooled", "shape": [8], "cut": "grey"},
            },
            "name": "made",
        },
    )


SOUND: dict[str, Callable[[], File]] = {
    "adapter": adapter,
    "identity": identity,
    "features": features,
}


class Harm:
    """Unpickled, it makes a file: the proof that something of a pickle ran."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.target), "w")


@dataclass(frozen=True)
class Threat:
    """A bad file: the error that must name it, and how to make it from a sound one."""

    error: str
    build: Callable[[File, Path], bytes]
    kinds: tuple[str, ...] = KINDS
    loads: bool = False
    """Whether tensors must be read to see it."""


THREATS: dict[str, Threat] = {}
_Build = Callable[[File, Path], bytes]


def threat(
    name: str, error: str, kinds: tuple[str, ...] = KINDS, loads: bool = False
) -> Callable[[_Build], _Build]:
    """Register a builder: ``(sound file, path its pickle would create) -> bytes``."""

    def add(build: _Build) -> _Build:
        assert name not in THREATS
        THREATS[name] = Threat(error, build, kinds, loads)
        return build

    return add


def changed(
    name: str,
    error: str,
    change: Callable[[File], Any],
    kinds: tuple[str, ...] = KINDS,
    loads: bool = False,
) -> None:
    """Register a change of the sound file's parts."""

    def build(file: File, harm: Path) -> bytes:
        change(file)
        return file.bytes()

    threat(name, error, kinds, loads)(build)


def first(file: File) -> str:
    """Name of a tensor that carries no special meaning for other tensors' shapes."""
    return {
        "adapter": "clip_mapper.norm.bias", "identity": "face", "features": "pooled.value",
    }[file.kind]  # fmt: skip


# --- not safetensors at all ------------------------------------------------------------------

IDENTITIES = ("identity", "features")
"""Adapters are read out of pickles of tensors, too."""

for protocol in range(6):
    # Protocols 0 and 1 have no magic bytes: their text reads as an absurd header length.
    error = "NotSafetensorsError" if protocol >= 2 else "HeaderTooLargeError"
    of_adapters = "UnsafePickleError" if protocol >= 2 else error
    for kinds, named in ((IDENTITIES, error), (("adapter",), of_adapters)):

        @threat(f"pickle, protocol {protocol}, {kinds[0]}", named, kinds)
        def _(file: File, harm: Path, protocol: int = protocol) -> bytes:
            return pickle.dumps({"state_dict": Harm(harm)}, protocol=protocol)


def _torch(harm: Path, zipped: bool) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save({"a": Harm(harm)}, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


for kinds, harmful, tiny in (
    (IDENTITIES, "NotSafetensorsError", "NotSafetensorsError"),
    (("adapter",), "UnsafePickleError", "NotConvertibleError"),
):
    kind = kinds[0]
    threat(f"torch zip, {kind}", harmful, kinds)(lambda file, harm: _torch(harm, True))
    threat(f"torch legacy, {kind}", harmful, kinds)(lambda file, harm: _torch(harm, False))
    threat(f"tiny pickle, {kind}", tiny, kinds)(lambda file, harm: pickle.dumps(None, protocol=4))
threat("web page", "HeaderTooLargeError")(lambda file, harm: b"<!DOCTYPE html><html>404</html>")
threat("git-lfs pointer", "HeaderTooLargeError")(
    lambda file, harm: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
)
threat("empty file", "TruncatedFileError")(lambda file, harm: b"")
threat("seven bytes", "TruncatedFileError")(lambda file, harm: b"\x10" + bytes(6))
threat("all zeros", "HeaderError")(lambda file, harm: bytes(4096))


# --- the header ------------------------------------------------------------------------------


def _claim(length: int) -> _Build:
    return lambda file, harm: length.to_bytes(8, "little") + file.bytes()[8:]


threat("giant header", "HeaderTooLargeError")(_claim(2**63))
threat("largest header", "HeaderTooLargeError")(_claim(2**64 - 1))
threat("header just too large", "HeaderTooLargeError")(_claim(16 * 2**20 + 1))
threat("header longer than the file", "TruncatedFileError")(_claim(8 * 2**20))


def _raw(name: str, header: bytes, error: str = "HeaderError") -> None:
    threat(name, error)(lambda file, harm: file.bytes(header))


_raw("header not JSON", b"{not json}")
_raw("header not UTF-8", b'{"\xff\xfe": 1}')
_raw("header with a BOM", b"\xef\xbb\xbf{}")
_raw("header is a list", b"[]")
_raw("header is a number", b"7")
_raw("header is text", b'"text"')
_raw("header is null", b"null")
_raw("header nested deeply", b"[" * 200_000)
_raw("header opens and ends", b"{")
_raw("header of JSON's other numbers", b'{"a": NaN}')
_raw("metadata is a list", b'{"__metadata__": []}')
_raw("metadata is null", b'{"__metadata__": null}', "TruncatedFileError")  # and no tensors
_raw("metadata of numbers", b'{"__metadata__": {"version": 1}}')
_raw("number of 5000 digits", b'{"a": ' + b"9" * 5000 + b"}")


@threat("twin tensors", "HeaderError")
def _twins(file: File, harm: Path) -> bytes:
    name = first(file)
    entry = json.dumps({name: file.header()[name]})[1:-1]
    return file.bytes(f"{json.dumps(file.header())[:-1]}, {entry}}}".encode())


@threat("twin metadata", "HeaderError")
def _twin_metadata(file: File, harm: Path) -> bytes:
    raw = json.dumps(file.header())
    return file.bytes(raw.replace('"version": "', '"version": "9", "version": "').encode())


def _entry(name: str, error: str = "HeaderError", **changes: Any) -> None:
    """A change of one header entry; None drops a field."""

    def change(file: File) -> None:
        entry = {**file.header()[first(file)], **changes}
        file.entries[first(file)] = {k: v for k, v in entry.items() if v is not None}

    changed(name, error, change)


_entry("entry without dtype", dtype=None)
_entry("entry without shape", shape=None)
_entry("entry without offsets", data_offsets=None)
_entry("one offset", data_offsets=[0])
_entry("three offsets", data_offsets=[0, 1, 2])
_entry("offsets are text", data_offsets=["0", "8"])
_entry("offsets are fractions", data_offsets=[0.0, 8.0])
_entry("offsets run backwards", data_offsets=[8, 0])
_entry("offset below zero", data_offsets=[-8, 0])
_entry("offset beyond 64 bits", data_offsets=[0, 2**80])
_entry("shape is text", shape="4")
_entry("shape of truth values", shape=[True])
_entry("shape below zero", shape=[-1, -4])
_entry("shape disagrees with offsets", shape=[5])
_entry("shape of 2**40", shape=[HUGE])
_entry("shape overflows to its size", shape=[2**33, 2**33, 4])
_entry("a million dimensions", shape=[9] * 1_000_000)
_entry("dimensions of 4000 digits", shape=[10**4000] * 100)
_entry("dtype is a list", dtype=["F16"])
_entry("dtype is an object", dtype={})
_entry("dtype is a number", dtype=7)


@threat("dtype is null", "HeaderError")
def _dtype_null(file: File, harm: Path) -> bytes:
    header = file.header()
    header[first(file)]["dtype"] = None
    return file.bytes(json.dumps(header).encode())


@threat("null metadata", "WrongFormatError")
def _null_metadata(file: File, harm: Path) -> bytes:
    return file.bytes(json.dumps({**file.header(), "__metadata__": None}).encode())


@threat("entry is a number", "HeaderError")
def _entry_number(file: File, harm: Path) -> bytes:
    return file.bytes(json.dumps({**file.header(), first(file): 7}).encode())


# --- bytes -----------------------------------------------------------------------------------


def _moved(file: File, by: int) -> None:
    """Move the second tensor's bytes and all later ones."""
    for name in list(file.tensors)[1:]:
        entry = file.header()[name]
        start, end = entry["data_offsets"]
        file.entries[name] = {**entry, "data_offsets": [start + by, end + by]}


def _hole(file: File) -> None:
    _moved(file, 8)
    file.trailer = bytes(8)


def _aliased(file: File) -> None:
    """Two tensors on the same bytes."""
    a, b = list(file.tensors)[:2]
    size = len(file.tensors[a].data)
    file.entries[b] = {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}


def _claimed(file: File) -> None:
    """A last tensor of 2**40 elements with offsets to match and no bytes."""
    start = len(file.data())
    file.entries["huge"] = {
        "dtype": "F16",
        "shape": [HUGE],
        "data_offsets": [start, start + 2 * HUGE],
    }


changed("overlapping tensors", "OverlappingOffsetsError", lambda f: _moved(f, -8))
changed("hole between tensors", "OverlappingOffsetsError", _hole)
changed("aliased tensors", "OverlappingOffsetsError", _aliased)
changed("terabytes claimed", "TruncatedFileError", _claimed)
changed("bytes at the end", "TruncatedFileError", lambda f: setattr(f, "trailer", b"\0"))
threat("one byte short", "TruncatedFileError")(lambda file, harm: file.bytes()[:-1])
threat("only the header", "TruncatedFileError")(
    lambda file, harm: file.bytes()[: -len(file.data())]
)
threat("two files", "TruncatedFileError")(lambda file, harm: file.bytes() * 2)


# --- format and version ----------------------------------------------------------------------


def _metadata(name: str, error: str, **values: Any) -> None:
    changed(name, error, lambda f: f.metadata.update(values))


@threat("no metadata", "WrongFormatError")
def _no_metadata(file: File, harm: Path) -> bytes:
    header = file.header()
    del header["__metadata__"]
    return file.bytes(json.dumps(header).encode())


threat("the other kind", "WrongFormatError")(
    lambda file, harm: (identity if file.kind == "adapter" else adapter)().bytes()
)
_metadata("no format", "WrongFormatError", format=None)
_metadata("foreign format", "WrongFormatError", format="pt")
_metadata("format of a megabyte", "WrongFormatError", format="x" * 2**20)
_metadata("newer version", "NewerVersionError", version="3")
changed("newer version of adapters", "NewerVersionError",
        lambda f: f.metadata.update(version="2"), ("adapter",))  # fmt: skip
changed("version 1 named 2", "ConfigError",
        lambda f: f.metadata.update(version="2"), ("identity",))  # fmt: skip
changed("version 2 named 1", "ConfigError",
        lambda f: f.metadata.update(version="1"), ("features",))  # fmt: skip
_metadata("much newer version", "NewerVersionError", version="999999999")
_metadata("no version", "ConfigError", version=None)
for version in ("", "0", "-1", "1.5", "one", " 1", "1\n", "01", "\u0661", "9" * 5000):
    _metadata(f"version {version[:9]!r}", "ConfigError", version=version)


# --- configuration ---------------------------------------------------------------------------


def _config(name: str, kinds: tuple[str, ...] = KINDS, **values: Any) -> None:
    changed(name, "ConfigError", lambda f: f.config.update(values), kinds)


_metadata("no configuration", "ConfigError", config=None)
for text in ("", "{", "not json", "[]", "7", "null", "[" * 100_000, '{"a": 1, "a": 1}'):
    _metadata(f"configuration {text[:9]!r}", "ConfigError", config=text)
_config("unknown entry", colour="red")
_config("a thousand unknown entries", **{f"{i:0>1000}": i for i in range(1000)})
FLAT = ("adapter", "identity")
_config("number for a name", FLAT, recogniser=7)
_config("null for a name", FLAT, recogniser=None)
_config("list for a name", FLAT, clip_model=["ViT"])
_config("unknown embedding", FLAT, embedding="unit")
_config("unknown layer", FLAT, clip_layer="first")
changed("entry missing", "ConfigError", lambda f: f.config.pop("recogniser"), FLAT)
for key in ("clip_width", "context_width", "face_width", "face_tokens"):
    for value in (0, -1, 2**17, 10**4299, 4.0, "4", True, None, [4]):
        shown = repr(value) if value != 10**4299 else "10**4299"
        _config(f"{key} {shown}", ("adapter",), **{key: value})
_config("training step below zero", ("adapter",), training_step=-1)


# --- tensors ---------------------------------------------------------------------------------


def _put(file: File, name: str, entry: Entry) -> None:
    file.tensors[name] = entry


def _each(kind: str) -> list[str]:
    return list(SOUND[kind]().tensors)


for kind in KINDS:
    for name in _each(kind):
        if not name.startswith("layers.") and not name.endswith(".null"):  # which need not be
            changed(f"{kind} without {name}", "MissingTensorError",
                    lambda f, name=name: f.tensors.pop(name), (kind,))  # fmt: skip
        changed(f"{kind} with one more in {name}", "WrongShapeError",
                lambda f, name=name: _put(f, name, tensor([1, *f.tensors[name].shape])),
                (kind,))  # fmt: skip
        changed(f"{kind} with {name} empty", "WrongShapeError",
                lambda f, name=name: _put(f, name, tensor([0, *f.tensors[name].shape[1:]])),
                (kind,))  # fmt: skip
changed("extra tensor", "UnexpectedTensorError", lambda f: _put(f, "more", tensor([1])))
changed("tensor of an empty name", "UnexpectedTensorError", lambda f: _put(f, "", tensor([1])))
changed("tensor of a long name", "UnexpectedTensorError",
        lambda f: _put(f, "x" * 2**20, tensor([1])))  # fmt: skip
for dtype in ("I64", "BOOL", "F64", "F8_E4M3"):
    changed(f"dtype {dtype}", "WrongDtypeError",
            lambda f, dtype=dtype: _put(
                f, first(f), tensor(f.tensors[first(f)].shape, dtype)))  # fmt: skip
changed("dtype of the future", "WrongDtypeError",
        lambda f: setattr(f.tensors[first(f)], "dtype", "F3_E1M1"))  # fmt: skip
for value in (float("nan"), float("inf"), float("-inf")):
    for kind in KINDS:
        for name in (_each(kind)[0], _each(kind)[-1]):

            def spoil(file: File, name: str = name, value: float = value) -> None:
                entry = file.tensors[name]
                last = struct.pack({"F16": "<e", "F32": "<f"}[entry.dtype], value)
                entry.data = entry.data[: -len(last)] + last

            changed(f"{value} in {kind}'s {name}", "NotFiniteError", spoil, (kind,), loads=True)


def _layer(name: str, error: str, change: Callable[[File], Any]) -> None:
    changed(name, error, change, ("adapter",))


def _drop_layers(file: File) -> None:
    file.tensors = {n: t for n, t in file.tensors.items() if not n.startswith("layers.")}


_layer("no layers", "MissingTensorError", _drop_layers)
_layer("K without V", "MissingTensorError",
       lambda f: f.tensors.pop(FIRST_K.replace("to_k", "to_v")))  # fmt: skip
_layer("V without K", "MissingTensorError", lambda f: f.tensors.pop(FIRST_K))
_layer("K wider than V", "WrongShapeError", lambda f: _put(f, FIRST_K, tensor([16, C])))
_layer("K of another context", "WrongShapeError", lambda f: _put(f, FIRST_K, tensor([8, C + 1])))
_layer("K is a vector", "WrongShapeError", lambda f: _put(f, FIRST_K, tensor([8])))
_layer("K is a number", "WrongShapeError", lambda f: _put(f, FIRST_K, tensor([])))
for path in (
    "..",
    "down_blocks.1.attentions.0",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.\u0661.attentions.0.transformer_blocks.0",
    "down_blocks.-1.attentions.0.transformer_blocks.0",
    "__class__",
):
    _layer(f"layer path {path!r}", "UnexpectedTensorError",
           lambda f, path=path: _put(f, f"layers.{path}.to_k.weight", tensor([8, C])))  # fmt: skip


def _references(n: int) -> Callable[[File], None]:
    """Header only: whole-number tensors may have any size there, and are refused later."""

    def change(file: File) -> None:
        shapes = {"face": [n, 512], "clip": [n, 257, D], "weight": [n]}
        for name, shape in shapes.items():
            _put(file, name, Entry("I64", shape, b""))

    return change


def _wide(file: File) -> None:
    _put(file, "clip", Entry("I64", [2, 257, HUGE], b""))


changed("no reference", "WrongShapeError", _references(0), ("identity",))
changed("4097 references", "WrongShapeError", _references(4097), ("identity",))
changed("2**40 references", "WrongShapeError", _references(HUGE), ("identity",))
changed("clip 2**40 wide", "WrongShapeError", _wide, ("identity",))
changed("clip of no dimension", "WrongShapeError",
        lambda f: _put(f, "clip", tensor([])), ("identity",))  # fmt: skip
changed("references disagree", "WrongShapeError",
        lambda f: _put(f, "face", tensor([3, 512])), ("identity",))  # fmt: skip
for weight in (0.0, -1.0):
    changed(f"weight {weight}", "ConfigError",
            lambda f, weight=weight: _put(f, "weight", tensor([2], "F32", weight)),
            ("identity", "features"), loads=True)  # fmt: skip


# --- version 2 of an identity ----------------------------------------------------------------


def _feature(name: str, value: Any, feature: str = "pooled") -> None:
    """A feature that is recorded otherwise."""
    changed(f"feature {name}", "ConfigError",
            lambda f: f.config["features"].update({feature: value}), ("features",))  # fmt: skip


def _entries(name: str, **values: Any) -> None:
    _feature(name, {"model": "m", "output": "pooled", "shape": [8], **values})


_config("no features", ("features",), features={})
_config("features null", ("features",), features=None)
_config("features a list", ("features",), features=["face"])
changed("name a number", "ConfigError", lambda f: f.config.update(name=7), ("features",))
changed("features missing", "ConfigError", lambda f: f.config.pop("features"), ("features",))
_config("a thousand features", ("features",), features={
    f"f{i}": {"model": "m", "output": "o", "shape": [8]} for i in range(1000)})  # fmt: skip
for value in (None, 7, [], "pooled", {}, {"model": "m", "output": "o"}):
    _feature(f"recorded as {value!r}", value)
_entries("with an unknown entry", colour="red")
for key in ("model", "output", "cut"):
    for value in (None, 7, ["m"], "x" * 201):
        _entries(f"whose {key} is {repr(value)[:9]}", **{key: value})
for value in (None, 8, "8", [], [8] * 5, [0], [-8], [8.0], ["8"], [True], [[8]], [2**14 + 1],
              [HUGE], [9] * 100_000):  # fmt: skip
    _entries(f"of shape {repr(value)[:20]}", shape=value)
for name in ("", "Pooled", "pooled.value", "../pooled", "po oled", "p" * 33, "9", "po\u0131led"):
    _feature(f"of the name {name[:9]!r}", {"model": "m", "output": "o", "shape": [8]}, name)


def _unrecorded(file: File) -> None:
    file.config["features"].pop("pooled")


def _unheld(file: File) -> None:
    file.config["features"]["more"] = {"model": "m", "output": "o", "shape": [8]}


changed("feature not recorded", "UnexpectedTensorError", _unrecorded, ("features",))
changed("feature not held", "MissingTensorError", _unheld, ("features",))
changed("null of no feature", "UnexpectedTensorError",
        lambda f: _put(f, "more.null", tensor([8])), ("features",))  # fmt: skip
changed("null of another shape", "WrongShapeError",
        lambda f: _put(f, "pooled.null", tensor([1, 8])), ("features",))  # fmt: skip
changed("features' references disagree", "WrongShapeError",
        lambda f: _put(f, "face.value", tensor([3, 512])), ("features",))  # fmt: skip
for n in (0, 4097, HUGE):
    changed(f"{n} weights", "WrongShapeError",
            lambda f, n=n: _put(f, "weight", Entry("I64", [n], b"")), ("features",))  # fmt: skip

CASES = [(kind, name) for name, t in THREATS.items() for kind in t.kinds]


def build(kind: str, name: str, harm: Path) -> bytes:
    """The bytes of one bad file; ``harm`` is what a pickle in it would create."""
    return THREATS[name].build(SOUND[kind](), harm)


def main() -> None:
    """Write every bad file into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, (kind, name) in enumerate(CASES):
        path = folder / f"{number:03d}-{kind}.safetensors"
        path.write_bytes(build(kind, name, folder / "harm"))
        print(f"{path.name}  {THREATS[name].error}  {name}")


if __name__ == "__main__":
    main()
