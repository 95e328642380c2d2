"""A face's five landmarks as the drawing that InstantID's ControlNet was trained on.

The drawing is that of InstantID's ``draw_kps``: on black, a flat ellipse from each landmark to the
nose in the landmark's colour at 60 % of its brightness, and above all a disc on each landmark. Its
sizes are fixed, in pixels, whatever the picture's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .detect import DetectedFace

Array = NDArray[Any]
Size = tuple[int, int]
"""Width and height in pixels."""

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
"""RGB of left eye, right eye, nose, mouth's left and right corner."""
NOSE = 2
RADIUS = 10.0
"""Of a disc."""
HALF_WIDTH = 4.0
"""Of an ellipse, across."""
LIMB_BRIGHTNESS = 0.6


def pose_drawings(faces: Sequence[DetectedFace], photo: Size, picture: Size) -> Tensor:
    """The faces of photos of one size as drawings ``[n, H, W, 3]`` in [0, 1], of the picture's."""
    drawn = [draw_keypoints(fitted(face.landmarks, photo, picture), picture) for face in faces]
    return torch.from_numpy(np.stack(drawn)).float() / 255.0


def fitted(landmarks: Array, photo: Size, picture: Size) -> Array:
    """Landmarks ``[5, 2]`` of a photo where they lie if all of it is fitted into a picture.

    The photo keeps its proportions and stands in the middle.
    """
    scale = min(picture[0] / photo[0], picture[1] / photo[1])
    rest = np.asarray(picture) - scale * np.asarray(photo)
    moved: Array = scale * landmarks + rest / 2
    return moved


def draw_keypoints(landmarks: Array, picture: Size) -> Array:
    """Landmarks ``[5, 2]``, in pixels of a picture, as RGB ``[H, W, 3]`` of uint8."""
    canvas = np.zeros((picture[1], picture[0], 3), np.uint8)
    points = np.round(landmarks)
    for point, colour in zip(points, COLOURS, strict=True):
        _ellipse(canvas, point, points[NOSE], np.asarray(colour) * LIMB_BRIGHTNESS)
    for point, colour in zip(points, COLOURS, strict=True):
        _fill(canvas, point, (RADIUS, RADIUS), (1.0, 0.0), np.asarray(colour))
    return canvas


def _ellipse(canvas: Array, a: Array, b: Array, colour: Array) -> None:
    """A flat ellipse whose long axis reaches from ``a`` to ``b``; nothing where they are one."""
    reach = b - a
    length = float(np.hypot(*reach))
    if length > 0:
        along = (float(reach[0]) / length, float(reach[1]) / length)
        _fill(canvas, (a + b) / 2, (length / 2, HALF_WIDTH), along, colour)


def _fill(
    canvas: Array,
    centre: Array,
    axes: tuple[float, float],
    along: tuple[float, float],
    colour: Array,
) -> None:
    """Fill an ellipse of the half ``axes``, the first of them ``along`` a unit vector."""
    reach = max(axes) + 1
    low = np.clip(np.floor(centre - reach), 0, canvas.shape[1::-1]).astype(int)
    high = np.clip(np.ceil(centre + reach) + 1, 0, canvas.shape[1::-1]).astype(int)
    y, x = np.mgrid[low[1] : high[1], low[0] : high[0]].astype(np.float64)
    x, y = x - centre[0], y - centre[1]
    u, v = along[0] * x + along[1] * y, along[0] * y - along[1] * x
    inside = (u / axes[0]) ** 2 + (v / axes[1]) ** 2 <= 1.0
    canvas[low[1] : high[1], low[0] : high[0]][inside] = colour.astype(np.uint8)
