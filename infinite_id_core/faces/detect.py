"""Detection: where faces are, and what was tried to find them.

Boxes are ``(x0, y0, x1, y1)`` and landmarks ``[5, 2]`` ``(x, y)``, both in pixels of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import Tensor

from ..errors import FaceModelError
from .pack import check_detector
from .pixels import Array, check_image, reduced, reduction, to_bgr

RETRY_SIZES = (640, 512, 384, 320, 256, 192, 128)
_RETRY_BORDER = 0.5  # of the longer side, on each side: makes room around tight crops
_MAX_ASPECT = 8  # the detector's own resize rounds thinner pictures to nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectedFace:
    """One face as the detector sees it."""

    box: tuple[float, float, float, float]
    landmarks: Array
    """``[5, 2]``: left eye, right eye, nose, mouth's left and right corner, as seen."""
    score: float
    """The detector's confidence in [0, 1]."""

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        x0, y0, x1, y1 = self.box
        return max(0.0, x1 - x0) * max(0.0, y1 - y0)


def detect_faces(app: Any, image: Tensor) -> tuple[tuple[DetectedFace, ...], tuple[str, ...]]:
    """All faces of ``image [H, W, C]``, and what was tried, in words.

    Where none is found, tries again with a border (tight crops) and at other detector sizes. The
    detector's own size is passed around, never changed. Raises ``ImageError``, ``FaceModelError``.
    """
    check_detector(app)
    check_image(image)
    factor = reduction(image)
    picture = to_bgr(reduced(image, factor))
    tried: list[str] = []
    for size in _sizes(app):
        for border in (0.0, _RETRY_BORDER):
            tried.append(f"{_size_name(app, size)}{' with a border' if border else ''}")
            found = _detect(app, picture, size, border)
            if found:
                limits = (image.shape[1], image.shape[0])
                return tuple(_to_original(f, factor, limits) for f in found), tuple(tried)
    return (), tuple(tried)


def _detect(
    app: Any, picture: Array, size: tuple[int, int] | None, border: float
) -> list[DetectedFace]:
    """One try on a BGR picture; coordinates are the picture's."""
    pad_x, pad_y = _padding(picture, border)
    if pad_x or pad_y:
        picture = np.pad(picture, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)))
    boxes, landmarks = app.det_model.detect(picture, input_size=size)
    if len(boxes) and landmarks is None:
        raise FaceModelError(
            "The connected detector gives boxes without the five landmarks that alignment needs. "
            "Use a pack whose detector has them (det_10g, scrfd_10g_bnkps, ...)."
        )
    shift = np.array([pad_x, pad_y])
    return [
        DetectedFace(
            box=tuple((np.asarray(box[:4], dtype=np.float64) - np.tile(shift, 2)).tolist()),
            landmarks=np.asarray(points, dtype=np.float64) - shift,
            score=float(box[4]),
        )
        for box, points in zip(boxes, landmarks, strict=True)
        if np.isfinite(box).all() and np.isfinite(points).all()
    ] if len(boxes) else []  # fmt: skip


def _padding(picture: Array, border: float) -> tuple[int, int]:
    """Pixels to add on the left and right, and above and below."""
    height, width = picture.shape[:2]
    pad_x = pad_y = round(border * max(height, width))
    pad_x += max(0, math.ceil(height / _MAX_ASPECT) - width)
    pad_y += max(0, math.ceil(width / _MAX_ASPECT) - height)
    return pad_x, pad_y


def _to_original(face: DetectedFace, factor: int, limits: tuple[int, int]) -> DetectedFace:
    width, height = limits
    shift = (factor - 1) / 2  # the middle of a block of pixels
    box = np.asarray(face.box) * factor + shift
    box = np.clip(box, 0, [width, height, width, height])
    return DetectedFace(
        box=cast(tuple[float, float, float, float], tuple(box.tolist())),
        landmarks=face.landmarks * factor + shift,
        score=face.score,
    )


def _sizes(app: Any) -> list[tuple[int, int] | None]:
    """Detector sizes to try: its own first (None), then the usual ones, unless it has only one."""
    own = _own_sizes(app)
    if _fixed_size(app):
        return [None]
    return [None, *((n, n) for n in RETRY_SIZES if own != [(n, n)])]


def _own_sizes(app: Any) -> list[tuple[int, int]]:
    detector = app.det_model
    sizes = getattr(detector, "input_sizes", None) or [getattr(detector, "input_size", None)]
    return [(int(s[0]), int(s[1])) for s in sizes if s is not None]


def _fixed_size(app: Any) -> bool:
    """Whether the detector's ONNX file fixes its input size."""
    detector = app.det_model
    if hasattr(detector, "static_input_size"):
        return detector.static_input_size is not None
    session = getattr(detector, "session", None)
    return session is not None and isinstance(session.get_inputs()[0].shape[2], int)


def _size_name(app: Any, size: tuple[int, int] | None) -> str:
    sizes = _own_sizes(app) if size is None else [size]
    return "detector size " + " and ".join(str(s[0]) for s in sizes)
