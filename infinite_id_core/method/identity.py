"""An identity: the features of one or more reference photos, independent of any adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import IdentityMismatchError, OptionError

Embedding = Literal["normed", "raw"]
ClipLayer = Literal["last", "penultimate"]
EMBEDDING: tuple[Embedding, ...] = get_args(Embedding)
CLIP_LAYER: tuple[ClipLayer, ...] = get_args(ClipLayer)

FACE_WIDTH = 512
CLIP_TOKENS = 257


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """What made the features; must agree with the adapter's record."""

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
        if self.embedding not in EMBEDDING or self.clip_layer not in CLIP_LAYER:
            raise OptionError(
                f"embedding must be one of {EMBEDDING} and clip_layer one of {CLIP_LAYER}; got "
                f"{self.embedding!r} and {self.clip_layer!r}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity:
    """Features of ``n`` references (Eq. 4, before the mappers)."""

    face: Tensor
    """E_face: ``[n, 512]`` float32."""
    clip: Tensor
    """E_clip hidden states: ``[n, 257, D]`` float16 or float32."""
    weight: Tensor
    """``[n]`` float32, positive: how often each reference counts."""
    config: IdentityConfig

    def __post_init__(self) -> None:
        n = self.face.shape[0] if self.face.ndim else 0
        if (
            n == 0
            or self.face.shape != (n, FACE_WIDTH)
            or self.clip.ndim != 3
            or self.clip.shape[:2] != (n, CLIP_TOKENS)
            or self.weight.shape != (n,)
        ):
            raise OptionError(
                f"An identity needs face [n, {FACE_WIDTH}], clip [n, {CLIP_TOKENS}, D] and weight "
                f"[n] with n >= 1; got {list(self.face.shape)}, {list(self.clip.shape)} and "
                f"{list(self.weight.shape)}."
            )
        check_weights(self.weight)

    @property
    def references(self) -> int:
        """Number of reference photos, n."""
        return self.face.shape[0]

    @property
    def clip_width(self) -> int:
        """D, the image encoder's hidden width."""
        return self.clip.shape[2]


def check_weights(weight: Tensor) -> None:
    """Raise ``OptionError`` where a reference's weight is not a positive number."""
    if not bool((weight > 0).all()) or not bool(weight.isfinite().all()):
        raise OptionError(
            f"Reference weights must be positive numbers; got {weight.tolist()}. Leave a "
            "reference out instead of giving it weight 0."
        )


def stack(identities: Sequence[Identity], weights: Sequence[float] | None = None) -> Identity:
    """Identity mixing by stacking (A.3): all references side by side.

    ``weights`` scales each identity's references. Raises ``IdentityMismatchError`` where the
    encoders differ, ``OptionError`` for an empty list or weights that are not positive.
    """
    first = _same_encoders(identities)
    scale = [1.0] * len(identities) if weights is None else list(weights)
    if len(scale) != len(identities):
        raise OptionError(f"{len(identities)} identities need as many weights, got {len(scale)}.")
    names = [i.config.name for i in identities if i.config.name]
    return Identity(
        face=torch.cat([i.face for i in identities]),
        clip=torch.cat([i.clip for i in identities]),
        weight=torch.cat([i.weight * s for i, s in zip(identities, scale, strict=True)]),
        config=replace(first.config, name=" + ".join(names)),
    )


def average(identity: Identity) -> Identity:
    """The weighted mean of all references as one reference: ``n`` -> 1.

    The face embedding is brought back to unit length where the config says ``normed``, and to
    the references' mean length where ``raw``.
    """
    share = identity.weight / identity.weight.sum()
    face = (identity.face * share.view(-1, 1)).sum(0, keepdim=True)
    return Identity(
        face=_rescale(face, identity.face, share, identity.config.embedding),
        clip=(identity.clip.float() * share.view(-1, 1, 1)).sum(0, keepdim=True).to(identity.clip),
        weight=torch.ones(1),
        config=identity.config,
    )


def interpolate(a: Identity, b: Identity, ratio: float) -> Identity:
    """Identity mixing by interpolation (A.3, Fig. 12): 0 gives ``a``, 1 gives ``b``.

    Linear between the features; several references are averaged first. Raises ``OptionError``
    for a ratio outside [0, 1], ``IdentityMismatchError`` where the encoders differ.
    """
    if not 0.0 <= ratio <= 1.0:
        raise OptionError(f"ratio must lie in [0, 1] (0 = first, 1 = second person), got {ratio}.")
    _same_encoders([a, b])
    if ratio in (0.0, 1.0):
        return a if ratio == 0.0 else b
    return average(stack([average(a), average(b)], [1.0 - ratio, ratio]))


def null_features(identity: Identity) -> tuple[Tensor, Tensor]:
    """The null identity for guidance: zeros before the mappers, ``[1, 512]`` and ``[1, 257, D]``.

    One reference is enough: attention over copies of the same tokens equals attention over one.
    """
    return torch.zeros_like(identity.face[:1]), torch.zeros_like(identity.clip[:1])


def _same_encoders(identities: Sequence[Identity]) -> Identity:
    if not identities:
        raise OptionError("At least one identity is needed, got none.")
    first = identities[0]
    for other in identities[1:]:
        check_match("first identity", _record(first), "second identity", _record(other))
    return first


def _record(identity: Identity) -> dict[str, object]:
    config = identity.config
    return {
        "recogniser": config.recogniser,
        "embedding": config.embedding,
        "clip_model": config.clip_model,
        "clip_layer": config.clip_layer,
        "clip_width": identity.clip_width,
        "face_width": identity.face.shape[1],
    }


def check_match(
    left_name: str, left: dict[str, object], right_name: str, right: dict[str, object]
) -> None:
    """Raise ``IdentityMismatchError`` naming both sides of every entry that differs."""
    wrong = [key for key in left if left[key] != right.get(key)]
    if wrong:
        pairs = "; ".join(
            f"{k}: {left_name} has {left[k]!r}, {right_name} has {right.get(k)!r}" for k in wrong
        )
        raise IdentityMismatchError(
            f"These were made with different encoders. {pairs}. Use the same face model and image "
            "encoder on both sides (make the identity again with the ones the adapter names)."
        )


def identity_record(identity: Identity) -> dict[str, object]:
    """What an adapter must agree with: recogniser, embedding, encoder, layer and widths."""
    return _record(identity)


def _rescale(face: Tensor, references: Tensor, share: Tensor, embedding: Embedding) -> Tensor:
    length = 1.0 if embedding == "normed" else float((references.norm(dim=1) * share).sum())
    return normalize(face, dim=1) * length
