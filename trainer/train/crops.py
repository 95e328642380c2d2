"""Where a target is cut from its photo, and SDXL's size and crop ids that tell the UNet so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import Data
from ..data_index import Row

Bucket = tuple[int, int]
"""Height and width of a target in pixels."""

_FACE_ROOM = 1.1  # a crop is at least this much larger than the face's box


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A window of a photo, and the size it is resized to."""

    left: int
    top: int
    width: int
    height: int
    """Pixels of the photo."""
    bucket: Bucket
    photo: Bucket
    """Height and width of the whole photo."""

    @property
    def size_ids(self) -> tuple[int, ...]:
        """SDXL's six: original height and width, crop top and left, target height and width.

        As in SDXL's own training the crop is counted in the photo resized to the target's scale.
        """
        scale = self.bucket[0] / self.height
        top, left = round(self.top * scale), round(self.left * scale)
        return (*self.photo, top, left, *self.bucket)

    def inside(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points ``[n, 2]`` (x, y) of the photo in pixels of the target picture."""
        height, width = self.bucket
        scale = np.array([width / self.width, height / self.height])
        return np.asarray((points - (self.left, self.top)) * scale)

    def cut(self, photo: Image.Image) -> Image.Image:
        """The target picture."""
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        height, width = self.bucket
        return photo.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def buckets(data: Data) -> tuple[Bucket, ...]:
    """All target sizes: sides in whole steps, area about ``resolution`` squared, widest last."""
    step, area = data.bucket_step, data.resolution**2
    found = {(data.resolution, data.resolution)}
    for height in range(step, int(data.resolution * data.max_aspect) + 1, step):
        width = round(area / height / step) * step
        if width and max(height / width, width / height) <= data.max_aspect:
            found.add((height, width))
    return tuple(sorted(found, key=lambda size: size[1] / size[0]))


def nearest_bucket(width: int, height: int, choices: tuple[Bucket, ...]) -> int:
    """Which bucket has the photo's aspect, most nearly in the logarithm."""
    aspect = math.log(width / height)
    return min(
        range(len(choices)), key=lambda i: abs(math.log(choices[i][1] / choices[i][0]) - aspect)
    )


def draw_crop(row: Row, bucket: Bucket, data: Data, rng: np.random.Generator) -> Crop:
    """A window around the face of ``bucket``'s aspect, the face's share of it drawn at random.

    Where the photo is too small or too tight for a share, the nearest possible one is taken.
    """
    height, width = bucket
    x0, y0, x1, y1 = row.box
    largest = min(row.width / width, row.height / height)  # photo pixels per target pixel
    share = math.exp(rng.uniform(math.log(data.min_face), math.log(data.max_face)))
    whole_face = _FACE_ROOM * max((x1 - x0) / width, (y1 - y0) / height)
    smallest = min(largest, max(whole_face, 1.0 / data.max_upscale))
    scale = min(max((y1 - y0) / share / height, smallest), largest)
    cut_width = min(row.width, max(1, round(width * scale)))
    cut_height = min(row.height, max(1, round(height * scale)))
    return Crop(
        left=_place(x0, x1, cut_width, row.width, rng),
        top=_place(y0, y1, cut_height, row.height, rng),
        width=cut_width,
        height=cut_height,
        bucket=bucket,
        photo=(row.height, row.width),
    )


def _place(low: float, high: float, size: int, limit: int, rng: np.random.Generator) -> int:
    """Start of a window of ``size`` within ``limit`` that holds [low, high] if it can."""
    first, last = max(0.0, high - size), min(float(limit - size), low)
    position = rng.uniform(first, last) if first <= last else (low + high - size) / 2
    return int(min(max(0.0, round(position)), limit - size))
