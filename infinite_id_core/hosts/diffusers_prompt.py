"""What SDXL's UNet reads beside the latent: a prompt, and the picture's sizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt as SDXL's UNet reads it."""

    context: Tensor
    """Text tokens ``[1 or b, T, C]``."""
    pooled: Tensor
    """Pooled text ``[1 or b, P]``."""

    def rows(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Context and pooled text repeated to ``count`` rows (whole blocks of their own rows)."""
        context, pooled = (
            part.to(like).repeat(count // part.shape[0], *[1] * (part.ndim - 1))
            for part in (self.context, self.pooled)
        )
        return context, pooled


def default_size_ids(noise: Tensor) -> tuple[int, ...]:
    """SDXL's ids of an uncropped picture of the latent's size: height, width, 0, 0, h, w."""
    height, width = (8 * side for side in noise.shape[-2:])
    return height, width, 0, 0, height, width
