"""One photo: opened without trust, hashed, scored."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin

from infinite_id_core.errors import (
    DamagedPictureError,
    FileError,
    MissingPackageError,
    UnknownPictureError,
)
from infinite_id_core.files.pictures import decoded, open_picture, orientation, to_rgb
from infinite_id_core.files.system import read_bytes

from ..shards import EXTENSIONS

Picture = NDArray[np.uint8]
Points = NDArray[np.float32]

Reason = Literal[
    "unreadable", "empty", "not_an_image", "needs_package", "truncated", "corrupt", "too_large",
    "too_small",
]  # fmt: skip

MIN_SIDE = 16  # pixels: nothing smaller holds a face
REENCODE_QUALITY = 95


class PhotoError(Exception):
    """A photo that cannot be used: why, in one word for counting and in a sentence for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded photo and the size it will be stored at."""

    picture: Picture
    """``[h, w, 3]`` RGB, upright; smaller than the file's where the file is very large."""
    stored_size: tuple[int, int]
    """Width and height in the shard."""
    extension: str
    """``jpg``, ``png`` or ``webp``: of the stored file."""
    keep_bytes: bool
    """Whether the original bytes are stored."""

    @property
    def scale(self) -> float:
        """Stored pixels per pixel of ``picture``."""
        return self.stored_size[0] / int(self.picture.shape[1])


def open_photo(data: bytes, *, max_side: int, max_pixels: int) -> Photo:
    """Decode a photo; its size is checked before any pixel is allocated.

    Baseline JPEGs are decoded at 1/2, 1/4 or 1/8 where that still leaves ``max_side``. Raises
    ``PhotoError``.
    """
    image = _open(data)
    kind = image.format or ""
    full = _turned(image.size, image)
    if min(full) < MIN_SIDE:
        raise PhotoError("too_small", f"{full[0]} x {full[1]} pixels")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and "progressive" not in image.info:
        # A progressive file needs memory for all coefficients whatever the scale.
        image.draft("RGB", _drafted(image.size, max_side))
    if image.width * image.height > max_pixels:
        raise PhotoError(
            "too_large", f"{full[0]} x {full[1]} pixels; at most {max_pixels} are decoded"
        )
    picture = _decode(image)
    long_side = max(full)
    keep = long_side <= max_side and kind in EXTENSIONS
    share = min(1.0, max_side / long_side)
    stored = (max(1, round(full[0] * share)), max(1, round(full[1] * share)))
    return Photo(
        picture=picture,
        stored_size=stored,
        extension=EXTENSIONS[kind] if keep else "jpg",
        keep_bytes=keep,
    )


def read_pixels(path: Path, *, max_side: int = 4096, max_pixels: int = 2**28) -> Picture:
    """A picture's file upright, ``[h, w, 3]`` RGB. Raises ``PhotoError``."""
    try:
        data = read_bytes(path)
    except FileError as error:
        raise PhotoError("unreadable", error.problem) from error
    return open_photo(data, max_side=max_side, max_pixels=max_pixels).picture


def reencoded(photo: Photo) -> bytes:
    """A JPEG of ``stored_size``, for photos whose original bytes are not stored."""
    image = Image.fromarray(photo.picture)
    if image.size != photo.stored_size:
        image = image.resize(photo.stored_size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=REENCODE_QUALITY, subsampling=0)
    return buffer.getvalue()


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise PhotoError("empty", "0 bytes")
    try:
        return open_picture(data)
    except UnknownPictureError as error:
        raise PhotoError("not_an_image", str(error)) from error
    except MissingPackageError as error:
        # The error's own text names this machine's Python; this one goes into reports.
        advice = "HEIC needs a package: pip install pillow-heif (or save it as JPEG)"
        raise PhotoError("needs_package", advice) from error
    except DamagedPictureError as error:
        raise PhotoError(_reason(error), str(error)) from error


def _decode(image: ImageFile.ImageFile) -> Picture:
    try:
        return np.asarray(to_rgb(decoded(image)))
    except DamagedPictureError as error:
        raise PhotoError(_reason(error), str(error)) from error
    except Exception as error:  # of a mode that does not become RGB, or no memory for it
        raise PhotoError("corrupt", f"{type(error).__name__}: {error}") from error


def _reason(error: DamagedPictureError) -> Reason:
    if error.too_large:
        return "too_large"
    return "truncated" if error.truncated else "corrupt"


def _turned(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF rotation."""
    return (size[1], size[0]) if orientation(image) in (5, 6, 7, 8) else size


def _drafted(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """The smallest size ``draft`` may choose: its long side at least ``max_side``."""
    share = max_side / max(size)
    return (max(1, int(size[0] * share)), max(1, int(size[1] * share)))


# --- hashes and scores -----------------------------------------------------------------------


def difference_hash(picture: Picture) -> int:
    """64 bits that near-duplicates share: is each of 8 x 8 cells brighter than its right one."""
    import cv2

    small = cv2.resize(picture, (9, 8), interpolation=cv2.INTER_AREA)
    values = small.astype(np.int32) @ np.array([299, 587, 114])
    bits = (values[:, :-1] > values[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def sharpness(face: Picture) -> float:
    """Variance of the Laplacian of an aligned face ``[s, s, 3]``: small is blurred."""
    import cv2

    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


# A frontal face's five landmarks: ArcFace's template for x and y (112 px), a typical depth for z
# (toward the camera is negative), in the same unit.
_FACE_3D = np.array(
    [
        [38.2946, 51.6963, 4.0],
        [73.5318, 51.5014, 4.0],
        [56.0252, 71.7366, -14.0],
        [41.5493, 92.3655, 3.0],
        [70.7299, 92.2041, 3.0],
    ]
)


def pose(landmarks: Points) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees from five landmarks ``[5, 2]``, by weak perspective.

    Yaw is positive when the face looks to the picture's right, pitch when it looks down, roll
    when its top leans to the picture's right.
    """
    model = _FACE_3D - _FACE_3D.mean(0)
    points = landmarks.astype(np.float64) - landmarks.mean(0)
    affine = np.linalg.lstsq(model, points, rcond=None)[0].T  # [2, 3] = scale * R[:2]
    u, _, vt = np.linalg.svd(affine, full_matrices=False)
    first, second = u @ vt  # nearest rows of a rotation
    # R = Ry(yaw) Rx(pitch) Rz(roll), x right, y down, z away; the face looks along R (0, 0, -1).
    depth = first[0] * second[1] - first[1] * second[0]  # R[2, 2]
    yaw = np.degrees(np.arctan2(-first[2], depth))
    pitch = np.degrees(np.arcsin(np.clip(-second[2], -1.0, 1.0)))
    roll = np.degrees(np.arctan2(second[0], second[1]))
    return float(yaw), float(pitch), float(roll)
