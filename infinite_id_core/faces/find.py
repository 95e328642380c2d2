"""Which faces: numbered, chosen, and what to say where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ..errors import FaceIndexError, NoFaceError, OptionError, shown
from .align import CROP_SIZE, DEFAULT_PADDING, AlignedFace, align, read_face
from .detect import DetectedFace, detect_faces
from .pack import recogniser_name, recogniser_of
from .pixels import check_batch

Choose = Literal["largest", "index", "all"]
Order = Literal["left to right", "top to bottom", "size", "score"]
IfNoFace = Literal["error", "skip"]
CHOOSE: tuple[Choose, ...] = get_args(Choose)
ORDER: tuple[Order, ...] = get_args(Order)
IF_NO_FACE: tuple[IfNoFace, ...] = get_args(IfNoFace)


@dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Which faces to take and how to cut them out. Raises ``OptionError``."""

    choose: Choose = "largest"
    index: int = 0
    """For ``choose="index"``: the number of the face, from 0, in ``order``."""
    order: Order = "left to right"
    """How the faces of a picture are numbered; ``size`` and ``score`` start with the highest."""
    padding: float = DEFAULT_PADDING
    """How far the crop reaches beyond ArcFace's on each side, in parts of its side."""
    size: int = CROP_SIZE
    """Side of the crop in pixels."""

    def __post_init__(self) -> None:
        if self.choose not in CHOOSE or self.order not in ORDER:
            raise OptionError(
                f"choose must be one of {', '.join(CHOOSE)} and order one of {', '.join(ORDER)}; "
                f"got {shown(self.choose)} and {shown(self.order)}."
            )
        if not 0.0 <= self.padding <= 1.0:
            raise OptionError(
                f"padding must lie in [0, 1], got {self.padding}. 0 cuts as tightly as ArcFace, "
                f"{DEFAULT_PADDING} shows the hair as well."
            )
        if not 32 <= self.size <= 4096:
            raise OptionError(f"size must lie in [32, 4096] pixels, got {self.size}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundFaces:
    """All faces of one picture in the order of their numbers, and those that were chosen."""

    detected: tuple[DetectedFace, ...] = ()
    chosen: tuple[AlignedFace, ...] = ()
    tried: tuple[str, ...] = ()
    """What detection tried, in words; for messages."""


def find_faces(app: Any, image: Tensor, options: FaceOptions | None = None) -> FoundFaces:
    """Detect, number, choose, align and read the faces of ``image [H, W, C]``.

    Raises ``NoFaceError`` (saying what was tried), ``FaceIndexError``, ``ImageError``,
    ``FaceModelError``.
    """
    found = find_faces_in_batch(app, image.unsqueeze(0), options)
    return found[0]


def find_faces_in_batch(
    app: Any,
    images: Tensor,
    options: FaceOptions | None = None,
    if_no_face: IfNoFace = "error",
) -> tuple[FoundFaces, ...]:
    """``find_faces`` on each picture of ``images [B, H, W, C]``.

    With ``if_no_face="skip"`` nothing is chosen in a picture without a face, or without a face
    of the wanted number. Raises as ``find_faces``, and ``OptionError``.
    """
    options = options or FaceOptions()
    check_batch(images)
    recogniser_of(app)
    found = detect_in_batch(app, images, options.order)
    return choose_in_batch(app, images, found, options, if_no_face)


def detect_in_batch(
    app: Any, images: Tensor, order: Order = "left to right"
) -> tuple[FoundFaces, ...]:
    """The numbered faces of each picture of ``images [B, H, W, C]``; none is chosen yet.

    Raises ``ImageError``, ``FaceModelError``.
    """
    check_batch(images)
    seen = (detect_faces(app, image) for image in images)
    return tuple(
        FoundFaces(detected=number_faces(faces, order), tried=tried) for faces, tried in seen
    )


def choose_in_batch(
    app: Any,
    images: Tensor,
    found: Sequence[FoundFaces],
    options: FaceOptions,
    if_no_face: IfNoFace = "error",
) -> tuple[FoundFaces, ...]:
    """``detect_in_batch``'s result with the wanted faces chosen, cut out and read.

    Raises as ``find_faces_in_batch``.
    """
    wanted = wanted_faces(found, options, if_no_face)
    return tuple(
        replace(seen, chosen=_chosen(app, image, seen, numbers, options, frame))
        for frame, (image, seen, numbers) in enumerate(zip(images, found, wanted, strict=True))
    )


def number_faces(faces: Sequence[DetectedFace], order: Order) -> tuple[DetectedFace, ...]:
    """The faces in the order of their numbers."""
    keys = {
        "left to right": lambda f: f.box[0] + f.box[2],
        "top to bottom": lambda f: f.box[1] + f.box[3],
        "size": lambda f: -f.area,
        "score": lambda f: -f.score,
    }
    return tuple(sorted(faces, key=keys[order]))


def choose_faces(
    faces: Sequence[DetectedFace], options: FaceOptions, frame: int = 0, frames: int = 1
) -> list[int]:
    """Numbers of the chosen among the numbered ``faces``. Raises ``FaceIndexError``.

    ``frame`` of ``frames``: which picture of a batch they are of, for the message.
    """
    if options.choose == "all":
        return list(range(len(faces)))
    if options.choose == "largest":
        return [max(range(len(faces)), key=lambda i: faces[i].area)]
    if not 0 <= options.index < len(faces):
        raise FaceIndexError(
            f"Face number {options.index} was asked for{_in_batch(frame, frames)}, and "
            f"{len(faces)} were found (numbers 0 to {len(faces) - 1}, {options.order}). The "
            "numbered preview shows them."
        )
    return [options.index]


def wanted_faces(
    found: Sequence[FoundFaces], options: FaceOptions, if_no_face: IfNoFace = "error"
) -> list[list[int]]:
    """Numbers of the wanted faces of each picture; with ``skip`` there may be none.

    Raises ``NoFaceError``, ``FaceIndexError``, ``OptionError``.
    """
    if if_no_face not in IF_NO_FACE:
        raise OptionError(
            f"if_no_face must be one of {', '.join(IF_NO_FACE)}; got {shown(if_no_face)}."
        )
    wanted: list[list[int]] = []
    for frame, seen in enumerate(found):
        if if_no_face == "skip" and not _has_wanted(seen, options):
            wanted.append([])
        elif not seen.detected:
            raise NoFaceError(no_face_message(seen.tried, frame, len(found)))
        else:
            wanted.append(choose_faces(seen.detected, options, frame, len(found)))
    return wanted


def _has_wanted(found: FoundFaces, options: FaceOptions) -> bool:
    return len(found.detected) > (max(0, options.index) if options.choose == "index" else 0)


def _chosen(
    app: Any,
    image: Tensor,
    found: FoundFaces,
    numbers: Sequence[int],
    options: FaceOptions,
    frame: int,
) -> tuple[AlignedFace, ...]:
    """The faces of these numbers, cut out of ``image [H, W, C]`` and read."""
    name = recogniser_name(app)
    return tuple(
        AlignedFace(
            crop=align(image, found.detected[i].landmarks, options.size, options.padding),
            embedding=read_face(app, image, found.detected[i]),
            recogniser=name,
            detected=found.detected[i],
            photo=image,
            index=i,
            frame=frame,
        )
        for i in numbers
    )


def no_face_message(tried: Sequence[str], frame: int = 0, frames: int = 1) -> str:
    """What to tell the user where no face was found."""
    return (
        f"No face was found{_in_batch(frame, frames)}. Tried: {'; '.join(tried)}. Use a picture "
        "that shows the face from the front, larger or with more room around it, or another face "
        "model; drawings are often not recognised."
    )


def nothing_wanted_message(found: Sequence[FoundFaces], options: FaceOptions) -> str:
    """What to tell the user where every picture was skipped."""
    most = max(len(seen.detected) for seen in found)
    if not most:
        return no_face_message(found[0].tried)
    return (
        f"Every picture was skipped: face number {options.index} was asked for, and no picture "
        f"shows more than {most} (numbers 0 to {most - 1}, {options.order})."
    )


def _in_batch(frame: int, frames: int) -> str:
    return "" if frames == 1 else f" in picture {frame} of {frames} (counted from 0)"
