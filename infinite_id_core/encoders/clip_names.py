"""CLIP's two namings in files: open_clip's, which is ours, and transformers'.

Most image encoders that people have for ComfyUI are in transformers' naming. The weights are the
same; transformers keeps q, k and v apart and multiplies by its projections from the other side.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_VISION, _TEXT = "vision_model.", "text_model."
_FIXED = {
    _VISION: {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so
        "ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "ln_post.weight": "vision_model.post_layernorm.weight",
        "ln_post.bias": "vision_model.post_layernorm.bias",
        "proj": "visual_projection.weight",
    },
    _TEXT: {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "text_projection": "text_projection.weight",
    },
}
_TURNED = ("proj", "text_projection")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_INNER = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}
_UNUSED = re.compile(r".*\.position_ids")  # a buffer that older releases of transformers saved


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a tensor of ours lies in a file."""

    names: tuple[str, ...]
    """In the file; several are joined along their first dimension."""
    turned: bool = False
    """Stored transposed."""

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes in the file of a tensor whose shape is ours."""
        first, *rest = reversed(shape) if self.turned else shape
        return {name: (first // len(self.names), *rest) for name in self.names}

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor from the file's."""
        parts = [tensors[name] for name in self.names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T.contiguous() if self.turned else whole

    def written(self, tensor: Tensor) -> dict[str, Tensor]:
        """The file's tensors from ours."""
        whole, count = tensor.T if self.turned else tensor, len(self.names)
        parts = whole.chunk(count) if count > 1 else (whole,)
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}


def same_names(names: Iterable[str], prefix: str) -> dict[str, Source]:
    """A file in our naming."""
    return {name: Source(names=(prefix + name,)) for name in names}


def image_side(names: Iterable[str], found: Collection[str]) -> dict[str, Source] | None:
    """Sources of an image tower's ``names`` where a file's ``found`` names are transformers'.

    None for a file in open_clip's naming. A tensor that transformers has no name for is looked
    for under our own, and so is missed by it.
    """
    return _side(_VISION, names, found)


def text_side(names: Iterable[str], found: Collection[str]) -> dict[str, Source] | None:
    """The same for a text tower."""
    return _side(_TEXT, names, found)


def text_in_transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower in our naming as transformers names it."""
    sources = _sources(_TEXT, state)
    return {
        name: part
        for ours, source in sources.items()
        for name, part in source.written(state[ours]).items()
    }


def unknown_to_image_side(sources: Mapping[str, Source], found: Iterable[str]) -> list[str]:
    """Names of a file in transformers' naming that belong to the image side and to no source."""
    known = {name for source in sources.values() for name in source.names}
    return sorted(
        name
        for name in found
        if name.startswith(_VISION) and name not in known and not _UNUSED.fullmatch(name)
    )


def _side(side: str, names: Iterable[str], found: Collection[str]) -> dict[str, Source] | None:
    return _sources(side, names) if any(name.startswith(side) for name in found) else None


def _sources(side: str, names: Iterable[str]) -> dict[str, Source]:
    return {name: Source(names=_theirs(side, name), turned=name in _TURNED) for name in names}


def _theirs(side: str, name: str) -> tuple[str, ...]:
    fixed = _FIXED[side].get(name)
    if fixed is not None:
        return (fixed,)
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _INNER:
        return (name,)
    block = f"{side}encoder.layers.{match[1]}"
    return tuple(f"{block}.{inner}.{match[3]}" for inner in _INNER[match[2]])
