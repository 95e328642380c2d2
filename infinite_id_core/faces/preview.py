"""The numbered preview: which face has which number, and which are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .find import FoundFaces
from .pixels import check_image, reduced, reduction, to_bgr

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]

_CHOSEN, _OTHER = (64, 200, 96), (235, 180, 60)


def numbered_previews(images: Tensor, found: Sequence[FoundFaces]) -> Tensor:
    """``numbered_preview`` of each of ``images [B, H, W, C]``: ``[B, h, w, 3]``."""
    return torch.stack([numbered_preview(*pair) for pair in zip(images, found, strict=True)])


def numbered_preview(image: Tensor, found: FoundFaces, max_side: int = 1024) -> Tensor:
    """``image [H, W, C]`` with box and number of every face; the chosen ones are green.

    Returns ``[h, w, 3]`` with the longer side at most ``max_side`` px. Raises ``ImageError``.
    """
    from PIL import ImageDraw

    check_image(image)
    canvas = _canvas(image, max_side)
    scale = canvas.width / image.shape[1]
    draw = ImageDraw.Draw(canvas)
    unit = max(1, round(min(canvas.size) / 300))
    chosen = {face.index for face in found.chosen}
    for number, face in enumerate(found.detected):
        x0, y0, x1, y1 = (value * scale for value in face.box)
        colour = _CHOSEN if number in chosen else _OTHER
        _draw_face(draw, (x0, y0, x1, y1), str(number), colour, unit)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255.0)


def _canvas(image: Tensor, max_side: int) -> Image.Image:
    from PIL import Image

    picture = to_bgr(reduced(image, reduction(image)))
    canvas = Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))
    canvas.thumbnail((max_side, max_side), Image.Resampling.BOX)
    return canvas


def _draw_face(
    draw: ImageDraw.ImageDraw, box: Box, label: str, colour: tuple[int, int, int], unit: int
) -> None:
    """A box, with its number in a badge above it, or inside it where there is no room above."""
    from PIL import ImageFont

    x0, y0, x1, y1 = box
    draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=unit)
    font = ImageFont.load_default(size=max(10, 14 * unit))
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    wide, high = right - left + 4 * unit, bottom - top + 4 * unit
    badge_y = y0 - high if y0 >= high else y0
    draw.rectangle((x0, badge_y, x0 + wide, badge_y + high), fill=colour)
    draw.text((x0 + 2 * unit - left, badge_y + 2 * unit - top), label, (0, 0, 0), font=font)
