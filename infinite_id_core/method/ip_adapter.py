"""IP-Adapter's projectors without latent tokens of their own, with the names of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .face_clip import CLIP, CLIP_TOKENS, FACE
from .features import Reading
from .projectors import Nobody, Projector
from .published import POOLED
from .resampler import Perceiver, PerceiverSizes


class _Linear(nn.Module):
    """One vector to tokens, normalised."""

    def __init__(self, width: int, tokens: int, context_width: int, operations: Any) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = operations.Linear(width, tokens * context_width)
        self.norm = operations.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, width]`` -> ``[n, M, C]``."""
        return cast(Tensor, self.norm(self.proj(x).unflatten(1, (self.tokens, -1))))


class PooledTokens(Projector):
    """The base model: the projected class token makes four tokens (``ImageProjModel``)."""

    nobody: Mapping[str, Nobody] = {POOLED: "zeros"}

    def __init__(
        self, reading: Reading, tokens: int, context_width: int, operations: Any = nn
    ) -> None:
        super().__init__()
        self.needs = {POOLED: reading}
        self.tokens_per_reference = tokens
        self.image_proj = _Linear(reading.shape[0], tokens, context_width, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``pooled [n, E]`` -> ``[n, M, C]``."""
        return cast(Tensor, self.image_proj(features[POOLED]))


class _TokenMlp(nn.Module):
    """Linear, GELU, Linear, LayerNorm for each token."""

    def __init__(self, width: int, context_width: int, operations: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(width, width),
            nn.GELU(),
            operations.Linear(width, context_width),
            operations.LayerNorm(context_width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, S, width]`` -> ``[n, S, C]``."""
        return cast(Tensor, self.proj(x))


class StateTokens(Projector):
    """The full model: each of the image encoder's states becomes a token (``MLPProjModel``)."""

    nobody: Mapping[str, Nobody] = {CLIP: "encoded"}
    tokens_per_reference = CLIP_TOKENS

    def __init__(self, reading: Reading, context_width: int, operations: Any = nn) -> None:
        super().__init__()
        self.needs = {CLIP: reading}
        self.image_proj = _TokenMlp(reading.shape[1], context_width, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``clip [n, 257, D]`` -> ``[n, 257, C]``."""
        return cast(Tensor, self.image_proj(features[CLIP]))


@dataclass(frozen=True, kw_only=True)
class FaceSizes:
    """Sizes of the network that a face embedding goes through."""

    inputs: int
    hidden: int
    tokens: int
    context_width: int


class _FaceMlp(nn.Module):
    """Linear, GELU, Linear, cut into tokens, LayerNorm."""

    def __init__(self, sizes: FaceSizes, operations: Any) -> None:
        super().__init__()
        self.tokens = sizes.tokens
        self.proj = nn.Sequential(
            operations.Linear(sizes.inputs, sizes.hidden),
            nn.GELU(),
            operations.Linear(sizes.hidden, sizes.tokens * sizes.context_width),
        )
        self.norm = operations.LayerNorm(sizes.context_width)

    def forward(self, face: Tensor) -> Tensor:
        """``[n, 512]`` -> ``[n, T, C]``."""
        return cast(Tensor, self.norm(self.proj(face).unflatten(1, (self.tokens, -1))))


class FaceTokens(Projector):
    """FaceID and its portrait model: a face embedding makes 4 or 16 tokens."""

    nobody: Mapping[str, Nobody] = {FACE: "zeros"}

    def __init__(self, reading: Reading, sizes: FaceSizes, operations: Any = nn) -> None:
        super().__init__()
        self.needs = {FACE: reading}
        self.tokens_per_reference = sizes.tokens
        self.image_proj = _FaceMlp(sizes, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``face [n, 512]`` -> ``[n, T, C]``."""
        return cast(Tensor, self.image_proj(features[FACE]))


class _FaceMlpPlus(_FaceMlp):
    """The face's tokens, which also read the image encoder's states."""

    def __init__(self, sizes: FaceSizes, perceiver: PerceiverSizes, operations: Any) -> None:
        super().__init__(sizes, operations)
        self.perceiver_resampler = Perceiver(perceiver, operations)


class FaceStateTokens(Projector):
    """FaceID plus: the face's tokens x read the image encoder's states.

    Version 2 adds what they read, x + s * read(x), so that s says how much the picture counts
    beside the embedding; version 1 is what they read alone (``shortcut`` None).
    """

    nobody: Mapping[str, Nobody] = {FACE: "zeros", CLIP: "encoded"}

    def __init__(
        self, needs: Mapping[str, Reading], sizes: FaceSizes, perceiver: PerceiverSizes,
        shortcut: float | None = 1.0, operations: Any = nn,
    ) -> None:  # fmt: skip
        super().__init__()
        self.needs = needs
        self.tokens_per_reference = sizes.tokens
        self.shortcut = shortcut
        self.image_proj = _FaceMlpPlus(sizes, perceiver, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``face [n, 512]``, ``clip [n, 257, D]`` -> ``[n, T, C]``."""
        tokens: Tensor = self.image_proj(features[FACE])
        read = self.image_proj.perceiver_resampler.read(features[CLIP], tokens)
        return read if self.shortcut is None else tokens + self.shortcut * read
