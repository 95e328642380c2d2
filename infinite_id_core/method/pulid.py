"""PuLID's projectors, with the names of its files: v1's encoder (``IDEncoder``) and v1.1's former.

Both read a raw face embedding, and of another image encoder its head's output and its hidden
states at five depths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .face_clip import FACE
from .features import Reading
from .merging import MERGING, PULID_V11, Merging
from .projectors import JointProjector, Nobody, Projector
from .published import EVA, EVA_BLOCKS, EVA_LEVELS
from .resampler import PerceiverLayers

_NOBODY: Mapping[str, Nobody] = {FACE: "zeros", EVA: "zeros", EVA_LEVELS: "zeros"}
LEVELS = len(EVA_BLOCKS)


@dataclass(frozen=True, kw_only=True)
class PulidSizes:
    """Sizes of either projector."""

    inputs: int
    """Face embedding and head's output side by side."""
    level_width: int
    hidden: int
    id_tokens: int
    """Tokens that the embeddings of one photo become."""
    context_width: int
    """C"""


def _mlp(inputs: int, hidden: int, outputs: int, operations: Any) -> nn.Sequential:
    return nn.Sequential(
        operations.Linear(inputs, hidden),
        operations.LayerNorm(hidden),
        nn.LeakyReLU(),
        operations.Linear(hidden, hidden),
        operations.LayerNorm(hidden),
        nn.LeakyReLU(),
        operations.Linear(hidden, outputs),
    )


def _embeddings(features: Mapping[str, Tensor]) -> Tensor:
    """``face [n, 512]``, ``eva [n, 768]`` -> ``[n, 1280]``."""
    return torch.cat([features[FACE], features[EVA]], dim=-1)


class _IdEncoder(nn.Module):
    """A network for the embeddings, and two for each level."""

    def __init__(self, sizes: PulidSizes, operations: Any) -> None:
        super().__init__()
        self.id_tokens = sizes.id_tokens
        width, hidden, out = sizes.level_width, sizes.hidden, sizes.context_width
        self.body = _mlp(sizes.inputs, hidden, sizes.id_tokens * out, operations)
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", _mlp(width, hidden, out, operations))
            self.add_module(f"mapping_patch_{level}", _mlp(width, hidden, out, operations))

    def forward(self, embeddings: Tensor, levels: Tensor) -> Tensor:
        """``[n, 1280]``, ``[n, 5, 577, W]`` -> ``[n, 5 + 5, C]``."""
        tokens = [self.body(embeddings).unflatten(1, (self.id_tokens, -1))]
        for i in range(LEVELS):
            of_class = self.get_submodule(f"mapping_{i}")(levels[:, i, :1])
            of_patches = self.get_submodule(f"mapping_patch_{i}")(levels[:, i, 1:])
            tokens.append(of_class + of_patches.mean(dim=1, keepdim=True))
        return torch.cat(tokens, dim=1)


class IdEncoder(Projector):
    """PuLID v1: five tokens of the embeddings, and one of each level."""

    nobody = _NOBODY

    def __init__(
        self,
        needs: Mapping[str, Reading],
        sizes: PulidSizes,
        operations: Any = nn,
        merging: Merging = MERGING["fidelity"],
    ) -> None:
        super().__init__()
        self.merging = merging
        self.needs = needs
        self.tokens_per_reference = sizes.id_tokens + LEVELS
        self.image_proj = _IdEncoder(sizes, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``face [n, 512]``, ``eva [n, 768]``, ``eva_levels [n, 5, 577, W]`` -> ``[n, 10, C]``."""
        return cast(Tensor, self.image_proj(_embeddings(features), features[EVA_LEVELS]))


@dataclass(frozen=True, kw_only=True)
class IdFormerSizes(PulidSizes):
    """Sizes of v1.1's."""

    width: int
    """d: of the latent tokens."""
    heads: int
    depth: int
    """A multiple of the number of levels."""
    tokens: int
    """That come out."""


class _IdFormer(nn.Module):
    """Latent tokens and the embeddings' tokens read one level after another."""

    def __init__(self, sizes: IdFormerSizes, operations: Any) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.id_tokens, self.tokens, self.depth = sizes.id_tokens, sizes.tokens, sizes.depth
        self.latents = nn.Parameter(torch.zeros(1, sizes.tokens, width))
        self.proj_out = nn.Parameter(torch.zeros(width, sizes.context_width))
        self.layers = PerceiverLayers(width, sizes.heads, sizes.depth, operations)
        for level in range(LEVELS):
            inputs = sizes.level_width
            self.add_module(f"mapping_{level}", _mlp(inputs, hidden, width, operations))
        outputs = sizes.id_tokens * width
        self.id_embedding_mapping = _mlp(sizes.inputs, hidden, outputs, operations)

    def forward(self, embeddings: Tensor, levels: Tensor, weight: Tensor) -> Tensor:
        """b people of n photos: ``[b, n, 1280]``, ``[b, n, 5, 577, W]`` and the photos' weight
        ``[n]`` -> ``[b, M, C]``."""
        ids = self.id_embedding_mapping(embeddings)
        ids = ids.unflatten(-1, (self.id_tokens, -1)).flatten(1, 2)
        latents = torch.cat([self.latents.to(ids).expand(len(ids), -1, -1), ids], dim=1)
        bias = self._bias(weight.to(ids.device), levels.shape[3])
        step = self.depth // LEVELS
        for i in range(LEVELS):
            level = self.get_submodule(f"mapping_{i}")(levels[:, :, i].flatten(1, 2))
            part = slice(i * step, (i + 1) * step)
            latents = self.layers.read(torch.cat([ids, level], dim=1), latents, bias, part)
        return latents[:, : self.tokens] @ self.proj_out.to(ids)

    def _bias(self, weight: Tensor, tokens: int) -> Tensor:
        """log of how often each key counts: photos' tokens, their states, latents, tokens again."""
        log = weight.log()
        ids, states = log.repeat_interleave(self.id_tokens), log.repeat_interleave(tokens)
        return torch.cat([ids, states, log.new_zeros(self.tokens), ids])


class IdFormer(JointProjector):
    """PuLID v1.1: all photos in one pass make 32 tokens."""

    nobody = _NOBODY

    def __init__(
        self,
        needs: Mapping[str, Reading],
        sizes: IdFormerSizes,
        operations: Any = nn,
        merging: Merging = PULID_V11,
    ) -> None:
        super().__init__()
        self.merging = merging
        self.needs = needs
        self.tokens_per_reference = sizes.tokens
        self.image_proj = _IdFormer(sizes, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``face [n, 512]``, ``eva [n, 768]``, ``eva_levels [n, 5, 577, W]`` -> ``[n, M, C]``."""
        embeddings, levels = _embeddings(features)[:, None], features[EVA_LEVELS][:, None]
        return cast(Tensor, self.image_proj(embeddings, levels, embeddings.new_ones(1)))

    def of_person(self, features: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """The same for one person of n photos -> ``[1, M, C]``."""
        embeddings, levels = _embeddings(features)[None], features[EVA_LEVELS][None]
        return cast(Tensor, self.image_proj(embeddings, levels, weight))
