"""Adapter files of our own format, version 1: two mappers and the K/V pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, MissingTensorError, NotWrittenError, OptionError
from ..method.adapter import Adapter, assembled
from ..method.projectors import FACE_HIDDEN, Mappers
from ..method.records import AdapterConfig, AdapterDescription
from .adapter_options import AdapterOptions
from .checked import (
    Shapes,
    check_format,
    check_shapes,
    check_sizes,
    config_of,
    shapes_of,
    version_of,
    write_checked,
)
from .safetensors_file import Header
from .tensor_file import TensorFile

ADAPTER_FORMAT = "infinite-id-adapter"
ADAPTER_VERSION = 1

_LAYER = re.compile(
    r"layers\.(?P<path>(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+"
    r"\.transformer_blocks\.\d+)\.to_[kv]\.weight",
    re.ASCII,
)


class InfiniteIdFormat:
    """See ``AdapterFormat``."""

    family = "Infinite-ID"

    def recognises(self, header: Header) -> bool:
        """By the format that the metadata name."""
        return header.metadata.get("format") == ADAPTER_FORMAT

    def describe(
        self, file: TensorFile, options: AdapterOptions | None = None
    ) -> AdapterDescription:
        """See ``AdapterFormat``."""
        config = _checked_config(file)
        return AdapterDescription(record=config, needs=config.needs)

    def build(
        self, file: TensorFile, operations: Any = torch.nn, options: AdapterOptions | None = None
    ) -> Adapter:
        """An adapter of the file's own type. Raises subclasses of ``FileError``; nothing is read
        from a file that fails any check. It says all by itself and takes no ``options``."""
        config = _checked_config(file)
        return build_adapter(config, {n: file.tensor(n) for n in file.header.tensors}, operations)


def _checked_config(file: TensorFile) -> AdapterConfig:
    """The configuration of a file whose tensors are those that it asks for."""
    path, header = file.path, file.header
    check_format(path, header, ADAPTER_FORMAT)
    version_of(path, header, ADAPTER_VERSION)
    try:
        config = AdapterConfig.from_json(config_of(path, header))
    except OptionError as error:
        raise ConfigError(path, f"bad adapter configuration: {error}") from error
    shapes = shapes_of(header)
    check_shapes(path, shapes, _wanted(path, config, shapes))
    check_sizes(file)
    return config


def build_adapter(
    config: AdapterConfig, tensors: Mapping[str, Tensor], operations: Any = torch.nn
) -> Adapter:
    """Our adapter, which holds ``tensors`` themselves (no copy), built without allocating."""
    return assembled(config, partial(Mappers, config), tensors, operations)


def write_adapter(path: str | Path, adapter: Adapter, dtype: torch.dtype | None = None) -> None:
    """Write an adapter file atomically, in ``dtype`` (default: as it is).

    Raises ``NotFiniteError`` or ``NotWrittenError``; a file that was there before stays.
    """
    if not isinstance(adapter.config, AdapterConfig):
        raise NotWrittenError(
            path, "not written: this adapter is of another kind than those that training makes, "
            "and only these have a format of ours."
        )  # fmt: skip
    write_checked(
        path, adapter.state_dict(), adapter.config.to_json(),
        format_name=ADAPTER_FORMAT, version=ADAPTER_VERSION, dtype=dtype,
    )  # fmt: skip


def _wanted(path: Path, config: AdapterConfig, found: Shapes) -> dict[str, tuple[int, ...]]:
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
    layers = _layer_shapes(found, c)
    if not layers:
        raise MissingTensorError(path, "has no layer at all (layers.<path>.to_k.weight).")
    return wanted | layers


def _layer_shapes(found: Shapes, context_width: int) -> dict[str, tuple[int, ...]]:
    """Both tensors of every layer of which there is one, as wide as the first that was found."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in found.items():
        match = _LAYER.fullmatch(name)
        if match:
            width = shape[0] if shape else 1
            for part in ("to_k", "to_v"):
                wanted.setdefault(f"layers.{match['path']}.{part}.weight", (width, context_width))
    return wanted
