"""Adapter and identity files: read, check, write (DESIGN: contracts, version 1).

Reading promises: nothing of a file is executed; a bad file is refused with a named error that
gives the path and what is wrong; shapes are checked against the header before any tensor is
read. Writing promises: the old file stays good until the new one is complete on disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter import FACE_HIDDEN, Adapter, AdapterConfig, dataclass_from_json
from .errors import (
    ConfigError,
    FileMissingError,
    HeaderError,
    HeaderTooLargeError,
    MissingTensorError,
    NameNotAllowedError,
    NewerVersionError,
    NotFiniteError,
    NotSafetensorsError,
    NotWrittenError,
    OptionError,
    OverlappingOffsetsError,
    TruncatedFileError,
    UnexpectedTensorError,
    WrongDtypeError,
    WrongFormatError,
    WrongShapeError,
)
from .identity import CLIP_TOKENS, FACE_WIDTH, Identity, IdentityConfig

ADAPTER_FORMAT = "infinite-id-adapter"
IDENTITY_FORMAT = "infinite-id-identity"
VERSION = 1

MAX_HEADER = 16 * 2**20  # bytes; SDXL's 70 layers need 20 kB
MAX_REFERENCES = 4096
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """A checked safetensors header."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


# --- adapters --------------------------------------------------------------------------------


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file into a CPU module of the file's own dtype.

    Raises a subclass of ``FileError``; nothing is loaded from a file that fails any check.
    """
    config, tensors = read_adapter_tensors(path)
    return build_adapter(config, tensors)


def read_adapter_tensors(path: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Checked configuration and tensors of an adapter file."""
    path = Path(path)
    header = read_header(path)
    values = _config_of(path, header, ADAPTER_FORMAT)
    try:
        config = AdapterConfig.from_json(values)
    except OptionError as error:
        raise ConfigError(path, f"bad adapter configuration: {error}") from error
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    _check_shapes(path, shapes, _adapter_shapes(path, config, shapes))
    return config, _read_tensors(path, header)


def build_adapter(
    config: AdapterConfig, tensors: Mapping[str, Tensor], operations: Any = torch.nn
) -> Adapter:
    """An ``Adapter`` that holds ``tensors`` themselves (no copy), built without allocating."""
    with torch.device("meta"):
        # Frozen first: a tensor made in inference mode cannot become a trainable parameter.
        adapter = Adapter(config, _widths(tensors), operations).requires_grad_(False)
    adapter.load_state_dict(dict(tensors), assign=True)
    return adapter.requires_grad_(False)


def write_adapter(path: str | Path, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
    """Write an adapter file atomically, in ``dtype`` (default: as it is).

    Raises ``NotFiniteError`` or ``NotWrittenError``; a file that was there before stays.
    """
    tensors = {
        name: t.detach().to(device="cpu", dtype=dtype or t.dtype).contiguous()
        for name, t in adapter.state_dict().items()
    }
    _write(path, tensors, ADAPTER_FORMAT, adapter.config.to_json())


def _widths(tensors: Mapping[str, Any]) -> dict[str, int]:
    widths = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(.+)\.to_k\.weight", name)
        if match:
            widths[match[1]] = int(tensor.shape[0])
    return widths


def _adapter_shapes(
    path: Path, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Every tensor an adapter of this configuration and these layers must have."""
    c, d, wide = config.context_width, config.clip_width, config.face_tokens * config.context_width
    wanted: dict[str, tuple[int, ...]] = {}
    for mapper, (width, hidden, out) in {
        "clip_mapper": (d, d, c),
        "face_mapper": (config.face_width, FACE_HIDDEN, wide),
    }.items():
        wanted |= {
            f"{mapper}.proj_in.weight": (hidden, width),
            f"{mapper}.proj_in.bias": (hidden,),
            f"{mapper}.proj_out.weight": (out, hidden),
            f"{mapper}.proj_out.bias": (out,),
            f"{mapper}.norm.weight": (c,),
            f"{mapper}.norm.bias": (c,),
        }
    layer = re.compile(
        r"layers\.(?P<path>(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+"
        r"\.transformer_blocks\.\d+)\.to_[kv]\.weight",
        re.ASCII,
    )
    for name, shape in shapes.items():
        match = layer.fullmatch(name)
        if match:
            width = shape[0] if shape else 1
            for part in ("to_k", "to_v"):
                wanted.setdefault(f"layers.{match['path']}.{part}.weight", (width, c))
    if not any(name.startswith("layers.") for name in wanted):
        raise MissingTensorError(path, "has no layer at all (layers.<path>.to_k.weight).")
    return wanted


# --- identities ------------------------------------------------------------------------------


def read_identity(path: str | Path) -> Identity:
    """Read an identity file. Raises a subclass of ``FileError``."""
    path = Path(path)
    header = read_header(path)
    values = _config_of(path, header, IDENTITY_FORMAT)
    try:
        config: IdentityConfig = dataclass_from_json(IdentityConfig, values)
    except OptionError as error:
        raise ConfigError(path, f"bad identity configuration: {error}") from error
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    n = shapes["weight"][0] if len(shapes.get("weight", ())) == 1 else 1
    clip = shapes.get("clip", (n, CLIP_TOKENS, 1))
    if len(clip) != 3:
        raise WrongShapeError(
            path, f"clip has shape {list(clip)}; expected [{n}, {CLIP_TOKENS}, encoder's width]."
        )
    if not 1 <= n <= MAX_REFERENCES:
        raise WrongShapeError(path, f"holds {n} references; expected 1 to {MAX_REFERENCES}.")
    wanted: dict[str, tuple[int, ...]] = {
        "face": (n, FACE_WIDTH),
        "clip": (n, CLIP_TOKENS, clip[2]),
        "weight": (n,),
    }
    _check_shapes(path, shapes, wanted)
    # Copies: loaded tensors are a view of the file, which Windows then refuses to replace.
    tensors = {name: tensor.clone() for name, tensor in _read_tensors(path, header).items()}
    try:
        return Identity(
            face=tensors["face"].float(),
            clip=tensors["clip"],
            weight=tensors["weight"].float(),
            config=config,
        )
    except OptionError as error:
        raise ConfigError(path, str(error)) from error


def write_identity(path: str | Path, identity: Identity) -> None:
    """Write an identity file atomically. It holds biometric features, and no photo.

    Raises ``NotFiniteError`` or ``NotWrittenError``; a file that was there before stays.
    """
    clip = identity.clip if identity.clip.dtype == torch.float16 else identity.clip.float()
    tensors = {
        "face": identity.face.float().cpu().contiguous(),
        "clip": clip.cpu().contiguous(),
        "weight": identity.weight.float().cpu().contiguous(),
    }
    _write(path, tensors, IDENTITY_FORMAT, asdict(identity.config))


def identity_path(folder: str | Path, name: str) -> Path:
    """The file of an identity by its name; the name never leaves ``folder``.

    Allowed: letters and digits of any script, spaces and ``-_.()+``, starting with a letter or
    digit, at most 100 characters and 200 bytes (file systems end at 255), not a name Windows
    reserves. Raises ``NameNotAllowedError``.
    """
    stem = unicodedata.normalize("NFC", name.strip().removesuffix(".safetensors"))
    # Letters of many scripts carry marks (category M), which \w leaves out.
    plain = all(c in " -_.()+" or unicodedata.category(c)[0] in "LMN" for c in stem)
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|(com|lpt)[\d¹²³])\s*(\..*)?", stem)
    fits = len(stem) <= 100 and len(stem.encode("utf-8", "replace")) <= 200
    if not (plain and fits and stem[:1].isalnum() and stem[-1] not in ". ") or reserved:
        shown = repr(name if len(name) <= 100 else f"{name[:100]}...")
        raise NameNotAllowedError(
            "Expected a plain name such as 'anna' (at most 100 letters, digits, spaces, - _ . ( ) "
            f"+), got {shown}. Folders are not part of the name."
        )
    return Path(folder) / f"{stem}.safetensors"


# --- safetensors, carefully ------------------------------------------------------------------


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header without touching the tensors.

    Raises ``FileMissingError``, ``NotSafetensorsError``, ``TruncatedFileError``,
    ``HeaderTooLargeError``, ``HeaderError``, ``OverlappingOffsetsError``.
    """
    path = Path(path)
    try:
        return _read_header(path)
    except OSError as error:
        raise FileMissingError(path, f"cannot be opened ({error.strerror}).") from error


def _read_header(path: Path) -> Header:
    if not path.is_file():
        raise FileMissingError(path, "is a folder." if path.is_dir() else "no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        # A header of 640 bytes starts like a pickle, too; its JSON opens with a brace.
        if start.startswith(_PICKLES) and file.read(1) != b"{":
            raise NotSafetensorsError(
                path,
                "is a pickle (or zip) whatever its name says, and was not opened. Convert it "
                "with 'python -m trainer convert' if you trust its source.",
            )
        file.seek(8)
        if len(start) < 8:
            raise TruncatedFileError(path, f"is {size} bytes long, too short for any file.")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            raise HeaderTooLargeError(
                path, f"claims a header of {length} bytes; expected at most {MAX_HEADER}. "
                "The file is damaged or not a safetensors file."
            )  # fmt: skip
        if 8 + length > size:
            raise TruncatedFileError(
                path, f"ends inside its header ({size} of at least {8 + length} bytes). "
                "Download or copy it again."
            )  # fmt: skip
        raw = file.read(length)
    return _parse_header(path, raw, size - 8 - length)


def _parse_header(path: Path, raw: bytes, data_size: int) -> Header:
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        metadata = values.pop("__metadata__", {})
        tensors = {name: _entry(value) for name, value in values.items()}
        if not all(isinstance(v, str) for v in metadata.values()):
            raise TypeError("metadata values must be text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderError(path, f"does not start with a safetensors header ({error}).") from error
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise OverlappingOffsetsError(
                path, f"tensor {name!r} starts at byte {entry.start}; expected {position}."
            )
        position = entry.end
    if position != data_size:
        raise TruncatedFileError(
            path, f"should hold {position} bytes of tensors and holds {data_size}. "
            "Download or copy it again."
        )  # fmt: skip
    return Header(tensors=tensors, metadata=metadata)


def _entry(value: Any) -> TensorEntry:
    start, end = value["data_offsets"]
    shape = tuple(value["shape"])
    dtype = value["dtype"]
    if len(shape) > _MAX_DIMENSIONS:  # a product of millions of numbers takes hours
        raise ValueError(f"a tensor has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < _MAX_SIZE for n in (start, end, *shape)):
        raise ValueError("shapes and offsets must be whole numbers")
    width = _FLOATS.get(dtype)
    if end < start or (width is not None and end - start != math.prod(shape) * width):
        raise ValueError(f"a tensor of shape {list(shape)} {dtype} cannot have {end - start} bytes")
    return TensorEntry(dtype=dtype, shape=shape, start=start, end=end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON readers disagree on which of two equal names holds; so neither does."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands there twice")
    return values


def _config_of(path: Path, header: Header, wanted: str) -> dict[str, Any]:
    found = header.metadata.get("format")
    if found != wanted:
        raise WrongFormatError(
            path, f"expected metadata format {wanted!r}, found {found!r}. "
            f"Its first tensors are {sorted(header.tensors)[:3]}."
        )  # fmt: skip
    version = header.metadata.get("version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ConfigError(path, f"version must be a whole number, found {version!r}.")
    if int(version) > VERSION:
        raise NewerVersionError(
            path, f"was written in version {version} of the format; this release reads up to "
            f"{VERSION}. Update Infinite-ID."
        )  # fmt: skip
    try:
        values = json.loads(
            header.metadata.get("config", ""), object_pairs_hook=_without_duplicates
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, f"its configuration is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(path, f"its configuration is {type(values).__name__}, not an object.")
    return values


def _check_shapes(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise MissingTensorError(path, f"lacks {len(missing)} tensors, e.g. {missing[:3]}.")
    if extra:
        raise UnexpectedTensorError(
            path, f"has {len(extra)} tensors this format does not know, e.g. {extra[:3]}."
        )
    for name, shape in wanted.items():
        if 0 in found[name]:
            raise WrongShapeError(path, f"{name} is empty (shape {list(found[name])}).")
        if found[name] != shape:
            raise WrongShapeError(
                path, f"{name} has shape {list(found[name])}; expected {list(shape)}."
            )


def _read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    for name, entry in header.tensors.items():
        if entry.dtype not in _FLOATS:
            raise WrongDtypeError(path, f"{name} is {entry.dtype}; expected F16, BF16 or F32.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise HeaderError(path, f"cannot be read ({error}).") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NotFiniteError(path, f"{name} holds NaN or infinity.")
    return tensors


def _write(
    path: str | Path, tensors: Mapping[str, Tensor], format_name: str, config: dict[str, Any]
) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NotFiniteError(path, f"not written: {name} holds NaN or infinity.")
    metadata = {
        "format": format_name,
        "version": str(VERSION),
        "config": json.dumps(config, sort_keys=True),
    }
    try:
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise NotWrittenError(
            path, f"could not be written ({error}). A file that was there before is unchanged."
        ) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The data is on disk (fsync) before the rename, so a crash or ``kill -9`` at any moment leaves
    either the old file or the whole new one. On an exception nothing changes. The new file has
    the old one's permissions, or those the umask gives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its files are for their owner alone, and so would be what replaces `path`.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    temporary.open("xb").close()
    mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
    try:
        yield temporary
        _set_mode(temporary, mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _set_mode(path: Path, mode: int) -> None:
    """safetensors writes files that only their owner reads, whatever the umask."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(OSError):  # not every file system has permissions
            path.chmod(mode)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows has no such call and needs none."""
    if os.name == "posix":
        with suppress(OSError):  # the file is in place; some network file systems refuse this
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


__all__ = [
    "ADAPTER_FORMAT",
    "IDENTITY_FORMAT",
    "Header",
    "build_adapter",
    "identity_path",
    "read_adapter",
    "read_adapter_tensors",
    "read_header",
    "read_identity",
    "replacing",
    "write_adapter",
    "write_identity",
]
