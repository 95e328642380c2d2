"""The detail pass for small faces: cut a face's surroundings out, work on them large, put back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import ImageError, OptionError
from .detect import DetectedFace
from .find import FaceOptions, FoundFaces, IfNoFace, wanted_faces
from .pixels import check_batch, to_rgb

WORKING_MULTIPLE = 64  # pixels: what SDXL's UNet and VAE divide without remainder


@dataclass(frozen=True, kw_only=True)
class FaceSquare:
    """A square around one face, in pixels of its picture."""

    frame: int
    left: int
    top: int
    side: int
    face: tuple[float, float, float, float]
    """The face's box."""


@dataclass(frozen=True, kw_only=True)
class FaceRegion:
    """Where crops came from, so that they can be put back."""

    width: int
    height: int
    frames: int
    squares: tuple[FaceSquare, ...]


def face_square(
    face: DetectedFace, width: int, height: int, padding: float, frame: int = 0
) -> FaceSquare:
    """A square around ``face`` with ``padding`` parts of its longer side on each side.

    It stays within the picture: near an edge it moves inwards, and it is never larger than the
    picture's shorter side. Raises ``OptionError`` for a padding outside [0, 3].
    """
    if not 0.0 <= padding <= 3.0:
        raise OptionError(f"padding must lie in [0, 3], got {padding}. 0.5 shows the whole head.")
    x0, y0, x1, y1 = face.box
    side = max(1, math.ceil(max(x1 - x0, y1 - y0) * (1.0 + 2.0 * padding)))
    side = min(side, width, height)
    left = min(max(0, round((x0 + x1 - side) / 2)), width - side)
    top = min(max(0, round((y0 + y1 - side) / 2)), height - side)
    return FaceSquare(frame=frame, left=left, top=top, side=side, face=face.box)


def crop_faces(
    images: Tensor,
    found: Sequence[FoundFaces],
    options: FaceOptions,
    padding: float,
    size: int,
    if_no_face: IfNoFace = "error",
) -> tuple[Tensor, Tensor, FaceRegion]:
    """Crop around the wanted faces that were ``found`` in ``images [B, H, W, C]``.

    With ``if_no_face="skip"`` a picture without a wanted face gives no crop. Returns as
    ``crop_squares``; raises as it, ``face_square`` and ``wanted_faces`` do.
    """
    height, width = images.shape[1:3]
    squares = [
        face_square(seen.detected[i], width, height, padding, frame)
        for frame, (seen, numbers) in enumerate(
            zip(found, wanted_faces(found, options, if_no_face), strict=True)
        )
        for i in numbers
    ]
    return crop_squares(images, squares, size)


def crop_squares(
    images: Tensor, squares: Sequence[FaceSquare], size: int
) -> tuple[Tensor, Tensor, FaceRegion]:
    """Crops ``[n, size, size, 3]``, their masks ``[n, size, size]`` and the region to paste to.

    A mask is 1 on the face and falls to 0 at the crop's edge. Raises ``OptionError`` where
    ``size`` is not a multiple of 64.
    """
    if size % WORKING_MULTIPLE or not WORKING_MULTIPLE <= size <= 4096:
        raise OptionError(
            f"size must be a multiple of {WORKING_MULTIPLE} in [{WORKING_MULTIPLE}, 4096], got "
            f"{size}. 1024 suits SDXL."
        )
    check_batch(images)
    crops = [
        _resize(to_rgb(images[s.frame, s.top : s.top + s.side, s.left : s.left + s.side]), size)
        for s in squares
    ]
    masks = [_face_mask(s, size) for s in squares]
    frames, height, width = images.shape[:3]
    region = FaceRegion(width=width, height=height, frames=frames, squares=tuple(squares))
    if not squares:
        return torch.zeros(0, size, size, 3), torch.zeros(0, size, size), region
    return torch.stack(crops), torch.stack(masks), region


def paste_squares(
    images: Tensor, crops: Tensor | None, region: FaceRegion, feather: float
) -> Tensor:
    """``images [B, H, W, C]`` with ``crops [n, h, w, 3]`` put back where they came from.

    ``feather`` is the width of the soft edge in parts of the square's side; where the square ends
    at the picture's own edge there is none. One picture with one square takes any number of crops
    and gives as many pictures. A picture that gave no crop stays as it is; where none did, no
    crops are needed. Returns ``[B or n, H, W, 3 or 4]``. Raises ``ImageError`` where picture,
    crops and region do not belong together, ``OptionError`` for a feather outside [0, 0.5].
    """
    if not 0.0 <= feather <= 0.5:
        raise OptionError(f"feather must lie in [0, 0.5] of the square's side, got {feather}.")
    check_batch(images)
    if (images.shape[0], images.shape[1], images.shape[2]) != (
        region.frames,
        region.height,
        region.width,
    ):
        raise ImageError(
            f"The region belongs to {region.frames} picture(s) of {region.width} x {region.height} "
            f"pixels; got {images.shape[0]} of {images.shape[2]} x {images.shape[1]}. Connect the "
            "picture that Face Crop read."
        )
    pairs = _paired(region, crops) if region.squares else []
    if len(region.squares) == 1 and region.frames == 1:
        images = images.expand(len(pairs), *images.shape[1:])
    if images.shape[3] == 1:
        images = images.expand(*images.shape[:3], 3)
    out = images.detach().to(device="cpu", dtype=torch.float32).clone()
    for square, crop in pairs:
        rows = slice(square.top, square.top + square.side)
        columns = slice(square.left, square.left + square.side)
        weight = _edge_mask(square, region, feather).unsqueeze(-1)
        there = out[square.frame, rows, columns, :3]
        there += weight * (_resize(to_rgb(crop), square.side) - there)
    return out


def _paired(region: FaceRegion, crops: Tensor | None) -> list[tuple[FaceSquare, Tensor]]:
    """Each crop of ``[n, h, w, 3]`` with the square it goes to. Raises ``ImageError``."""
    if crops is None:
        raise ImageError(f"Expected crops of {len(region.squares)} faces, got none. Connect crop.")
    check_batch(crops)
    squares = region.squares
    if len(squares) == 1 and region.frames == 1:
        squares = tuple(replace(squares[0], frame=i) for i in range(len(crops)))
    if len(crops) != len(squares):
        raise ImageError(
            f"The region has {len(squares)} faces and {len(crops)} crops came back. Connect "
            "all crops of Face Crop, in their order."
        )
    return list(zip(squares, crops, strict=True))


def _resize(image: Tensor, side: int) -> Tensor:
    """``[h, w, 3]`` -> ``[side, side, 3]`` in [0, 1]; unchanged where it fits already."""
    if tuple(image.shape[:2]) == (side, side):
        return image
    planes = image.permute(2, 0, 1).unsqueeze(0)  # HWC -> BCHW
    resized = interpolate(planes, size=(side, side), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).clamp(0.0, 1.0)


def _ramp(position: Tensor, start: float, end: float) -> Tensor:
    """0 before ``start``, 1 after ``end``, smooth between."""
    t = ((position - start) / max(end - start, 1e-6)).clamp(0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _face_mask(square: FaceSquare, size: int) -> Tensor:
    """1 from the face's box inwards, 0 at the crop's edge: ``[size, size]``."""
    centre = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x0, y0, x1, y1 = square.face
    spans = []
    for low, high, origin in ((y0, y1, square.top), (x0, x1, square.left)):
        before = min(max((low - origin) / square.side, 0.0), 1.0)
        after = min(max((origin + square.side - high) / square.side, 0.0), 1.0)
        spans.append(_ramp(centre, 0.0, before) * _ramp(1.0 - centre, 0.0, after))
    return spans[0].unsqueeze(1) * spans[1].unsqueeze(0)


def _edge_mask(square: FaceSquare, region: FaceRegion, feather: float) -> Tensor:
    """1 inside, falling to 0 at the square's edges that lie within the picture: ``[s, s]``."""
    centre = (torch.arange(square.side, dtype=torch.float32) + 0.5) / square.side
    one = torch.ones_like(centre)
    soft = _ramp(centre, 0.0, feather) if feather else one
    top = soft if square.top > 0 else one
    left = soft if square.left > 0 else one
    bottom = soft.flip(0) if square.top + square.side < region.height else one
    right = soft.flip(0) if square.left + square.side < region.width else one
    return (top * bottom).unsqueeze(1) * (left * right).unsqueeze(0)
