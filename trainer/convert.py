"""``python -m trainer convert IN OUT.safetensors``: tensors out of a pickle, and nothing else.

Read with ``torch.load(weights_only=True)``, which builds tensors and plain containers and refuses
everything else a pickle could do. Understood are: an adapter or identity of this project, and
published IP-Adapter and InstantID files, nested (``image_proj``, ``ip_adapter``) or as the raw
training checkpoint (``image_proj_model.*``, ``adapter_modules.*``; the frozen ``unet.*`` is left
behind).
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from infinite_id_core.adapter import AdapterConfig
from infinite_id_core.checkpoint import (
    ADAPTER_FORMAT,
    IDENTITY_FORMAT,
    VERSION,
    read_adapter,
    read_identity,
    replacing,
)
from infinite_id_core.errors import (
    ConfigError,
    FileError,
    FileMissingError,
    NotFiniteError,
    OptionError,
    TruncatedFileError,
)
from infinite_id_core.identity import IdentityConfig

from .errors import NotConvertibleError, UnknownFileError, UnsafePickleError, disk_errors

Kind = Literal["adapter", "identity", "ip-adapter"]
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "adapter", "identity")
_PREFIXES = ("module.", "adapter.", "_orig_mod.")
_IP_ADAPTER = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}
_FROZEN = ("unet.", "vae.", "text_encoder.", "optimizer.", "image_encoder.")
_CONFIGS = {"adapter": AdapterConfig, "identity": IdentityConfig}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was found in the pickle."""

    kind: Kind
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    left_behind: int
    """Tensors of frozen models that were not taken along."""


def main(argv: Sequence[str]) -> int:
    """Convert one file and say what it was."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer convert", description=__doc__.split("\n")[0]
    )
    parser.add_argument("input", type=Path, help="a .bin, .pt, .pth or .ckpt file")
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the pickle does not say of itself, e.g. recogniser=buffalo_l/w600k_r50",
    )
    values = parser.parse_args(argv)
    found = convert(values.input, values.output, _settings(values.config))
    behind = f", {found.left_behind} tensors of frozen models left behind" * bool(found.left_behind)
    print(f"{values.output}: {found.kind}, {len(found.tensors)} tensors{behind}")
    return 0


def convert(source: Path, output: Path, config: Mapping[str, Any] | None = None) -> Converted:
    """Write the adapter or identity in pickle ``source`` as safetensors ``output``, atomically.

    ``config`` fills in or replaces entries of the file's own. Raises ``UnsafePickleError``,
    ``NotConvertibleError``, ``UnknownFileError``, ``ConfigError`` and what reading the result
    raises; ``output`` is written only if it reads back whole.
    """
    if output.suffix != ".safetensors" or output.resolve() == source.resolve():
        raise OptionError(f"OUT must be another file, ending in .safetensors; got {output}.")
    found = recognise(source, load_tensors(source), config or {})
    for name, tensor in found.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NotFiniteError(source, f"{name} holds NaN or infinity.")
    try:
        with disk_errors(output), replacing(output) as temporary:
            save_file(found.tensors, temporary, metadata=_metadata(found))
            if found.kind == "adapter":
                read_adapter(temporary)
            elif found.kind == "identity":
                read_identity(temporary)
    except FileError as error:
        # The reader names the temporary file; the user knows the pickle.
        raise type(error)(source, error.problem) from error
    return found


def load_tensors(path: Path) -> Any:
    """What ``torch.load(weights_only=True)`` builds, on the CPU.

    Raises ``UnsafePickleError`` for a pickle that asks for more, ``UnknownFileError``,
    ``TruncatedFileError``, ``FileMissingError``.
    """
    if not path.is_file():
        raise FileMissingError(path, "no such file.")
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        kind = "a safetensors file" if start[8:9] == b"{" else "of an unknown kind"
        raise UnknownFileError(path, f"is {kind}, not a pickle; there is nothing to convert.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafePickleError(path, f"{_first_line(error)} {_UNSAFE}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if "TorchScript" in str(error):
            raise UnsafePickleError(path, f"is a TorchScript archive. {_UNSAFE}") from error
        raise TruncatedFileError(
            path, f"cannot be read ({_first_line(error)}). Download or copy it again."
        ) from error
    except (AttributeError, TypeError, IndexError) as error:
        # The restricted unpickler met opcodes in an order that no honest file has.
        raise UnsafePickleError(path, f"{_first_line(error)} {_UNSAFE}") from error


_UNSAFE = (
    "It holds more than tensors and was not loaded; nothing of it ran. Ask its author for "
    "safetensors."
)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0][:300]


# --- recognising by contents -----------------------------------------------------------------


def recognise(path: Path, values: Any, config: Mapping[str, Any]) -> Converted:
    """Which of the known kinds ``values`` is, by its names. Raises ``NotConvertibleError``."""
    own_config = _own_config(values)
    tensors = _renamed(_flat(_unwrapped(values)))
    kept = {name: t for name, t in tensors.items() if not name.startswith(_FROZEN)}
    behind = len(tensors) - len(kept)
    kind = _kind_of(kept)
    if kind is None:
        raise NotConvertibleError(
            path,
            "holds no adapter (clip_mapper.*, face_mapper.*, layers.*), identity (face, clip, "
            "weight) or IP-Adapter (image_proj.*, ip_adapter.*). Its first tensors are "
            f"{sorted(tensors)[:4]}.",
        )
    if kind == "ip-adapter":
        kept = {n: t for n, t in kept.items() if n.startswith(("image_proj.", "ip_adapter."))}
        behind = len(tensors) - len(kept)
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in kept.items()}
    merged = {**own_config, **config} if kind in _CONFIGS else {}
    _check_config(path, kind, merged)
    return Converted(kind=kind, tensors=plain, config=merged, left_behind=behind)


def _kind_of(tensors: Mapping[str, Tensor]) -> Kind | None:
    names = set(tensors)
    if any(n.startswith("clip_mapper.") for n in names):
        return "adapter"
    if {"face", "clip", "weight"} <= names:
        return "identity"
    if any(n.startswith("ip_adapter.") for n in names):
        return "ip-adapter"
    return None


def _unwrapped(values: Any) -> Any:
    while isinstance(values, Mapping):
        inner = [values[w] for w in _WRAPPERS if isinstance(values.get(w), Mapping)]
        if len(inner) != 1:
            break
        values = inner[0]
    return values


def _flat(values: Any, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Tensors of nested dicts by their dotted names."""
    if isinstance(values, Tensor):
        return {prefix.removesuffix("."): values}
    if not isinstance(values, Mapping) or depth > 8:
        return {}
    result: dict[str, Tensor] = {}
    for name, value in values.items():
        result |= _flat(value, f"{prefix}{name}.", depth + 1)
    return result


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        while (prefix := next((p for p in _PREFIXES if name.startswith(p)), "")) != "":
            name = name[len(prefix) :]
        for old, new in _IP_ADAPTER.items():
            if name.startswith(old):
                name = new + name[len(old) :]
        result[name] = tensor
    return result


def _own_config(values: Any) -> dict[str, Any]:
    found = values.get("config") if isinstance(values, Mapping) else None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = None
    return dict(found) if isinstance(found, Mapping) else {}


def _check_config(path: Path, kind: Kind, config: Mapping[str, Any]) -> None:
    if kind == "ip-adapter":
        return
    entries = fields(_CONFIGS[kind])
    required = [f.name for f in entries if f.default is f.default_factory]
    missing = [name for name in required if name not in config]
    if missing:
        options = " ".join(f"--config {name}=..." for name in missing)
        raise ConfigError(path, f"does not say its {', '.join(missing)}. Add {options}.")


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    numbers = {f.name for cls in _CONFIGS.values() for f in fields(cls) if f.type == "int"}
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or (name in numbers and not value.isdecimal()):
            raise OptionError(f"--config expects NAME=VALUE, numbers for {sorted(numbers)}: {pair}")
        settings[name] = int(value) if name in numbers else value
    return settings


def _metadata(found: Converted) -> dict[str, str]:
    if found.kind == "ip-adapter":
        return {"format": "pt"}
    return {
        "format": ADAPTER_FORMAT if found.kind == "adapter" else IDENTITY_FORMAT,
        "version": str(VERSION),
        "config": json.dumps(found.config, sort_keys=True),
    }
