"""What is known of the model calls of one evaluation: which rows they have, what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import PatchConflictError
from ..method.placement import Size
from ..method.rows import KeyValues
from ..sdxl.layers import BlockKey
from .comfyui_others import Options, Twins
from .comfyui_rows import Conds, in_window, uuids_of

Streams = Literal["both", "text", "identity", "one"]
"""The rows of a model call: both streams', one of two streams', or those of the only one."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the attention patches of one set of model calls need to know."""

    active: tuple[int, ...]
    """Indices into the run's people."""
    roles: tuple[bool, ...]
    """By cond index: True where the cond is negative and gets the null identity."""
    rows: Streams = "both"


class Record:
    """The text stream's self-attention keys and values of one set of model calls."""

    def __init__(self) -> None:
        self._kept: dict[tuple[BlockKey, Any], list[KeyValues]] = {}

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, block: BlockKey, uuids: Sequence[Any], k: Tensor, v: Tensor) -> None:
        """``k`` and ``v`` ``[len(uuids) * b, N, C]``, by the cond of each chunk."""
        chunks = zip(uuids, k.chunk(len(uuids)), v.chunk(len(uuids)), strict=True)
        for uuid, k_chunk, v_chunk in chunks:
            self._kept.setdefault((block, uuid), []).append((k_chunk, v_chunk))

    def take(self, block: BlockKey, uuids: Sequence[Any], like: Tensor) -> KeyValues:
        """What was kept for these conds, each once and in the order it came."""
        pairs = [self._next(block, uuid) for uuid in uuids]
        k, v = (torch.cat([pair[i] for pair in pairs]).to(like) for i in (0, 1))
        if k.shape != like.shape:
            raise PatchConflictError(
                f"Another node gave the model {list(like.shape)} for the person where it had given "
                f"{list(k.shape)} for the prompt. Bypass the node that wraps the model, or "
                "Infinite-ID."
            )
        return k, v

    def _next(self, block: BlockKey, uuid: Any) -> KeyValues:
        kept = self._kept.get((block, uuid))
        if not kept:
            raise PatchConflictError(
                "Another node called the model more often for the person than for the prompt. "
                "Bypass the node that wraps the model, or Infinite-ID."
            )
        return kept.pop(0)


@dataclass(kw_only=True)
class TextCall:
    """One evaluation that the text stream asked for, and what is known of the identity stream's."""

    x: Tensor
    asked: list[list[Any]]
    expected: Tensor | None = None
    """The identity stream's latent that was evaluated along with it."""
    identity: list[Tensor] | None = None
    """What came out for it."""
    record: Record | None = None

    def answers(self, conds: Conds, x: Tensor) -> bool:
        """Whether the identity stream's evaluation has been done along with this one."""
        if self.expected is None or self.asked != uuids_of(conds):
            return False
        return self.expected is x or torch.equal(self.expected, x)


@dataclass(kw_only=True)
class Step:
    """One model evaluation of the sampler in ``own``, which is two of the guider's."""

    text: Tensor
    identity: Tensor
    stream: Literal["text", "identity", "one"]
    calls: list[TextCall] = field(default_factory=list)
    answered: int = 0

    def other_stream(self, x: Tensor, options: Options, frames: int) -> Tensor | None:
        """The other stream's latent beside a stream's ``x``: whole or a context window's rows."""
        mine, other = self.text, self.identity
        if self.stream == "identity":
            mine, other = other, mine
        if x is mine:
            return other
        window = options["transformer_options"].get("context_window")
        if window is None or getattr(window, "dim", 0) != 0:
            return None
        cut = in_window(mine, window, frames)
        same = cut.shape == x.shape and torch.equal(cut, x)
        return in_window(other, window, frames) if same else None


@dataclass(kw_only=True)
class CallState:
    """What changes in the course of a run, and the attention patches look up."""

    guider: Any
    """The host's; None once the run is over."""
    rows: int
    """b, the pictures of the run."""
    canvas: Size
    """Height and width of the latent that was asked for last."""
    twins: Twins = field(default_factory=Twins)
    asked_rows: int = 0
    """Rows of the latent that was asked for last."""
    record: Record | None = None
    """Where the text stream's keys and values are kept, or read, at the moment."""
