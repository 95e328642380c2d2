"""Projectors: the features of a person to the tokens that cross-attention reads (Eq. 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from .face_clip import CLIP, CLIP_TOKENS, FACE
from .features import Reading
from .records import AdapterConfig

FACE_HIDDEN = 1024


class Projector(nn.Module, ABC):
    """Features of each reference to tokens.

    Its weights lie in child modules, under the names that they have in an adapter's file: the
    adapter takes these for its own.
    """

    needs: Mapping[str, Reading]
    """The features it reads, by name, and how they must have been read."""
    tokens_per_reference: int
    """M: tokens that one reference becomes."""

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """``[n, *shape]`` of each feature it needs -> tokens ``[n, M, C]``."""


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
