"""What adapter and identity files share: configuration, shapes and sizes checked before a tensor
is read, and writing that leaves the old file good until the new one is complete."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    ConfigError,
    FileTooLargeError,
    MissingTensorError,
    NameTakenError,
    NewerVersionError,
    NotFiniteError,
    NotWrittenError,
    UnexpectedTensorError,
    WrongDtypeError,
    WrongFormatError,
    WrongShapeError,
)
from .atomic import creating, replacing
from .safetensors_file import FLOATS, Header, json_object, save_tensors
from .system import writing
from .tensor_file import TensorFile

MAX_TENSORS = 4 * 2**30  # bytes; SDXL's adapter takes 1.4e9 in float32

Shapes = Mapping[str, tuple[int, ...]]


# --- reading ---------------------------------------------------------------------------------


def check_format(path: Path, header: Header, wanted: str) -> None:
    """Raise ``WrongFormatError`` where the metadata names another format, or none."""
    if header.metadata.get("format") != wanted:
        raise WrongFormatError(path, f"expected metadata format {wanted!r}, {what_it_is(header)}.")


def what_it_is(header: Header) -> str:
    """For a message: what a file of another format says of itself."""
    return (
        f"found {header.metadata.get('format')!r}. "
        f"Its first tensors are {sorted(header.tensors)[:3]}"
    )


def version_of(path: Path, header: Header, newest: int) -> int:
    """The version of the format. Raises ``ConfigError``, ``NewerVersionError``."""
    version = header.metadata.get("version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ConfigError(path, f"version must be a whole number, found {version[:40]!r}.")
    if int(version) > newest:
        raise NewerVersionError(
            path, f"was written in version {version} of the format; this release reads up to "
            f"{newest}. Update Infinite-ID."
        )  # fmt: skip
    return int(version)


def config_of(path: Path, header: Header) -> dict[str, Any]:
    """The configuration as JSON values. Raises ``ConfigError``."""
    try:
        values = json_object(header.metadata.get("config", ""))
    except ValueError as error:
        raise ConfigError(path, f"its configuration is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(path, f"its configuration is {type(values).__name__}, not an object.")
    return values


def shapes_of(header: Header) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name."""
    return {name: entry.shape for name, entry in header.tensors.items()}


def check_shapes(path: Path, found: Shapes, wanted: Shapes) -> None:
    """Raise ``MissingTensorError``, ``UnexpectedTensorError`` or ``WrongShapeError`` where the
    tensors are others than ``wanted``."""
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


def check_sizes(file: TensorFile, names: Collection[str] | None = None) -> None:
    """Types and the sum of sizes of all tensors, or of those ``names``, before any is read.

    Raises ``WrongDtypeError``, ``FileTooLargeError``.
    """
    tensors = file.header.tensors
    wanted = tensors if names is None else {name: tensors[name] for name in names}
    for name, entry in wanted.items():
        if entry.dtype not in FLOATS:
            raise WrongDtypeError(file.path, f"{name} is {entry.dtype}; expected F16, BF16 or F32.")
    size = sum(entry.end - entry.start for entry in wanted.values())
    if size > MAX_TENSORS:
        raise FileTooLargeError(
            file.path, f"holds {size} bytes of tensors; expected at most {MAX_TENSORS}. It was not "
            "read."
        )  # fmt: skip
    if size > 2 * file.size:
        raise FileTooLargeError(
            file.path, f"would become {size} bytes of tensors, more than twice its own size: they "
            "share their memory. It was not read. Save it with a copy of each tensor."
        )  # fmt: skip


# --- writing ---------------------------------------------------------------------------------


def write_checked(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    format_name: str,
    version: int,
    dtype: torch.dtype | None = None,
    exclusive: bool = False,
) -> None:
    """Write a file of one of our formats atomically, in ``dtype`` (default: each tensor's own).

    ``exclusive`` writes only where no file of this name is. Raises ``NotFiniteError``,
    ``NotWrittenError`` or, with ``exclusive``, ``NameTakenError``; a file that was there stays.
    """
    metadata = {
        "format": format_name,
        "version": str(version),
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
