"""Faces to an identity: E_face and E_clip of each (Eq. 4, before the mappers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import EncoderError, OptionError, shown
from ..faces.align import AlignedFace
from ..method.face_clip import (
    CLIP,
    CLIP_LAYER,
    EMBEDDING,
    FACE,
    ClipLayer,
    Embedding,
    IdentityConfig,
    face_clip_identity,
)
from ..method.features import Reading
from ..method.identity import Identity, average, check_match
from .clip_vision import ClipVision, hidden_states
from .named import encoder_name

Combine = Literal["stack", "average"]
COMBINE: tuple[Combine, ...] = get_args(Combine)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How faces become an identity. Raises ``OptionError``."""

    combine: Combine = "stack"
    """Several references side by side, or their weighted mean as one (A.3)."""
    weights: tuple[float, ...] = ()
    """One positive number a reference; empty for equal weights."""
    clip_layer: ClipLayer = "last"
    embedding: Embedding = "normed"

    def __post_init__(self) -> None:
        choices = {"combine": COMBINE, "clip_layer": CLIP_LAYER, "embedding": EMBEDDING}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(
                    f"{name} must be one of {', '.join(allowed)}; got {shown(value)}."
                )

    @classmethod
    def of_needs(cls, needs: Mapping[str, Reading]) -> EncodeOptions:
        """What an adapter reads. Raises ``EncoderError`` where that is not face and clip."""
        if needs.keys() != {FACE, CLIP}:
            raise EncoderError(
                f"This adapter reads {', '.join(sorted(needs))}, and only face and clip together "
                "can be encoded here. Give it an identity file that has what it reads."
            )
        outputs: dict[str, Any] = {name: reading.output for name, reading in needs.items()}
        return cls(clip_layer=outputs.get(CLIP, "last"), embedding=outputs.get(FACE, "normed"))


def encode_faces(
    faces: Sequence[AlignedFace], clip_vision: ClipVision, options: EncodeOptions | None = None
) -> Identity:
    """E_face and E_clip of all ``faces`` as one identity.

    Raises ``OptionError`` (no face, wrong number of weights), ``IdentityMismatchError`` (faces
    read by different recognisers), ``EncoderError``.
    """
    options = options or EncodeOptions()
    if not faces:
        raise OptionError("At least one face is needed, got none. Connect Align Face.")
    check_recognisers(faces)
    weights = checked_weights(options.weights, len(faces))
    clip = hidden_states(clip_vision, [face.crop for face in faces], options.clip_layer)
    identity = face_clip_identity(
        face=torch.stack([face_embedding(face, options.embedding) for face in faces]),
        clip=clip,
        weight=torch.tensor(weights, dtype=torch.float32),
        config=IdentityConfig(
            recogniser=faces[0].recogniser,
            embedding=options.embedding,
            clip_model=encoder_name(clip_vision, clip.shape[2]),
            clip_layer=options.clip_layer,
        ),
    )
    return average(identity) if options.combine == "average" else identity


def check_recognisers(faces: Sequence[AlignedFace]) -> None:
    """Raise ``IdentityMismatchError`` where faces were read by different recognisers."""
    for other in faces[1:]:
        check_match(
            "face 0", {"recogniser": faces[0].recogniser},
            "another face", {"recogniser": other.recogniser},
        )  # fmt: skip


def checked_weights(weights: tuple[float, ...], count: int) -> tuple[float, ...]:
    """One for each of ``count`` references; all alike where none is given. Raises
    ``OptionError``."""
    weights = weights or (1.0,) * count
    if len(weights) != count:
        raise OptionError(
            f"Expected {count} weights, one for each face, got {len(weights)}: "
            f"{shown(list(weights))}."
        )
    return weights


def face_embedding(face: AlignedFace, embedding: Embedding = "normed") -> Tensor:
    """E_face of one face: ``[512]`` float32, of unit length where ``normed``."""
    raw = face.embedding.float()
    return normalize(raw, dim=0) if embedding == "normed" else raw


def parse_weights(text: str) -> tuple[float, ...]:
    """``"1, 0.5"`` -> (1.0, 0.5); empty text -> (). Raises ``OptionError``."""
    parts = text.replace(";", ",").split(",") if text.strip() else []
    try:
        return tuple(float(part) for part in parts)
    except ValueError as error:
        raise OptionError(
            f"Expected numbers separated by commas, such as '1, 0.5', got {shown(text)}."
        ) from error
