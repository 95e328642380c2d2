"""Detect, align, embed: the insightface models on decoded pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from infinite_id_core.errors import FaceModelError
from infinite_id_core.faces.align import crop_matrix
from infinite_id_core.faces.detect import DetectedFace, detect_faces
from infinite_id_core.faces.pack import PROVIDERS, recogniser_name
from infinite_id_core.method.face_clip import FACE_WIDTH

from ..models.face_models import face_pack
from .manifest import file_sha256, fingerprint_of
from .photo import Picture

ALIGNED_SIZE = 112  # pixels, ArcFace's
SHARPNESS_SIZE = 224  # pixels: fine enough to tell a blurred large face
BATCH = 64
MAX_FACES = 4  # of one photo of a labelled person, largest first,
MAX_ASPECT = 16  # of what the detector is given
MIN_AREA = 0.25  # and none with less than this share of the largest one's area


@dataclass(frozen=True, kw_only=True)
class FaceModels:
    """Where the models are and how they run; hashable, and cheap to hand to a worker."""

    folder: Path
    detector_size: int
    min_detection: float
    provider: str
    threads: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pack's files and what changes their results."""
        return _pack_fingerprint(self.folder, self.detector_size, self.min_detection)


@lru_cache(maxsize=1)
def _pack_fingerprint(folder: Path, detector_size: int, min_detection: float) -> str:
    files = sorted(folder.glob("*.onnx"))
    hashes = [[path.name, file_sha256(path)] for path in files]
    return fingerprint_of(hashes, detector_size, min_detection)


@lru_cache(maxsize=1)
def load(models: FaceModels) -> Any:
    """insightface's ``FaceAnalysis``, once per process.

    Raises ``FaceModelError``, ``MissingPackageError``.
    """
    folder = models.folder
    provider = next((p for p in PROVIDERS if p.lower() == models.provider.lower()), None)
    if provider is None:
        raise FaceModelError(
            f"provider must be one of {', '.join(p.lower() for p in PROVIDERS)}; got "
            f"{models.provider!r}."
        )
    app = face_pack(folder, models.detector_size, provider, models.threads)
    size = (models.detector_size, models.detector_size)
    app.prepare(ctx_id=0, det_thresh=models.min_detection, det_size=size)
    return app


def recogniser_of(models: FaceModels) -> str:
    """``<pack>/<model>`` of the recogniser."""
    return recogniser_name(load(models))


def detect(models: FaceModels, picture: Picture, *, retry: bool) -> list[DetectedFace]:
    """Faces of an RGB picture ``[h, w, 3]``, largest first; boxes are cut at its edges.

    ``retry`` tries again with a border and at other detector sizes where none is found, as the
    nodes do: right where every photo should have a face, wasted on photos from the web.
    """
    app = load(models)
    height, width = picture.shape[:2]
    boxes, points = app.det_model.detect(_bgr(_widened(picture)))
    found = [
        DetectedFace(
            box=_clipped(box[:4], width, height),
            landmarks=np.asarray(landmarks, dtype=np.float64),
            score=float(box[4]),
        )
        for box, landmarks in zip(boxes, points if points is not None else (), strict=False)
        if np.isfinite(box).all() and np.isfinite(landmarks).all()
    ]
    if not found and retry:
        tensor = torch.from_numpy(picture.astype(np.float32) / 255.0)
        found = [f for f in detect_faces(app, tensor)[0] if f.score >= models.min_detection]
    usable = [face for face in found if face.area > 0 and _spread(face) > 1.0]
    return sorted(usable, key=lambda face: (-face.area, face.box))


def _widened(picture: Picture) -> Picture:
    """A strip with black beside it: shrunk to the detector's size it would have no pixel left."""
    height, width = picture.shape[:2]
    below = max(0, -(-width // MAX_ASPECT) - height)
    right = max(0, -(-height // MAX_ASPECT) - width)
    return np.pad(picture, ((0, below), (0, right), (0, 0))) if below or right else picture


def _bgr(picture: Picture) -> Picture:
    """insightface reads what OpenCV reads."""
    import cv2

    return cast(Picture, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


def _clipped(
    box: NDArray[np.float32], width: int, height: int
) -> tuple[float, float, float, float]:
    values = np.clip(box.astype(np.float64), 0, [width, height, width, height])
    return cast(tuple[float, float, float, float], tuple(values.tolist()))


def _spread(face: DetectedFace) -> float:
    """Largest extent of the landmarks in pixels; coinciding ones cannot be aligned."""
    return float(np.ptp(face.landmarks, axis=0).max())


def candidates(
    found: Sequence[DetectedFace], *, labelled: bool, every: bool = False
) -> Sequence[DetectedFace]:
    """Which faces of a photo, largest first, may be its person's; grouping chooses among them."""
    if every:
        return found
    if not labelled:
        return found[:1]
    return [face for face in found[:MAX_FACES] if face.area >= MIN_AREA * found[0].area]


def align(picture: Picture, face: DetectedFace, size: int = ALIGNED_SIZE) -> Picture:
    """insightface's ``norm_crop``: ``[h, w, 3]`` -> ``[size, size, 3]``, the face upright."""
    import cv2

    matrix = crop_matrix(face.landmarks, size, 0.0)
    return cast(Picture, cv2.warpAffine(picture, matrix, (size, size), borderValue=0.0))


def face_embeddings(models: FaceModels, aligned: Sequence[Picture]) -> NDArray[np.float32]:
    """Raw embeddings ``[n, 512]`` of aligned RGB faces ``[112, 112, 3]``.

    Raises ``FaceModelError`` for a recogniser of another width.
    """
    recogniser = load(models).models["recognition"]
    fixed = recogniser.input_shape[0]
    batch = fixed if isinstance(fixed, int) and fixed > 0 else BATCH
    pieces = [
        recogniser.get_feat([_bgr(face) for face in piece])
        for piece in (aligned[i : i + batch] for i in range(0, len(aligned), batch))
    ]
    result = np.concatenate(pieces).astype(np.float32)
    if result.shape != (len(aligned), FACE_WIDTH):
        raise FaceModelError(
            f"{recogniser_of(models)} gives {list(result.shape[1:])} numbers per face; expected "
            f"{FACE_WIDTH}. Use an ArcFace recogniser (buffalo_l, antelopev2, ...)."
        )
    return result
