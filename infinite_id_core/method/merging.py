"""How PuLID adds an identity to the text's result in one stream (its ``attention_processor.py``).

Zero tokens beside the identity's dampen it: with key and value 0 they only take a share of the
attention. What the identity adds is made orthogonal to what the text gave, channel by channel over
the picture's positions, so that it disturbs the prompt less; wholly, or less where a position
attends to the face's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import OptionError

Orthogonal = Literal["off", "ortho", "ortho_v2"]
ORTHOGONAL: tuple[Orthogonal, ...] = get_args(Orthogonal)
_TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class Merging:
    """Eq. 6's sum in one stream, as an adapter's authors have it. Raises ``OptionError``."""

    zeros: int = 0
    """Tokens with key and value 0 after the identity's own."""
    orthogonal: Orthogonal = "off"
    """``ortho``: what is parallel to the text's result is taken away; ``ortho_v2``: the less of
    it, the more a position attends to the first ``face_tokens``."""
    face_tokens: int = 5

    def __post_init__(self) -> None:
        if self.orthogonal not in ORTHOGONAL or self.zeros < 0 or self.face_tokens < 1:
            raise OptionError(
                f"orthogonal must be one of {ORTHOGONAL}, zeros not negative and face_tokens from "
                f"1 on; got {self}."
            )

    @property
    def plain(self) -> bool:
        """Whether it is the plain sum."""
        return self == PLAIN

    def padded(self, tokens: Tensor) -> Tensor:
        """``[B, M, C]`` -> ``[B, M + zeros, C]``."""
        return pad(tokens, (0, 0, 0, self.zeros))

    def padded_weight(self, weight: Tensor | None) -> Tensor | None:
        """Weights of tokens, ``[M]`` -> ``[M + zeros]``: a zero token counts once."""
        return None if weight is None else pad(weight, (0, self.zeros), value=1.0)

    def added(self, out: Tensor, text_out: Tensor, q: Tensor, key: Tensor, heads: int) -> Tensor:
        """What of the identity's result ``out [B, N, C]`` is added to ``text_out [B, N, C]``.

        ``q [B, N, C]`` and the padded ``key [B, M, C]`` of ``heads`` heads; in float32.
        """
        if self.orthogonal == "off":
            return out
        exact, text = out.float(), text_out.float()
        along = (text * exact).sum(dim=1, keepdim=True)
        parallel = along / (text * text).sum(dim=1, keepdim=True).clamp(min=_TINY) * text
        if self.orthogonal == "ortho_v2":
            parallel = parallel * (1.0 - self._face_share(q, key, heads))
        return (exact - parallel).to(out.dtype)

    def _face_share(self, q: Tensor, key: Tensor, heads: int) -> Tensor:
        """How much each position attends to the face's tokens, ``[B, N, 1]``.

        The products are not divided by the width's root, and the heads' shares are averaged.
        """
        q_h, k_h = (x.float().view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, key))
        share = torch.softmax(q_h @ k_h.transpose(-2, -1), dim=-1).mean(dim=1)  # [B, N, M]
        return share[..., : self.face_tokens].sum(dim=-1, keepdim=True)


PLAIN = Merging()
MERGING: Mapping[str, Merging] = {
    "fidelity": Merging(zeros=8, orthogonal="ortho_v2"),
    "style": Merging(zeros=16, orthogonal="ortho"),
    "neutral": PLAIN,
}
"""PuLID's modes by the names that its users know."""
PULID_V11 = Merging(zeros=20, orthogonal="ortho_v2")
"""What version 1.1 is run with."""
