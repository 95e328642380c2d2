"""E_clip: anything with ComfyUI's ``CLIP_VISION`` interface, and what is read of it.

That is ComfyUI's own objects, or ``OpenClipVision``, which gives the same hidden states on the same
weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import EncoderError
from ..faces.pixels import to_rgb
from ..method.face_clip import CLIP_TOKENS, ClipLayer

# CLIP's preprocessing, the same in open_clip, transformers and ComfyUI.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SIZE = 224  # pixels

_BATCH = 16  # pictures encoded at a time: bounds memory for a hundred faces


class ClipVision(Protocol):
    """ComfyUI's CLIP_VISION, as far as this project uses it."""

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        """``[B, H, W, 3]`` in [0, 1] -> an object with ``last_hidden_state`` and
        ``penultimate_hidden_states``, each ``[B, tokens, D]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """What ``encode_image`` gives, under ComfyUI's names; read as attributes or as items."""

    last_hidden_state: Tensor
    """After the last block, before the final norm: ``[B, tokens, D]``."""
    penultimate_hidden_states: Tensor
    """One block earlier."""
    image_embeds: Tensor
    """Projected class token: ``[B, E]``."""
    mm_projected: None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def preprocess(
    image: Tensor,
    size: int = IMAGE_SIZE,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    crop: bool = True,
) -> Tensor:
    """CLIP's preprocessing with the numerics of ComfyUI: ``[B, H, W, 3 or 4]`` -> ``[B, 3, s, s]``.

    The shorter side (``crop``, then the centre is cut) or both sides become ``size`` by antialiased
    bicubic sampling; values are rounded to 1/255 as an 8-bit picture's are, then normalised.
    """
    planes = image[..., :3].float().permute(0, 3, 1, 2)  # BHWC -> BCHW
    height, width = planes.shape[2:]
    if (height, width) != (size, size):
        target = (size, size)
        if crop:
            scale = size / min(height, width)
            target = (round(scale * height), round(scale * width))
        planes = interpolate(planes, size=target, mode="bicubic", antialias=True)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        planes = planes[:, :, top : top + size, left : left + size]
    planes = (planes * 255.0).clamp(0, 255).round() / 255.0
    shape = (1, 3, 1, 1)
    return (planes - planes.new_tensor(mean).view(shape)) / planes.new_tensor(std).view(shape)


def hidden_states(clip_vision: ClipVision, pictures: Sequence[Tensor], layer: ClipLayer) -> Tensor:
    """E_clip of pictures ``[H, W, 3]`` of any sizes: ``[n, 257, D]`` float32 on the CPU.

    ``layer``: after the last block, or one before; no final norm in either. Raises
    ``EncoderError`` for an encoder of another kind, or where it gives NaN.
    """
    read = partial(_states, layer=layer)
    return torch.cat([read(*encoded) for encoded in _encoded(clip_vision, pictures)])


def image_embeddings(clip_vision: ClipVision, pictures: Sequence[Tensor]) -> Tensor:
    """The projected class token of pictures of any sizes: ``[n, E]`` float32 on the CPU.

    Raises ``EncoderError`` for an encoder without projected embeddings, or where it gives NaN.
    """
    return torch.cat([_embeds(*encoded) for encoded in _encoded(clip_vision, pictures)])


def empty_states(clip_vision: ClipVision, layer: ClipLayer) -> Tensor:
    """What the encoder makes of zeros after normalisation, IP-Adapter's nobody: ``[1, 257, D]``.

    A black picture, to an encoder that takes off a mean of zero.
    """
    encoder: Any = copy.copy(clip_vision)
    encoder.image_mean = (0.0, 0.0, 0.0)  # as ComfyUI's encoders and ours call it
    size = getattr(clip_vision, "image_size", IMAGE_SIZE)
    return hidden_states(encoder, [torch.zeros(size, size, 3)], layer)


def _encoded(clip_vision: ClipVision, pictures: Sequence[Tensor]) -> Iterator[tuple[Any, int]]:
    """What the encoder gives for pictures of one size after another, and how many they are."""
    for _, alike in itertools.groupby(pictures, key=lambda picture: picture.shape):
        some = list(alike)
        for start in range(0, len(some), _BATCH):
            images = torch.stack([to_rgb(picture) for picture in some[start : start + _BATCH]])
            yield clip_vision.encode_image(images), len(images)


def _states(output: Any, count: int, layer: ClipLayer) -> Tensor:
    name = "last_hidden_state" if layer == "last" else "penultimate_hidden_states"
    states = getattr(output, name, None)
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[0] != count:
        found = "nothing" if states is None else f"{getattr(states, 'shape', type(states))}"
        raise EncoderError(
            f"Expected {name} [{count}, tokens, width] from CLIP_VISION, got {found}."
        )
    if states.shape[1] != CLIP_TOKENS:
        raise EncoderError(
            f"This needs an image encoder that gives {CLIP_TOKENS} tokens: a ViT with patch 14 at "
            f"224 pixels, such as ViT-H-14 (width 1280) or ViT-bigG-14 (width 1664). The connected "
            f"one gives {states.shape[1]} tokens of width {states.shape[2]}. Load the CLIP vision "
            "file that the adapter names."
        )
    states = states.detach().to(device="cpu", dtype=torch.float32)
    if not bool(states.isfinite().all()):
        raise EncoderError(
            "The image encoder gives NaN or infinity: its file is damaged, or its number format is "
            "too small for it (start ComfyUI with --fp32-text-enc)."
        )
    return states


def _embeds(output: Any, count: int) -> Tensor:
    embeds = getattr(output, "image_embeds", None)
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or embeds.shape[0] != count:
        found = "nothing" if embeds is None else f"{getattr(embeds, 'shape', type(embeds))}"
        raise EncoderError(
            f"Expected image_embeds [{count}, width] from CLIP_VISION, got {found}. CLIP scores "
            "need a CLIP model with its projection, such as ViT-H-14."
        )
    embeds = embeds.detach().to(device="cpu", dtype=torch.float32)
    if not bool(embeds.isfinite().all()):
        raise EncoderError("The image encoder gives NaN or infinity: its file is damaged.")
    return embeds
