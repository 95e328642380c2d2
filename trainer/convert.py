"""``python -m trainer convert IN OUT.safetensors``: tensors out of a pickle, and nothing else.

Read with the core's restricted reader, which builds plain containers and refuses everything else a
pickle could do. Understood are: an adapter or identity of this project; published adapters of every
family, pickled or in another spelling (``convert_published``); and the
models that training reads: an SDXL checkpoint (``.ckpt``), its UNet, VAE, text or image encoder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from infinite_id_core.errors import (
    ConfigError,
    FileError,
    NotConvertibleError,
    NotWrittenError,
    OptionError,
)
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.identities import IDENTITY_FORMAT, IDENTITY_VERSION, read_identity
from infinite_id_core.files.infinite_id_format import ADAPTER_FORMAT, ADAPTER_VERSION
from infinite_id_core.files.pickled_tensors import check_shared, flat_tensors
from infinite_id_core.files.pickles import open_pickle
from infinite_id_core.files.safetensors_file import json_object, save_tensors
from infinite_id_core.files.stored_tensor import StoredTensor
from infinite_id_core.files.system import writing
from infinite_id_core.method.face_clip import IdentityConfig
from infinite_id_core.method.records import AdapterConfig

from .convert_published import convert_published

Kind = Literal["adapter", "identity", "ip-adapter", "model"]
_PREFIXES = ("module.", "adapter.", "_orig_mod.")
_IP_ADAPTER = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}
_FROZEN = ("unet.", "vae.", "text_encoder.", "optimizer.", "image_encoder.")
_MODELS = (  # a checkpoint's parts, or one of them alone
    "model.diffusion_model.", "diffusion_model.", "input_blocks.", "first_stage_model.",
    "conditioner.", "cond_stage_model.", "encoder.", "decoder.", "visual.", "vision_model.",
    "text_model.", "transformer.", "down_blocks.", "taesd_encoder.",
)  # fmt: skip
_TRAINING = ("model_ema.", "optimizer.", "optimizer_states.", "loss.")
_CONFIGS = {"adapter": AdapterConfig, "identity": IdentityConfig}
_FORMATS = {
    "adapter": (ADAPTER_FORMAT, ADAPTER_VERSION),
    "identity": (IDENTITY_FORMAT, IDENTITY_VERSION),
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was found in the pickle."""

    kind: Kind
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    left_behind: int
    """Tensors of frozen models, or of the training, that were not taken along."""


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
    _check_output(values.input, values.output)
    published = convert_published(values.input, values.output)
    if published is not None:
        behind = f", {published.left_behind} others left behind" * bool(published.left_behind)
        print(f"{values.output}: {published.family}, {published.tensors} tensors{behind}")
        return 0
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
    _check_output(source, output)
    with open_pickle(source) as values:
        found = recognise(source, values, config or {})
        try:
            with writing(output), replacing(output) as temporary:
                save_tensors(found.tensors, temporary, _metadata(found))
                if found.kind == "adapter":
                    read_adapter(temporary)
                elif found.kind == "identity":
                    read_identity(temporary)
        except NotWrittenError:
            raise
        except FileError as error:
            # The reader names the temporary file; the user knows the pickle.
            raise type(error)(source, error.problem.removeprefix("not written: ")) from error
    return found


def _check_output(source: Path, output: Path) -> None:
    if output.suffix != ".safetensors" or output.resolve() == source.resolve():
        raise OptionError(f"OUT must be another file, ending in .safetensors; got {output}.")


# --- recognising by contents -----------------------------------------------------------------


def recognise(path: Path, values: Any, config: Mapping[str, Any]) -> Converted:
    """Which of the known kinds ``values`` is, by its names. Raises ``NotConvertibleError``."""
    own_config = _own_config(values)
    tensors = _renamed(flat_tensors(path, values))
    kept = {name: t for name, t in tensors.items() if not name.startswith(_FROZEN)}
    kind = _kind_of(kept)
    if kind is None and any(name.startswith(_MODELS) for name in tensors):
        kind = "model"
        kept = {name: t for name, t in tensors.items() if not name.startswith(_TRAINING)}
    if kind is None:
        raise NotConvertibleError(
            path,
            "holds no adapter (clip_mapper.*, face_mapper.*, layers.*), identity (face, clip, "
            "weight), IP-Adapter (image_proj.*, ip_adapter.*) or part of SDXL "
            f"(model.diffusion_model.*, ...). Its first tensors are {sorted(tensors)[:4]}.",
        )
    if kind == "ip-adapter":
        kept = {n: t for n, t in kept.items() if n.startswith(("image_proj.", "ip_adapter."))}
    check_shared(path, kept)
    merged = {**own_config, **config} if kind in _CONFIGS else {}
    _check_config(path, kind, merged)
    return Converted(kind=kind, tensors=kept, config=merged, left_behind=len(tensors) - len(kept))


def _kind_of(tensors: Mapping[str, StoredTensor]) -> Kind | None:
    names = set(tensors)
    if any(n.startswith("clip_mapper.") for n in names):
        return "adapter"
    if {"face", "clip", "weight"} <= names:
        return "identity"
    if any(n.startswith("ip_adapter.") for n in names):
        return "ip-adapter"
    return None


def _renamed(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
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
            found = json_object(found)
        except ValueError:
            found = None
    if not isinstance(found, Mapping):
        return {}
    plain = (str, int, float, bool, type(None))
    return {str(name): value for name, value in found.items() if isinstance(value, plain)}


def _check_config(path: Path, kind: Kind, config: Mapping[str, Any]) -> None:
    if kind not in _CONFIGS:
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
    if found.kind not in _CONFIGS:
        return {"format": "pt"}
    format_name, version = _FORMATS[found.kind]
    return {
        "format": format_name,
        "version": str(version),
        "config": json.dumps(found.config, sort_keys=True),
    }
