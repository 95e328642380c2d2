"""Perceivers of published adapters (IP-Adapter's resampler.py): a few latent tokens read many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .face_clip import CLIP, FACE
from .features import Reading
from .projectors import Nobody, Projector

HEAD_WIDTH = 64
"""Of every published perceiver that is read here."""

References = Literal["sequence", "mean", "each"]
REFERENCES: tuple[References, ...] = get_args(References)


@dataclass(frozen=True, kw_only=True)
class PerceiverSizes:
    """Sizes of a perceiver."""

    inputs: int
    """Width of what is read."""
    width: int
    """d: of the latent tokens."""
    heads: int
    depth: int
    context_width: int
    """C"""


class PerceiverAttention(nn.Module):
    """Latent tokens read the input and themselves; no biases, softmax in float32 at least."""

    def __init__(self, width: int, heads: int, operations: Any = nn) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * HEAD_WIDTH
        self.norm1 = operations.LayerNorm(width)
        self.norm2 = operations.LayerNorm(width)
        self.to_q = operations.Linear(width, inner, bias=False)
        self.to_kv = operations.Linear(width, 2 * inner, bias=False)
        self.to_out = operations.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [n, S, d]``, latents ``[n, L, d]`` -> ``[n, L, d]``; ``bias [S + L]`` on the keys."""
        x, latents = self.norm1(x), self.norm2(latents)
        q = self._split(self.to_q(latents))
        keys, values = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        k, v = self._split(keys), self._split(values)
        scale = HEAD_WIDTH**-0.25  # on both sides, so that float16 does not overflow
        scores = (q * scale) @ (k * scale).transpose(-2, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if bias is not None:
            scores = scores + bias.to(scores)
        out = scores.softmax(dim=-1).to(v.dtype) @ v
        return cast(Tensor, self.to_out(out.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        """``[n, L, h * 64]`` -> ``[n, h, L, 64]``."""
        return x.view(*x.shape[:2], self.heads, HEAD_WIDTH).transpose(1, 2)


class PerceiverLayers(nn.ModuleList):
    """Attention and a feed-forward network of four times the width, ``depth`` times."""

    def __init__(self, width: int, heads: int, depth: int, operations: Any = nn) -> None:
        super().__init__(
            nn.ModuleList(
                [
                    PerceiverAttention(width, heads, operations),
                    nn.Sequential(
                        operations.LayerNorm(width),
                        operations.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        operations.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def read(
        self, x: Tensor, latents: Tensor, bias: Tensor | None = None, part: slice = slice(None)
    ) -> Tensor:
        """Some of the layers: ``x [n, S, d]``, latents ``[n, L, d]`` -> ``[n, L, d]``."""
        for layer in list(self)[part]:
            attention, feed_forward = cast(nn.ModuleList, layer)
            latents = attention(x, latents, bias) + latents
            latents = feed_forward(latents) + latents
        return latents


class Perceiver(nn.Module):
    """Latent tokens, given from outside, read an input; the result is as wide as the text."""

    def __init__(self, sizes: PerceiverSizes, operations: Any = nn) -> None:
        super().__init__()
        self.proj_in = operations.Linear(sizes.inputs, sizes.width)
        self.layers = PerceiverLayers(sizes.width, sizes.heads, sizes.depth, operations)
        self.proj_out = operations.Linear(sizes.width, sizes.context_width)
        self.norm_out = operations.LayerNorm(sizes.context_width)

    def read(self, x: Tensor, latents: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [n, S, inputs]``, latents ``[n, L, d]`` -> ``[n, L, C]``; ``bias [S + L]``."""
        latents = self.layers.read(self.proj_in(x), latents, bias)
        return cast(Tensor, self.norm_out(self.proj_out(latents)))


class Resampler(Perceiver):
    """A perceiver with latent tokens of its own, one for each token that comes out."""

    def __init__(self, sizes: PerceiverSizes, tokens: int, operations: Any = nn) -> None:
        super().__init__(sizes, operations)
        self.latents = nn.Parameter(torch.zeros(1, tokens, sizes.width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[n, S, inputs]`` -> ``[n, M, C]``; ``bias [S]`` on the input."""
        latents = self.latents.to(x).expand(x.shape[0], -1, -1)
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(latents.shape[1])])
        return self.read(x, latents, bias)


class ImageResampler(Projector):
    """IP-Adapter plus: the image encoder's states through a resampler."""

    nobody: Mapping[str, Nobody] = {CLIP: "encoded"}

    def __init__(
        self, reading: Reading, sizes: PerceiverSizes, tokens: int, operations: Any = nn
    ) -> None:
        super().__init__()
        self.needs = {CLIP: reading}
        self.tokens_per_reference = tokens
        self.image_proj = Resampler(sizes, tokens, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``clip [n, 257, D]`` -> ``[n, M, C]``."""
        return cast(Tensor, self.image_proj(features[CLIP]))


class FaceResampler(Projector):
    """InstantID, and IP-Adapter's portrait-unnorm: a raw face embedding through a resampler.

    Several photos are a ``sequence`` for one pass (InstantID's own pipeline), or their ``mean`` is
    one photo (ComfyUI_InstantID), or ``each`` has tokens of its own.
    """

    nobody: Mapping[str, Nobody] = {FACE: "zeros"}

    def __init__(
        self, reading: Reading, sizes: PerceiverSizes, tokens: int,
        references: References = "sequence", operations: Any = nn,
    ) -> None:  # fmt: skip
        super().__init__()
        self.needs = {FACE: reading}
        self.tokens_per_reference = tokens
        self.references = references
        self.image_proj = Resampler(sizes, tokens, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``face [n, 512]`` -> ``[n, M, C]``."""
        return cast(Tensor, self.image_proj(features[FACE][:, None]))

    def of_person(self, features: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """``face [n, 512]`` -> ``[1, M, C]``, or ``[1, n * M, C]`` where ``each`` has its own."""
        face = features[FACE]
        if self.references == "each":
            return super().of_person(features, weight)
        if self.references == "mean":
            share = (weight / weight.sum()).to(face)
            return self.forward({FACE: (share @ face)[None]})
        return cast(Tensor, self.image_proj(face[None], weight.log().to(face.device)))

    def of_nobody(self, features: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """As many empty references as the person has, where these are a sequence."""
        if self.references != "sequence":
            return super().of_nobody(features, weight)
        face = features[FACE].expand(len(weight), -1)
        return self.of_person({FACE: face}, weight)

    def token_weight(self, weight: Tensor) -> Tensor:
        """Its reference's where ``each`` has tokens of its own; else all alike."""
        if self.references == "each":
            return super().token_weight(weight)
        return weight.new_ones(self.tokens_per_reference)
