"""The paper's two features: the face embedding E_face and the image encoder's states E_clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ..errors import OptionError
from .features import Feature, Reading
from .identity import Identity

FACE, CLIP = "face", "clip"
FACE_WIDTH = 512
CLIP_TOKENS = 257

Embedding = Literal["normed", "raw"]
ClipLayer = Literal["last", "penultimate"]
EMBEDDING: tuple[Embedding, ...] = get_args(Embedding)
CLIP_LAYER: tuple[ClipLayer, ...] = get_args(ClipLayer)


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """What made the two features, as version 1 of an identity file records it."""

    recogniser: str
    """Name of the face recogniser, e.g. ``buffalo_l/w600k_r50``."""
    embedding: Embedding = "normed"
    """Whether the face embedding has unit length."""
    clip_model: str
    """Name of the image encoder, e.g. ``ViT-H-14``."""
    clip_layer: ClipLayer = "last"
    """Which hidden states: after the last block, or one before (no final norm in either)."""
    name: str = ""
    """A label for people; no meaning to the method."""

    def __post_init__(self) -> None:
        check_choices(self.embedding, self.clip_layer)


def check_choices(embedding: str, clip_layer: str) -> None:
    """Raise ``OptionError`` for an output of the recogniser or the encoder that is none."""
    if embedding not in EMBEDDING or clip_layer not in CLIP_LAYER:
        raise OptionError(
            f"embedding must be one of {EMBEDDING} and clip_layer one of {CLIP_LAYER}; got "
            f"{embedding!r} and {clip_layer!r}."
        )


def face_clip_identity(
    *, face: Tensor, clip: Tensor, weight: Tensor, config: IdentityConfig
) -> Identity:
    """An identity of ``face [n, 512]``, ``clip [n, 257, D]`` and ``weight [n]``.

    Raises ``OptionError`` where the shapes are others.
    """
    n = face.shape[0] if face.ndim else 0
    if (
        n == 0
        or face.shape != (n, FACE_WIDTH)
        or clip.ndim != 3
        or clip.shape[:2] != (n, CLIP_TOKENS)
        or weight.shape != (n,)
    ):
        raise OptionError(
            f"An identity needs face [n, {FACE_WIDTH}], clip [n, {CLIP_TOKENS}, D] and weight [n] "
            f"with n >= 1; got {list(face.shape)}, {list(clip.shape)} and {list(weight.shape)}."
        )
    readings = face_clip_readings(
        recogniser=config.recogniser,
        embedding=config.embedding,
        face_width=FACE_WIDTH,
        clip_model=config.clip_model,
        clip_layer=config.clip_layer,
        clip_width=clip.shape[2],
    )
    values = {FACE: face, CLIP: clip}
    features = {n: Feature(reading=r, value=values[n]) for n, r in readings.items()}
    return Identity(features=features, weight=weight, name=config.name)


def face_clip_readings(
    *,
    recogniser: str,
    embedding: str,
    face_width: int,
    clip_model: str,
    clip_layer: str,
    clip_width: int,
) -> dict[str, Reading]:
    """How the two features are read, by their names."""
    return {
        FACE: Reading(model=recogniser, output=embedding, shape=(face_width,)),
        CLIP: Reading(model=clip_model, output=clip_layer, shape=(CLIP_TOKENS, clip_width)),
    }


def face_clip_config(identity: Identity) -> IdentityConfig | None:
    """Inverse of ``face_clip_identity``; None for an identity that it could not have made."""
    if identity.features.keys() != {FACE, CLIP}:
        return None
    face, clip = identity[FACE], identity[CLIP]
    wide = clip.reading.shape[-1]
    usual = face.reading.shape == (FACE_WIDTH,) and clip.reading.shape == (CLIP_TOKENS, wide)
    nobody = any(f.null is not None and bool(f.null.any()) for f in (face, clip))
    if not usual or nobody or face.reading.cut or clip.reading.cut:
        return None
    embedding: dict[str, Embedding] = {name: name for name in EMBEDDING}
    layer: dict[str, ClipLayer] = {name: name for name in CLIP_LAYER}
    if face.reading.output not in embedding or clip.reading.output not in layer:
        return None
    return IdentityConfig(
        recogniser=face.reading.model,
        embedding=embedding[face.reading.output],
        clip_model=clip.reading.model,
        clip_layer=layer[clip.reading.output],
        name=identity.name,
    )
