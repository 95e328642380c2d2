"""Pictures as face models take them: checked, in RGB or BGR, and reduced where they are huge.

Pictures are ``[H, W, C]`` float tensors in [0, 1] with 1 (grey), 3 (RGB) or 4 (RGBA) channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ImageError
from ..packages import require

Array = NDArray[Any]

MIN_SIDE = 16  # pixels: nothing smaller can show a face
MAX_SIDE = 65536
DETECTION_SIDE = 4096  # pixels: larger pictures are searched on a reduced copy
_BAND = 2**24  # pixels converted at a time


def check_image(image: Tensor) -> None:
    """Refuse what is no picture, before anything is allocated for it. Raises ``ImageError``."""
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ImageError(
            "Expected a picture [height, width, channels] with 1, 3 or 4 channels, got "
            f"{list(image.shape)}."
        )
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise ImageError(
            f"Expected a picture with sides from {MIN_SIDE} to {MAX_SIDE} pixels, got {width} x "
            f"{height}. " + ("It is empty or too small to show a face." if height * width == 0
            or min(height, width) < MIN_SIDE else "Scale it down first.")
        )  # fmt: skip


def check_batch(images: Tensor) -> None:
    """As ``check_image`` for ``[B, H, W, C]``. Raises ``ImageError``, also for B = 0."""
    if images.ndim != 4 or images.shape[0] == 0:
        raise ImageError(
            "Expected a batch of at least one picture [pictures, height, width, channels], got "
            f"{list(images.shape)}. Connect an image."
        )
    check_image(images[0])


def opencv() -> Any:
    """The module ``cv2``. Raises ``MissingPackageError``."""
    return require("cv2", "to find faces", "opencv-python-headless")


def to_rgb(image: Tensor) -> Tensor:
    """``[..., 1 or 3 or 4]`` -> ``[..., 3]`` float32 on the CPU; transparency becomes white."""
    image = image.detach().to(device="cpu", dtype=torch.float32)
    if image.shape[-1] == 1:
        return image.expand(*image.shape[:-1], 3)
    if image.shape[-1] == 4:
        alpha = image[..., 3:].clamp(0.0, 1.0)
        return image[..., :3] * alpha + (1.0 - alpha)
    return image


def to_bgr(image: Tensor) -> Array:
    """``[H, W, C]`` -> uint8 BGR ``[H, W, 3]``, what insightface reads."""
    pixels = (to_rgb(image).nan_to_num(0.0) * 255.0).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.numpy()[..., ::-1])


def reduced(image: Tensor, factor: int) -> Tensor:
    """Means over blocks of ``factor`` pixels: ``[H, W, C]`` -> ``[H // f, W // f, 3]`` float32.

    Works through bands of rows, so that a huge picture is never held twice.
    """
    cv2 = opencv()
    factor = min(factor, *image.shape[:2])
    if factor <= 1:
        return to_rgb(image)
    height, width = image.shape[0] // factor, image.shape[1] // factor
    out = np.empty((height, width, 3), dtype=np.float32)
    rows = max(1, _BAND // (image.shape[1] * factor))
    for top in range(0, height, rows):
        count = min(rows, height - top)
        band = to_rgb(image[top * factor : (top + count) * factor, : width * factor])
        cv2.resize(
            np.ascontiguousarray(band.numpy()),
            (width, count),
            dst=out[top : top + count],
            interpolation=cv2.INTER_AREA,
        )
    return torch.from_numpy(out)


def reduction(image: Tensor) -> int:
    """The whole number that brings a picture's longer side to ``DETECTION_SIDE`` or below."""
    return math.ceil(max(image.shape[:2]) / DETECTION_SIDE)


def from_reduced(factor: int) -> Array:
    """From pixels of a copy reduced by ``factor`` to those of the original: ``[3, 3]``."""
    middle = (factor - 1) / 2  # of a block of pixels
    return np.array([[factor, 0.0, middle], [0.0, factor, middle], [0.0, 0.0, 1.0]])
