"""Published adapters to one safetensors spelling, whatever their container and names.

The names of IP-Adapter's own safetensors files, ``image_proj.*`` and
``ip_adapter.N.to_k_ip.weight``, which every pack reads; a FaceID file's LoRA goes along. What is no
part of the adapter (a frozen ``unet.*`` of a training checkpoint, an optimiser) stays behind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infinite_id_core.errors import FileError, UnknownFileError
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.adapters import format_of, read_adapter
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.published.family import PublishedFormat
from infinite_id_core.files.safetensors_file import DTYPE_NAMES, save_tensors
from infinite_id_core.files.system import writing
from infinite_id_core.files.tensor_file import TensorFile, open_tensors
from infinite_id_core.sdxl.layers import CrossAttentionLayer
from infinite_id_core.sdxl.published_layers import SDXL_LAYERS

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Respelled:
    """What was written."""

    family: str
    tensors: int
    left_behind: int


@dataclass(frozen=True)
class _Lazy:
    """A tensor of the file that is read when its turn to be written comes."""

    file: TensorFile
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.file.header.tensors[self.name].dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.header.tensors[self.name].shape)

    def read(self) -> Tensor:
        return self.file.tensor(self.name)


def convert_published(
    source: Path, output: Path, layers: Sequence[CrossAttentionLayer] | None = None
) -> Respelled | None:
    """Write the published adapter in ``source`` as ``output``, atomically; None where it is none.

    ``layers``: as in ``AdapterOptions``. Raises ``UnknownFileError`` where the file has this
    spelling already, and what reading it raises.
    """
    options = AdapterOptions(layers=None if layers is None else tuple(layers))
    with open_tensors(source) as file:
        try:
            known = format_of(source, file.header)
        except FileError:
            return None
        if not isinstance(known, PublishedFormat):
            return None
        names = known.tensor_names(file, options)
        spelled = _spelled(names, layers or SDXL_LAYERS)
        if file.header.tensors.keys() == spelled.keys() and _is_safetensors(source):
            raise UnknownFileError(
                source, f"is an {known.family} in safetensors already; there is nothing to convert."
            )
        lazy = {name: _Lazy(file, own) for name, own in spelled.items()}
        with writing(output), replacing(output) as temporary:
            save_tensors(lazy, temporary, {"format": "pt"})
            read_adapter(temporary, options=options)
        left = len(file.header.tensors) - len(lazy)
        return Respelled(family=known.family, tensors=len(lazy), left_behind=left)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _spelled(names: dict[str, str], layers: Sequence[CrossAttentionLayer]) -> dict[str, str]:
    """The file's own names by the published spelling, out of those by ours."""
    numbers = {layer.path: 2 * i + 1 for i, layer in enumerate(layers)}
    return {_published_name(ours, numbers): own for ours, own in names.items()}


def _published_name(name: str, numbers: dict[str, int]) -> str:
    pair = re.fullmatch(r"layers\.(.+)\.to_([kv])\.weight", name)
    if pair:
        return f"ip_adapter.{numbers[pair[1]]}.to_{pair[2]}_ip.weight"
    low_rank = re.fullmatch(
        r"low_rank\.(.+)\.attn([12])\.to_(q|k|v|out)(?:\.0)?\.(down|up)\.weight", name
    )
    if low_rank:
        number = numbers[low_rank[1]] - (low_rank[2] == "1")
        return f"ip_adapter.{number}.to_{low_rank[3]}_lora.{low_rank[4]}.weight"
    return name
