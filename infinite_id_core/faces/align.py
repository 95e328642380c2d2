"""FA and E_face: a face cut out upright, and what the recogniser says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FaceError, FaceModelError
from ..method.face_clip import FACE_WIDTH
from .detect import DetectedFace
from .pack import recogniser_name, recogniser_of
from .pixels import Array, from_reduced, opencv, reduced, reduction, to_bgr

CROP_SIZE = 224  # pixels: what the image encoders read
DEFAULT_PADDING = 0.25

# The five landmarks in ArcFace's 112 px crop (insightface, utils/face_align.py).
_TEMPLATE_SIZE = 112
_TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignedFace:
    """A chosen face, cut out upright and read by the recogniser (FA and E_face)."""

    crop: Tensor
    """``[S, S, 3]`` in [0, 1], for E_clip."""
    embedding: Tensor
    """``[512]`` float32, as the recogniser gives it (raw: not of unit length)."""
    recogniser: str
    """``<pack>/<model>``, e.g. ``buffalo_l/w600k_r50``."""
    detected: DetectedFace
    photo: Tensor | None = None
    """The picture it is of, ``[H, W, C]``; None: not kept, and then cut no other way."""
    index: int = 0
    """Number of the face in its picture, as in the numbered preview."""
    frame: int = 0
    """Number of the picture in its batch."""


def similarity(source: Array, target: Array) -> Array:
    """Least-squares similarity ``[2, 3]`` from points ``[n, 2]`` to ``[n, 2]`` (Umeyama 1991).

    Raises ``FaceError`` where the points coincide.
    """
    mean_s, mean_t = source.mean(0), target.mean(0)
    centred_s, centred_t = source - mean_s, target - mean_t
    variance = float((centred_s**2).sum())
    if not variance > 1e-9:
        raise FaceError("The landmarks of a face coincide, so it cannot be aligned.")
    u, singular, vt = np.linalg.svd(centred_t.T @ centred_s)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float((singular * sign).sum()) / variance
    return np.hstack([scale * rotation, (mean_t - scale * rotation @ mean_s)[:, None]])


def crop_matrix(landmarks: Array, size: int, padding: float) -> Array:
    """Similarity ``[2, 3]`` from the picture to a crop of ``size`` px (insightface's norm_crop).

    ``padding`` widens the view by that part of ArcFace's crop on each side.
    """
    scale = size / (_TEMPLATE_SIZE * (1.0 + 2.0 * padding))
    return similarity(landmarks, (_TEMPLATE + padding * _TEMPLATE_SIZE) * scale)


def align(
    image: Tensor, landmarks: Array, size: int = CROP_SIZE, padding: float = DEFAULT_PADDING
) -> Tensor:
    """FA: the face cut out upright, ``[H, W, C]`` -> ``[size, size, 3]``; outside is black.

    With ``padding=0`` it is insightface's ``norm_crop``, but free of aliasing on large faces.
    """
    return warped(image, crop_matrix(landmarks, size, padding), size)


def warped(
    image: Tensor, matrix: Array, size: int, outside: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Tensor:
    """``[H, W, C]`` through a similarity ``[2, 3]`` -> ``[size, size, 3]``; beyond the picture the
    colour ``outside``."""
    cv2 = opencv()
    region, left, top = _region(image, matrix, size)
    matrix = matrix @ np.array([[1.0, 0.0, left], [0.0, 1.0, top], [0.0, 0.0, 1.0]])
    # Bilinear sampling reads four pixels: average those it would skip.
    shrink = min(max(1, int(1.0 / math.hypot(matrix[0, 0], matrix[1, 0]))), *region.shape[:2])
    pixels = reduced(region, shrink).nan_to_num(0.0).clamp(0.0, 1.0).numpy()
    matrix = matrix @ from_reduced(shrink)
    pixels = np.ascontiguousarray(pixels)
    return torch.from_numpy(cv2.warpAffine(pixels, matrix, (size, size), borderValue=outside))


def read_face(app: Any, image: Tensor, face: DetectedFace) -> Tensor:
    """E_face: the recogniser's raw embedding ``[512]`` float32 of one face in ``image [H, W, C]``.

    Raises ``FaceModelError`` where the recogniser gives another width or numbers that are none.
    """
    raw = recogniser_of(app).get(*_for_recogniser(image, face))
    embedding = torch.from_numpy(np.array(raw, dtype=np.float32).reshape(-1))
    _check_embedding(embedding, app)
    return embedding


def _for_recogniser(image: Tensor, face: DetectedFace) -> tuple[Array, Any]:
    """The BGR pixels that go into the recogniser's own crop, and insightface's face in them."""
    from insightface.app.common import Face

    matrix = crop_matrix(face.landmarks, _TEMPLATE_SIZE, 0.0)
    region, left, top = _region(image, matrix, _TEMPLATE_SIZE)
    factor = reduction(region)
    shift = np.array([left, top]) + (factor - 1) / 2
    record = Face(
        bbox=((np.asarray(face.box) - np.tile(shift, 2)) / factor).astype(np.float32),
        kps=((face.landmarks - shift) / factor).astype(np.float32),
        det_score=face.score,
    )
    return to_bgr(reduced(region, factor)), record


def _check_embedding(embedding: Tensor, app: Any) -> None:
    if embedding.shape != (FACE_WIDTH,):
        raise FaceModelError(
            f"{recogniser_name(app)} gives {embedding.numel()} numbers per face; expected "
            f"{FACE_WIDTH}. Use an ArcFace recogniser (buffalo_l, antelopev2, ...)."
        )
    if not bool(embedding.isfinite().all()) or float(embedding.norm()) == 0.0:
        raise FaceModelError(
            f"{recogniser_name(app)} gives an embedding that is zero or not a number. Try provider "
            "'CPU'; if it persists, the file is damaged."
        )


def _region(image: Tensor, matrix: Array, size: int) -> tuple[Tensor, int, int]:
    """The part of ``image`` that a crop reads, with its left and top."""
    linear, offset = matrix[:, :2], matrix[:, 2]
    corners = np.array([[-1, -1], [size, -1], [-1, size], [size, size]], dtype=np.float64)
    source = np.linalg.solve(linear, (corners - offset).T).T
    height, width = image.shape[:2]
    margin = 2.0
    x0, y0 = np.floor(source.min(0) - margin).astype(int)
    x1, y1 = np.ceil(source.max(0) + margin).astype(int) + 1
    left, top = int(np.clip(x0, 0, width - 1)), int(np.clip(y0, 0, height - 1))
    right, bottom = int(np.clip(x1, left + 1, width)), int(np.clip(y1, top + 1, height))
    return image[top:bottom, left:right], left, top
