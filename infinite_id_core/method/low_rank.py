"""An adapter's low-rank part (a FaceID file's LoRA) in a run: how strongly, and for which rows.

A FaceID file changes the UNet's own attention by a LoRA. Its authors run it for the whole model.
With two streams the text stream is there to be the plain model's, so that there it acts on the
identity stream's rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from ..errors import OptionError
from .adapter import Adapter
from .attention import StreamOptions
from .layer_parts import LowRank
from .rows import Rows

LowRankRows = Literal["auto", "identity", "all", "off"]
LOW_RANK_ROWS: tuple[LowRankRows, ...] = get_args(LowRankRows)
MAX_LOW_RANK_STRENGTH = 2.0


@dataclass(frozen=True, kw_only=True)
class LowRankUse:
    """Where a low-rank part acts, and how strongly. Raises ``OptionError``."""

    rows: LowRankRows = "auto"
    """``auto``: ``identity`` in two streams, ``all`` in one, as its authors run it."""
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.rows not in LOW_RANK_ROWS:
            raise OptionError(f"A LoRA acts on one of {LOW_RANK_ROWS}, got {self.rows!r}.")
        if not 0.0 <= self.strength <= MAX_LOW_RANK_STRENGTH:
            raise OptionError(
                f"A LoRA's strength must lie in [0, {MAX_LOW_RANK_STRENGTH:g}], got "
                f"{self.strength}."
            )

    def rows_in(self, options: StreamOptions) -> LowRankRows:
        """``identity``, ``all`` or ``off``. In one stream there are no other rows than all."""
        if not self.strength or self.rows == "off":
            return "off"
        if options.mixing == "off":
            return "all"
        return "identity" if self.rows == "auto" else self.rows


class LowRankRun:
    """The low-rank parts of a run's people; each adapter's acts once, however many read it."""

    def __init__(
        self, uses: Sequence[LowRankUse], adapters: Sequence[Adapter], options: StreamOptions
    ) -> None:
        """``uses`` and ``adapters``: by person."""
        places = [
            use.rows_in(options) if adapter.low_rank_parts else "off"
            for use, adapter in zip(uses, adapters, strict=True)
        ]
        self.strengths = [use.strength for use in uses]
        self.identity = tuple(i for i, place in enumerate(places) if place == "identity")
        """Indices of the people whose part acts on the identity stream's rows."""
        self.all = tuple(i for i, place in enumerate(places) if place == "all")
        """Of those whose part acts on all rows, in the whole run."""

    def active(self, people: Sequence[int]) -> tuple[int, ...]:
        """Those of ``people`` whose part acts on the identity stream's rows."""
        return tuple(index for index in self.identity if index in people)

    def added(
        self, name: str, x: Tensor, people: Sequence[int], adapter_of: Callable[[int], Adapter]
    ) -> Tensor | None:
        """What the parts of ``people`` add to the layer ``name`` for its input ``x [B, N, in]``.

        ``[B, N, out]``, or None where none of them changes that layer. An adapter that several
        of them read counts once, with the largest of their strengths.
        """
        strengths: dict[Adapter, float] = {}
        for index in people:
            adapter = adapter_of(index)
            strengths[adapter] = max(strengths.get(adapter, 0.0), self.strengths[index])
        total = None
        for adapter, strength in strengths.items():
            part = adapter.low_rank_parts.get(name)
            if part is not None:
                change = _run(part, x) * strength
                total = change if total is None else total + change
        return total

    def on_people(
        self,
        name: str,
        y: Tensor,
        x: Tensor,
        rows: Rows,
        people: Sequence[int],
        adapter_of: Callable[[int], Adapter],
    ) -> Tensor:
        """``y = layer(x)`` with what is added in the people's rows of a call."""
        change = self.added(name, rows.people_of(x), people, adapter_of)
        return y if change is None else rows.with_people(y, rows.people_of(y) + change)


def _run(part: LowRank, x: Tensor) -> Tensor:
    """In the part's own dtype where its host does not cast weights by itself."""
    like = part.down.weight if type(part.down) is nn.Linear else x
    change: Tensor = part(x.to(like.dtype))
    return change.to(x.dtype)
