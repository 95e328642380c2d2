"""Which image encoder it is, for the record that an adapter is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class _Tower:
    """What tells one vision transformer from another."""

    width: int
    blocks: int
    patch: int
    embeds: int
    """Width of the projected class token."""


_NAMES = {
    _Tower(1664, 48, 14, 1280): "ViT-bigG-14",
    _Tower(1280, 32, 14, 1024): "ViT-H-14",
    _Tower(1024, 24, 14, 768): "ViT-L-14",
}


def tower_name(width: int, blocks: int, patch: int, embeds: int) -> str | None:
    """The encoder with a vision transformer of this shape; None for one that is not known."""
    return _NAMES.get(_Tower(width, blocks, patch, embeds))


def encoder_name(clip_vision: Any, width: int) -> str:
    """The encoder's own name, or that of the model with its network; else ``vit-`` and its width.

    open_clip's ``-quickgelu`` variants are the same networks under another activation's name.
    """
    own = getattr(clip_vision, "clip_model", None)
    if isinstance(own, str) and own:
        return own.removesuffix("-quickgelu")
    tower = _tower_of(getattr(clip_vision, "model", None))
    return _NAMES.get(tower, f"vit-{width}") if tower else f"vit-{width}"


def _tower_of(model: Any) -> _Tower | None:
    """The tower behind ComfyUI's CLIP_VISION, whose modules have transformers' names."""
    if not isinstance(model, nn.Module):
        return None
    modules: dict[str, Any] = dict(model.named_modules())
    patches = modules.get("vision_model.embeddings.patch_embedding")
    blocks = modules.get("vision_model.encoder.layers")
    projection = modules.get("visual_projection")
    if not isinstance(patches, nn.Conv2d) or not isinstance(projection, nn.Linear) or not blocks:
        return None
    width, patch = patches.out_channels, patches.kernel_size[0]
    return _Tower(width, len(blocks), patch, projection.out_features)
