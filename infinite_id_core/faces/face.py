"""FA and E_face: face models, detection, choice, alignment (insightface).

Pictures are ``[H, W, C]`` float tensors in [0, 1] with 1 (grey), 3 (RGB) or 4 (RGBA) channels.
Boxes are ``(x0, y0, x1, y1)`` and landmarks ``[5, 2]`` ``(x, y)``, both in pixels of the picture.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import isfile  # unlike Path's, False also where a name is longer than any file's
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import (
    FaceError,
    FaceIndexError,
    FaceModelError,
    ImageError,
    NameNotAllowedError,
    NoFaceError,
    OptionError,
    shown,
)
from ..method.identity import FACE_WIDTH
from ..packages import onnxruntime_conflict, require

Array = NDArray[Any]
Choose = Literal["largest", "index", "all"]
Order = Literal["left to right", "top to bottom", "size", "score"]
IfNoFace = Literal["error", "skip"]
Provider = Literal["auto", "CPU", "CUDA", "ROCm", "CoreML", "DirectML"]
CHOOSE: tuple[Choose, ...] = get_args(Choose)
ORDER: tuple[Order, ...] = get_args(Order)
IF_NO_FACE: tuple[IfNoFace, ...] = get_args(IfNoFace)
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

CROP_SIZE = 224  # pixels: what the image encoders read
DEFAULT_PADDING = 0.25
DETECTOR_SIZE = 640
MIN_SIDE = 16  # pixels: nothing smaller can show a face
MAX_SIDE = 65536
DETECTION_SIDE = 4096  # pixels: larger pictures are searched on a reduced copy
RETRY_SIZES = (640, 512, 384, 320, 256, 192, 128)
_RETRY_BORDER = 0.5  # of the longer side, on each side: makes room around tight crops
_MAX_ASPECT = 8  # the detector's own resize rounds thinner pictures to nothing
_BAND = 2**24  # pixels converted at a time
_LONGEST_NAME = 255  # bytes: file systems take no more
_MANIFEST = "manifest.json"  # a pack that says itself what it holds, and where
_SMALLEST_PACK = 2  # files: a detector and a recogniser

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

_PROVIDER_NAMES: dict[str, tuple[str, ...]] = {
    "CUDA": ("CUDAExecutionProvider",),
    "ROCm": ("ROCMExecutionProvider", "MIGraphXExecutionProvider"),
    "DirectML": ("DmlExecutionProvider",),
    "CoreML": ("CoreMLExecutionProvider",),
    "CPU": ("CPUExecutionProvider",),
}
_FOR_FACES = "to find faces"
_INSTALL_FACES = "insightface onnxruntime"
_INSTALL_CV2 = "opencv-python-headless"

logger = logging.getLogger(__name__)


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
    index: int = 0
    """Number of the face in its picture, as in the numbered preview."""
    frame: int = 0
    """Number of the picture in its batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundFaces:
    """All faces of one picture in the order of their numbers, and those that were chosen."""

    detected: tuple[DetectedFace, ...] = ()
    chosen: tuple[AlignedFace, ...] = ()
    tried: tuple[str, ...] = ()
    """What detection tried, in words; for messages."""


# --- face models -----------------------------------------------------------------------------


def load_face_models(
    pack: str,
    roots: Sequence[Path],
    provider: Provider = "auto",
    detector_size: int = DETECTOR_SIZE,
    threads: int = 0,
) -> Any:
    """insightface's ``FaceAnalysis`` on ``<root>/models/<pack>/*.onnx`` of the first root with it.

    The object is the one the InstantID and PuLID packs pass around; theirs work here as well.
    Nothing is downloaded. ``threads``: of each model on the CPU; 0 leaves it to onnxruntime.

    Raises ``FaceModelError`` (missing, nested, damaged or incomplete pack, provider that is not
    there), ``MissingPackageError``, ``NameNotAllowedError``, ``OptionError``.
    """
    if detector_size % 32 or not 64 <= detector_size <= 4096:
        raise OptionError(
            f"detector_size must be a multiple of 32 in [64, 4096], got {shown(detector_size)}. "
            f"{DETECTOR_SIZE} is usual."
        )
    folder = find_pack(pack, roots)
    runtime = require("onnxruntime", _FOR_FACES, _INSTALL_FACES)
    conflict = onnxruntime_conflict()
    if conflict:
        logger.warning("Infinite-ID: %s", conflict)
    providers = choose_providers(provider, runtime.get_available_providers())
    analysis = require("insightface.app", _FOR_FACES, _INSTALL_FACES).FaceAnalysis
    sessions: dict[str, Any] = {}
    if threads:
        sessions["sess_options"] = runtime.SessionOptions()
        sessions["sess_options"].intra_op_num_threads = threads
    try:
        # An absolute folder in place of a name is never looked up for download.
        app = analysis(
            name=str(folder.resolve()), root=str(folder), providers=providers, **sessions
        )
    except AssertionError as error:  # insightface's only word on a pack without a detector
        raise FaceModelError(_incomplete(folder, "detector", "")) from error
    except Exception as error:
        raise FaceModelError(
            f"{folder}: the face models cannot be loaded ({error}). If a file is damaged, download "
            f"the pack again; it holds {_onnx_names(folder)}."
        ) from error
    if "recognition" not in app.models:
        raise FaceModelError(_incomplete(folder, "recogniser", ", ".join(sorted(app.models))))
    _check_provider(app, provider, providers)
    app.prepare(ctx_id=0, det_size=(detector_size, detector_size))
    return app


def find_pack(pack: str, roots: Sequence[Path]) -> Path:
    """Folder of a face model pack. Raises ``FaceModelError`` listing every folder searched."""
    if not _is_plain_name(pack):
        raise NameNotAllowedError(
            f"Expected the plain name of a face model pack, got {shown(pack)}. Choose one from the "
            "list."
        )
    searched = [root / "models" / pack for root in roots]
    for folder in searched:
        if _found(folder, "*.onnx") or isfile(folder / _MANIFEST):
            return folder
    for folder in searched:
        nested = sorted({path.parent for path in _found(folder, "**/*.onnx")})
        if nested:
            raise FaceModelError(
                f"The face models of {pack!r} lie one folder too deep, in {nested[0]}. Move its "
                f".onnx files up into {folder}."
            )
        if isfile(folder.with_name(f"{pack}.zip")):
            raise FaceModelError(f"{folder}.zip is not unpacked. Unpack it into {folder}.")
    listed = "\n".join(f"  {folder}" for folder in searched) or "  (no folder at all)"
    raise FaceModelError(
        f"The face model pack {pack!r} was not found. Nothing is downloaded: put its .onnx files "
        f"(detector and recogniser) into one of the folders searched:\n{listed}"
    )


def find_whole_pack(pack: str, roots: Sequence[Path]) -> Path:
    """As ``find_pack``; refuses also a pack of too few files to be whole, without loading any."""
    folder = find_pack(pack, roots)
    if not isfile(folder / _MANIFEST) and len(_found(folder, "*.onnx")) < _SMALLEST_PACK:
        raise FaceModelError(_incomplete(folder, "detector or no recogniser", ""))
    return folder


def _is_plain_name(name: object) -> bool:
    """Whether ``name`` can be a folder's, and of no other place than where it is looked for."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and Path(name).name == name
        and not any(c in "/\\" or unicodedata.category(c) in ("Cc", "Cs") for c in name)
        and len(name.encode("utf-8")) <= _LONGEST_NAME
    )


def _found(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern; none where the folder cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def choose_providers(provider: Provider, available: Sequence[str]) -> list[str]:
    """onnxruntime's names for a choice, the CPU last. Raises ``FaceModelError``."""
    if provider not in PROVIDERS:
        raise OptionError(f"provider must be one of {', '.join(PROVIDERS)}; got {shown(provider)}.")
    wanted = list(_PROVIDER_NAMES) if provider == "auto" else [provider]
    found = [name for kind in wanted for name in _PROVIDER_NAMES[kind] if name in available]
    if not found:
        kinds = [k for k, names in _PROVIDER_NAMES.items() if any(n in available for n in names)]
        raise FaceModelError(
            f"onnxruntime has no provider for {provider}; this build has "
            f"{', '.join(kinds) or 'none of ours'} ({', '.join(available)}). Choose one of these "
            "or 'auto', or install the onnxruntime build for your device."
        )
    return list(dict.fromkeys([found[0], "CPUExecutionProvider"]))


def recogniser_name(app: Any) -> str:
    """``<pack>/<model>`` of any insightface ``FaceAnalysis``, e.g. ``buffalo_l/w600k_r50``.

    Raises ``FaceModelError`` where it has no recogniser.
    """
    model = _recogniser(app)
    file = Path(str(getattr(model, "model_file", None) or "recogniser.onnx"))
    pack = file.parent.name or Path(str(getattr(app, "model_dir", "") or "unknown")).name
    return f"{pack}/{file.stem}"


def _recogniser(app: Any) -> Any:
    models = getattr(app, "models", None)
    models = models if isinstance(models, Mapping) else {}
    if "recognition" not in models:
        raise FaceModelError(
            "The connected face models have no recogniser, so nobody can be told apart. They hold "
            f"{', '.join(sorted(models)) or 'nothing'}. Load a whole pack such as buffalo_l."
        )
    return models["recognition"]


def _check_detector(app: Any) -> None:
    if getattr(getattr(app, "det_model", None), "detect", None) is None:
        raise FaceModelError(
            f"Expected face models with a detector, got {shown(app)}. Connect Infinite-ID Load "
            "Face Models, or the loader of the InstantID or PuLID pack."
        )


def _check_provider(app: Any, provider: str, providers: Sequence[str]) -> None:
    """onnxruntime falls back to the CPU without a word where a provider's libraries are absent."""
    session = getattr(app.models["recognition"], "session", None)
    active = session.get_providers() if session is not None else providers
    if providers[0] in active:
        return
    message = (
        f"onnxruntime offers {providers[0]} but cannot start it (runs on {', '.join(active)}). "
        "Its libraries do not match this machine: install the matching onnxruntime build"
    )
    if provider != "auto":
        raise FaceModelError(f"{message}, or choose 'auto' or 'CPU'.")
    logger.warning("Infinite-ID: %s.", message)


def _incomplete(folder: Path, part: str, found: str) -> str:
    return (
        f"{folder} has no {part}{f' (only {found})' if found else ''}. A pack needs a detector and "
        f"a recogniser; this one holds {_onnx_names(folder)}. Copy the whole pack."
    )


def _onnx_names(folder: Path) -> str:
    return ", ".join(path.name for path in _found(folder, "*.onnx")) or "no .onnx file"


# --- pictures --------------------------------------------------------------------------------


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


def to_rgb(image: Tensor) -> Tensor:
    """``[..., 1 or 3 or 4]`` -> ``[..., 3]`` float32 on the CPU; transparency becomes white."""
    image = image.detach().to(device="cpu", dtype=torch.float32)
    if image.shape[-1] == 1:
        return image.expand(*image.shape[:-1], 3)
    if image.shape[-1] == 4:
        alpha = image[..., 3:].clamp(0.0, 1.0)
        return image[..., :3] * alpha + (1.0 - alpha)
    return image


def _to_bgr(image: Tensor) -> Array:
    """``[H, W, C]`` -> uint8 BGR ``[H, W, 3]``, what insightface reads."""
    pixels = (to_rgb(image).nan_to_num(0.0) * 255.0).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.numpy()[..., ::-1])


def _reduced(image: Tensor, factor: int) -> Tensor:
    """Means over blocks of ``factor`` pixels: ``[H, W, C]`` -> ``[H // f, W // f, 3]`` float32.

    Works through bands of rows, so that a huge picture is never held twice.
    """
    cv2 = require("cv2", _FOR_FACES, _INSTALL_CV2)
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


def _factor(image: Tensor) -> int:
    """The whole number that brings a picture's longer side to ``DETECTION_SIDE`` or below."""
    return math.ceil(max(image.shape[:2]) / DETECTION_SIDE)


def _scaled(factor: int) -> Array:
    """From pixels of a copy reduced by ``factor`` to those of the original: ``[3, 3]``."""
    middle = (factor - 1) / 2  # of a block of pixels
    return np.array([[factor, 0.0, middle], [0.0, factor, middle], [0.0, 0.0, 1.0]])


# --- detection -------------------------------------------------------------------------------


def detect_faces(app: Any, image: Tensor) -> tuple[tuple[DetectedFace, ...], tuple[str, ...]]:
    """All faces of ``image [H, W, C]``, and what was tried, in words.

    Where none is found, tries again with a border (tight crops) and at other detector sizes. The
    detector's own size is passed around, never changed. Raises ``ImageError``, ``FaceModelError``.
    """
    _check_detector(app)
    check_image(image)
    factor = _factor(image)
    picture = _to_bgr(_reduced(image, factor))
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
    height, width = picture.shape[:2]
    pad_x = pad_y = round(border * max(height, width))
    pad_x += max(0, math.ceil(height / _MAX_ASPECT) - width)
    pad_y += max(0, math.ceil(width / _MAX_ASPECT) - height)
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


# --- choice ----------------------------------------------------------------------------------


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


# --- alignment -------------------------------------------------------------------------------


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
    cv2 = require("cv2", _FOR_FACES, _INSTALL_CV2)
    matrix = crop_matrix(landmarks, size, padding)
    region, left, top = _region(image, matrix, size)
    matrix = matrix @ np.array([[1.0, 0.0, left], [0.0, 1.0, top], [0.0, 0.0, 1.0]])
    # Bilinear sampling reads four pixels: average those it would skip.
    shrink = min(max(1, int(1.0 / math.hypot(matrix[0, 0], matrix[1, 0]))), *region.shape[:2])
    pixels = _reduced(region, shrink).nan_to_num(0.0).clamp(0.0, 1.0).numpy()
    matrix = matrix @ _scaled(shrink)
    warped = cv2.warpAffine(np.ascontiguousarray(pixels), matrix, (size, size))
    return torch.from_numpy(warped)


def read_face(app: Any, image: Tensor, face: DetectedFace) -> Tensor:
    """E_face: the recogniser's raw embedding ``[512]`` float32 of one face in ``image [H, W, C]``.

    Raises ``FaceModelError`` where the recogniser gives another width or numbers that are none.
    """
    from insightface.app.common import Face

    # The recogniser cuts its own crop; it needs only the pixels that go into it.
    region, left, top = _region(image, crop_matrix(face.landmarks, _TEMPLATE_SIZE, 0.0), 112)
    factor = _factor(region)
    shift = np.array([left, top]) + (factor - 1) / 2
    record = Face(
        bbox=((np.asarray(face.box) - np.tile(shift, 2)) / factor).astype(np.float32),
        kps=((face.landmarks - shift) / factor).astype(np.float32),
        det_score=face.score,
    )
    raw = _recogniser(app).get(_to_bgr(_reduced(region, factor)), record)
    embedding = torch.from_numpy(np.array(raw, dtype=np.float32).reshape(-1))
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
    return embedding


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


# --- all of it -------------------------------------------------------------------------------


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
    _recogniser(app)
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
            index=i,
            frame=frame,
        )
        for i in numbers
    )


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


# --- numbered preview ------------------------------------------------------------------------

_CHOSEN, _OTHER = (64, 200, 96), (235, 180, 60)


def numbered_preview(image: Tensor, found: FoundFaces, max_side: int = 1024) -> Tensor:
    """``image [H, W, C]`` with box and number of every face; the chosen ones are green.

    Returns ``[h, w, 3]`` with the longer side at most ``max_side`` px.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_image(image)
    picture = _to_bgr(_reduced(image, _factor(image)))
    canvas = Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))
    canvas.thumbnail((max_side, max_side), Image.Resampling.BOX)
    scale = canvas.width / image.shape[1]
    draw = ImageDraw.Draw(canvas)
    unit = max(1, round(min(canvas.size) / 300))
    font = ImageFont.load_default(size=max(10, 14 * unit))
    chosen = {face.index for face in found.chosen}
    for number, face in enumerate(found.detected):
        colour = _CHOSEN if number in chosen else _OTHER
        x0, y0, x1, y1 = (value * scale for value in face.box)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=unit)
        # A badge above the box, or inside it where there is no room above.
        label = str(number)
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        wide, high = right - left + 4 * unit, bottom - top + 4 * unit
        badge_y = y0 - high if y0 >= high else y0
        draw.rectangle((x0, badge_y, x0 + wide, badge_y + high), fill=colour)
        draw.text((x0 + 2 * unit - left, badge_y + 2 * unit - top), label, (0, 0, 0), font=font)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255.0)
