"""Projectors: the features of a person to the tokens that cross-attention reads (Eq. 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from .face_clip import CLIP, CLIP_TOKENS, FACE
from .features import Reading
from .merging import PLAIN, Merging
from .records import AdapterConfig

FACE_HIDDEN = 1024


Nobody = Literal["zeros", "encoded"]
"""What stands for nobody: zeros, or what the encoder makes of an empty picture."""


class Projector(nn.Module, ABC):
    """Features of each reference to tokens.

    Its weights lie in child modules, under the names that they have in an adapter's file: the
    adapter takes these for its own.
    """

    needs: Mapping[str, Reading]
    """The features it reads, by name, and how they must have been read."""
    tokens_per_reference: int
    """M: tokens that one reference becomes."""
    nobody: Mapping[str, Nobody] = {}
    """What this family was trained with as nobody, by feature; ``encoded`` lies in the feature
    (``Feature.null``). Where nothing is said: the feature's null, or zeros where it has none."""
    merging: Merging = PLAIN
    """How its tokens' attention is added to the text's in one stream."""

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``[n, *shape]`` of each feature it needs -> ``[n, M, C]``, each reference by itself."""

    def of_person(self, features: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """c_id of one person of n references with ``weight [n]``: ``[1, T, C]``.

        Here the references' tokens side by side, T = n * M, whose weight is not yet in them.
        """
        tokens: Tensor = self(features)
        assert tokens.shape[1] == self.tokens_per_reference, "as the projector says"
        return tokens.flatten(0, 1)[None]

    def of_nobody(self, features: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """c_id of nobody beside a person of ``weight [n]``: ``[1, T, C]``.

        ``features``: nobody as one reference. One is enough here: attention over copies of the
        same tokens equals attention over one.
        """
        return self.of_person(features, torch.ones_like(weight[:1]))

    def token_weight(self, weight: Tensor) -> Tensor:
        """How much each of ``of_person``'s tokens counts, ``[T]``: here as its reference."""
        return weight.repeat_interleave(self.tokens_per_reference)


class JointProjector(Projector):
    """All references go through one pass and share its M tokens, T = M; their weight acts in it."""

    @abstractmethod
    def of_person(self, features: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """See ``Projector``; a reference of weight 2 counts as two copies."""

    def token_weight(self, weight: Tensor) -> Tensor:
        """All alike: none belongs to one reference."""
        return weight.new_ones(self.tokens_per_reference)


class Mapper(nn.Module):
    """Linear, GELU, Linear, LayerNorm; the output is cut into ``tokens`` tokens of width C."""

    def __init__(
        self, width: int, hidden: int, tokens: int, context_width: int, operations: Any = nn
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj_in = operations.Linear(width, hidden)
        self.proj_out = operations.Linear(hidden, tokens * context_width)
        self.norm = operations.LayerNorm(context_width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, ..., width]`` -> ``[n, M, C]``: M tokens in, or one vector made into ``tokens``."""
        x = self.proj_out(gelu(self.proj_in(x)))
        return cast(Tensor, self.norm(x.view(x.shape[0], -1, x.shape[-1] // self.tokens)))


class Mappers(Projector):
    """The paper's: the image encoder's 257 tokens, then T of the face embedding (Eq. 4)."""

    def __init__(self, config: AdapterConfig, operations: Any = nn) -> None:
        """``operations`` supplies ``Linear`` and ``LayerNorm``."""
        super().__init__()
        c, d = config.context_width, config.clip_width
        self.needs = config.needs
        self.tokens_per_reference = CLIP_TOKENS + config.face_tokens
        self.clip_mapper = Mapper(d, d, 1, c, operations)
        self.face_mapper = Mapper(config.face_width, FACE_HIDDEN, config.face_tokens, c, operations)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``face [n, 512]``, ``clip [n, 257, D]`` -> ``[n, 257 + T, C]``."""
        return torch.cat(
            [self.clip_mapper(features[CLIP]), self.face_mapper(features[FACE])], dim=1
        )
