"""Which image encoder a file holds, by the names and shapes in its header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import FileError
from ..files.safetensors_file import TensorEntry, read_header
from ..files.tensor_file import open_tensors
from ..method.published import EVA_CLIP
from .eva import prefix_of
from .named import tower_name

# Of the two namings: what tells width and patch, what numbers the blocks, and the projection with
# the axis of its outputs.
_NAMINGS = (
    (
        "vision_model.embeddings.patch_embedding.weight",
        re.compile(r"vision_model\.encoder\.layers\.(\d+)\."),
        ("visual_projection.weight", 0),
    ),
    (
        "visual.conv1.weight",
        re.compile(r"visual\.transformer\.resblocks\.(\d+)\."),
        ("visual.proj", 1),
    ),
)


def encoder_of_file(path: str | Path) -> str | None:
    """The image encoder of a file, e.g. ``ViT-H-14``; None where it holds none that is known, or
    cannot be read. Of a pickle, PuLID's alone: its authors publish no safetensors."""
    try:
        if Path(path).suffix == ".safetensors":
            return _encoder_of(read_header(path).tensors)
        with open_tensors(path) as file:
            return _eva_of(file.header.tensors)
    except FileError:
        return None


def _eva_of(tensors: Mapping[str, TensorEntry]) -> str | None:
    prefix = prefix_of({name: tuple(entry.shape) for name, entry in tensors.items()})
    return None if prefix is None else EVA_CLIP


def _encoder_of(tensors: Mapping[str, TensorEntry]) -> str | None:
    for patches, blocks, (projection, axis) in _NAMINGS:
        if patches not in tensors or projection not in tensors:
            continue
        width, _, patch, _ = (*tensors[patches].shape, 0, 0, 0, 0)[:4]
        numbers = {match[1] for match in map(blocks.match, tensors) if match}
        shape = tensors[projection].shape
        return tower_name(width, len(numbers), patch, shape[axis] if len(shape) == 2 else 0)
    return _eva_of(tensors)
