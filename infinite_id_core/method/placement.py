"""An identity's place in a run: how strongly, when and where it takes effect."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import OptionError
from .attention import MAX_STRENGTH
from .identity import Identity

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class IdentityPlacement:
    """An identity, how strongly, when and where it takes effect. Raises ``OptionError``."""

    identity: Identity
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: Tensor | None = None
    """``[1 or b, H, W]`` in [0, 1], in picture space; None is everywhere. Other layouts that
    packs hand around are brought into this one."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= MAX_STRENGTH:
            raise OptionError(f"strength must lie in [0, {MAX_STRENGTH}], got {self.strength}.")
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise OptionError(
                "start_percent and end_percent must satisfy 0 <= start <= end <= 1, got "
                f"{self.start_percent} and {self.end_percent}."
            )
        if self.mask is not None:
            object.__setattr__(self, "mask", picture_mask(self.mask))


def picture_mask(mask: Tensor) -> Tensor:
    """A mask as ``[batch, H, W]`` in [0, 1], float32.

    Takes ``[H, W]``, ``[batch, H, W]``, ``[batch, 1, H, W]`` and ``[batch, H, W, 1]`` of any
    number type. Raises ``OptionError`` where it is of another shape, not finite, or zero
    everywhere, which would leave the person out without a word.
    """
    shape = list(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    elif mask.ndim == 4 and shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 4 and shape[3] == 1:
        mask = mask[..., 0]
    if mask.ndim != 3 or 0 in mask.shape:
        raise OptionError(
            f"A mask must be [batch, height, width], got {shape}. Connect a MASK, or turn a "
            "picture into one with Convert Image to Mask."
        )
    mask = mask.float()
    if not bool(mask.isfinite().all()):
        raise OptionError("The mask holds values that are not numbers (NaN or infinity).")
    if not bool((mask > 0).any()):
        raise OptionError(
            f"The mask {shape} is zero everywhere, so this person would be nowhere in the "
            "picture. Load Image gives such a mask for a picture without transparency: paint a "
            "mask, or connect none to have the person everywhere. To leave the person out, set "
            "strength to 0."
        )
    return mask.clamp(0.0, 1.0)


def mask_tokens(mask: Tensor, size: Size, tokens: int) -> Tensor:
    """A picture mask ``[m, H, W]`` as weights of a layer's tokens ``[m, tokens, 1]``, float32."""
    grid = token_grid(size, tokens)
    small = interpolate(mask.float()[:, None], size=grid, mode="bilinear", antialias=True)
    return small.flatten(2).transpose(1, 2)


def token_grid(size: Size, tokens: int) -> Size:
    """Height and width of a layer's token grid for a latent of ``size``.

    SDXL's strided convolutions round up. Where no halving fits (other packs scale inside the
    UNet), the factor pair nearest to the latent's aspect.
    """
    height, width = size
    while height * width > tokens and (height > 1 or width > 1):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width == tokens:
        return height, width
    pairs = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
    return min(pairs, key=lambda p: abs(math.log((p[0] / p[1]) / (size[0] / size[1]))))
