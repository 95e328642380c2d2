"""Adapter and identity files: read, check, write (DESIGN: contracts, version 1).

Reading promises: nothing of a file is executed; a bad file is refused with a named error that
gives the path and what is wrong; shapes are checked against the header before any tensor is
read. Writing promises: the old file stays good until the new one is complete on disk.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    ConfigError,
    FileTooLargeError,
    MissingTensorError,
    NameNotAllowedError,
    NameTakenError,
    NewerVersionError,
    NotFiniteError,
    NotWrittenError,
    OptionError,
    UnexpectedTensorError,
    WrongDtypeError,
    WrongFormatError,
    WrongShapeError,
)
from ..method.adapter import FACE_HIDDEN, MAX_WIDTH, Adapter, AdapterConfig, dataclass_from_json
from ..method.identity import CLIP_TOKENS, FACE_WIDTH, Identity, IdentityConfig, check_weights
from .atomic import creating, replacing
from .safetensors_file import (
    FLOATS,
    Header,
    SafetensorsFile,
    json_object,
    open_safetensors,
    read_header,
    save_tensors,
)
from .system import writing

ADAPTER_FORMAT = "infinite-id-adapter"
IDENTITY_FORMAT = "infinite-id-identity"
VERSION = 1

MAX_REFERENCES = 4096
MAX_TENSORS = 4 * 2**30  # bytes; SDXL's adapter takes 1.4e9 in float32


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
    with open_safetensors(path) as file:
        header = file.header
        values = _config_of(path, header, ADAPTER_FORMAT)
        try:
            config = AdapterConfig.from_json(values)
        except OptionError as error:
            raise ConfigError(path, f"bad adapter configuration: {error}") from error
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        _check_shapes(path, shapes, _adapter_shapes(path, config, shapes))
        _check_sizes(file)
        return config, {name: file.tensor(name) for name in header.tensors}


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
    _write(path, adapter.state_dict(), ADAPTER_FORMAT, adapter.config.to_json(), dtype=dtype)


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
    with open_safetensors(path) as file:
        values = _config_of(path, file.header, IDENTITY_FORMAT)
        try:
            config: IdentityConfig = dataclass_from_json(IdentityConfig, values)
        except OptionError as error:
            raise ConfigError(path, f"bad identity configuration: {error}") from error
        shapes = {name: entry.shape for name, entry in file.header.tensors.items()}
        _check_shapes(path, shapes, _identity_shapes(path, shapes))
        _check_sizes(file)
        try:
            weight = file.tensor("weight", torch.float32)
            check_weights(weight)  # before the features, which may be large
            return Identity(
                face=file.tensor("face", torch.float32),
                clip=file.tensor("clip"),
                weight=weight,
                config=config,
            )
        except OptionError as error:
            raise ConfigError(path, str(error)) from error


def _identity_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Every tensor of an identity of as many references and as wide features."""
    n = shapes["weight"][0] if len(shapes.get("weight", ())) == 1 else 1
    clip = shapes.get("clip", (n, CLIP_TOKENS, 1))
    if len(clip) != 3:
        raise WrongShapeError(
            path, f"clip has shape {list(clip)}; expected [{n}, {CLIP_TOKENS}, encoder's width]."
        )
    if not 1 <= n <= MAX_REFERENCES:
        raise WrongShapeError(path, f"holds {n} references; expected 1 to {MAX_REFERENCES}.")
    if clip[2] > MAX_WIDTH:
        raise WrongShapeError(
            path, f"clip is {clip[2]} wide; expected at most {MAX_WIDTH}, as image encoders are."
        )
    return {"face": (n, FACE_WIDTH), "clip": (n, CLIP_TOKENS, clip[2]), "weight": (n,)}


def write_identity(path: str | Path, identity: Identity, *, exclusive: bool = False) -> None:
    """Write an identity file atomically. It holds biometric features, and no photo.

    ``exclusive`` writes only where no file of this name is, whoever else writes at the moment.
    Raises ``NotFiniteError``, ``NotWrittenError`` or, with ``exclusive``, ``NameTakenError``; a
    file that was there before stays.
    """
    clip = identity.clip if identity.clip.dtype == torch.float16 else identity.clip.float()
    size = clip.numel() * clip.element_size()
    if (
        identity.references > MAX_REFERENCES
        or identity.clip_width > MAX_WIDTH
        or size > MAX_TENSORS // 2
    ):
        raise NotWrittenError(
            path, f"not written: {identity.references} references of width {identity.clip_width} "
            f"({size} bytes) are more than a file takes ({MAX_REFERENCES}, {MAX_WIDTH}, "
            f"{MAX_TENSORS // 2} bytes). Average some of them first."
        )  # fmt: skip
    tensors = {"face": identity.face.float(), "clip": clip, "weight": identity.weight.float()}
    _write(path, tensors, IDENTITY_FORMAT, asdict(identity.config), exclusive=exclusive)


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


# --- both -------------------------------------------------------------------------------------


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
        values = json_object(header.metadata.get("config", ""))
    except ValueError as error:
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


def _check_sizes(file: SafetensorsFile) -> None:
    """Types and the sum of sizes, before any tensor is read."""
    for name, entry in file.header.tensors.items():
        if entry.dtype not in FLOATS:
            raise WrongDtypeError(file.path, f"{name} is {entry.dtype}; expected F16, BF16 or F32.")
    size = sum(entry.end - entry.start for entry in file.header.tensors.values())
    if size > MAX_TENSORS:
        raise FileTooLargeError(
            file.path, f"holds {size} bytes of tensors; expected at most {MAX_TENSORS}. It was not "
            "read."
        )  # fmt: skip


def _write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    format_name: str,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    exclusive: bool = False,
) -> None:
    metadata = {
        "format": format_name,
        "version": str(VERSION),
        "config": json.dumps(config, sort_keys=True),
    }
    place = creating(path) if exclusive else replacing(path)
    try:
        with place as temporary:
            save_tensors(tensors, temporary, metadata, dtype=dtype)
    except NotFiniteError as error:  # which names the temporary file
        raise NotFiniteError(path, error.problem) from error
    except FileExistsError as error:
        if not exclusive:
            raise NotWrittenError(path, f"could not be written ({error}).") from error
        raise NameTakenError(
            path, "there is a file of this name already. Choose another name, or 'overwrite'."
        ) from error
    except OSError as error:
        with writing(path):
            raise error


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
