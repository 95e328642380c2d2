"""E_face and E_clip for scores, by name: face model packs, ONNX recognisers, open_clip models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from infinite_id_core.encoders.clip_vision import ClipVision
from infinite_id_core.encoders.open_clip import load_open_clip
from infinite_id_core.errors import FaceModelError, FileMissingError, OptionError
from infinite_id_core.faces.align import align
from infinite_id_core.faces.detect import detect_faces
from infinite_id_core.faces.pack import DETECTOR_SIZE
from infinite_id_core.packages import require
from infinite_id_core.scores.score import FaceReader, PackReader, ReadFace

from ..errors import UnknownBackboneError
from ..models.face_models import face_pack
from ..models.image_encoder import load_image_encoder
from ..models.source import MICROWORLD, source_of

NONE = "none"
ChannelOrder = Literal["rgb", "bgr"]
CHANNEL_ORDER: tuple[ChannelOrder, ...] = get_args(ChannelOrder)

_DEFAULT_SIDE = 112  # of a recogniser whose file leaves it open


@dataclass(frozen=True, kw_only=True)
class OnnxInput:
    """What an ONNX recogniser is fed: (255 x - mean) / deviation. Raises ``OptionError``."""

    mean: float = 127.5
    deviation: float = 127.5
    order: ChannelOrder = "rgb"

    def __post_init__(self) -> None:
        if self.order not in CHANNEL_ORDER or not self.deviation > 0:
            raise OptionError(
                f"A recogniser's channel order is one of {', '.join(CHANNEL_ORDER)} and its "
                f"deviation positive; got {self.order!r} and {self.deviation}."
            )


class OnnxReader:
    """Any recogniser as ONNX, on faces that a pack's detector finds.

    One input ``[n, 3, S, S]`` or ``[n, S, S, 3]``, and the first output is the embedding, of any
    width. The crop is ArcFace's, at the side S that the file says.
    """

    def __init__(self, path: Path, detector: Any, options: OnnxInput | None = None) -> None:
        """``detector``: insightface's ``FaceAnalysis``. Raises ``FaceModelError``,
        ``FileMissingError``, ``MissingPackageError``."""
        runtime = require("onnxruntime", "to recognise faces", "onnxruntime")
        if not path.is_file():
            raise FileMissingError(path, "no such recogniser.")
        self.name = f"{path.parent.name}/{path.stem}"
        self.detector, self.options = detector, options or OnnxInput()
        try:
            self.session = runtime.InferenceSession(
                str(path), providers=runtime.get_available_providers()
            )
        except Exception as error:  # onnxruntime has many, all of its own
            raise FaceModelError(f"{path}: the recogniser cannot be loaded ({error}).") from error
        entry = self.session.get_inputs()[0]
        shape = list(entry.shape)
        self.channels_last = len(shape) == 4 and shape[3] == 3
        self.input = entry.name
        side = shape[1 if self.channels_last else 2] if len(shape) == 4 else None
        if len(shape) != 4 or 3 not in (shape[1], shape[3]):
            raise FaceModelError(
                f"{path}: a recogniser reads pictures [n, 3, side, side] or [n, side, side, 3]; "
                f"this file reads {shape}."
            )
        self.side = side if isinstance(side, int) and side > 0 else _DEFAULT_SIDE

    def read(self, picture: Tensor) -> ReadFace | None:
        """See ``FaceReader``. Raises ``FaceModelError`` for an embedding that is none."""
        faces, _ = detect_faces(self.detector, picture)
        if not faces:
            return None
        face = max(faces, key=lambda f: f.area)
        seen = align(picture, face.landmarks, size=self.side, padding=0.0).numpy()
        seen = seen[..., ::-1] if self.options.order == "bgr" else seen
        pixels = ((seen * 255.0 - self.options.mean) / self.options.deviation)[None]
        if not self.channels_last:
            pixels = pixels.transpose(0, 3, 1, 2)  # BHWC -> BCHW
        feed = {self.input: np.ascontiguousarray(pixels, dtype=np.float32)}
        row = np.asarray(self.session.run(None, feed)[0], dtype=np.float32).reshape(-1)
        if not np.isfinite(row).all() or not row.any():
            raise FaceModelError(f"{self.name} gives an embedding that is zero or not a number.")
        return ReadFace(embedding=torch.from_numpy(row), crop=align(picture, face.landmarks))


def face_reader(
    source: str,
    detector: str = MICROWORLD,
    options: OnnxInput | None = None,
    detector_size: int = DETECTOR_SIZE,
) -> FaceReader:
    """A pack's folder, an ``.onnx`` file (with the ``detector`` pack), or the embedded scorer.

    That one never conditions an adapter. Raises what loading raises.
    """
    place = source_of(source, "scorer")
    if place.embedded:
        detector, options = MICROWORLD, None
    if place.path.suffix == ".onnx":
        return OnnxReader(place.path, face_pack(detector, detector_size), options)
    return PackReader(face_pack(source, detector_size))


def clip_model(source: str) -> ClipVision | None:
    """``microworld``, ``MODEL=FILE`` (open_clip's name and a safetensors file), or ``none``.

    Raises ``UnknownBackboneError``, and what loading raises.
    """
    if source == NONE:
        return None
    if source == MICROWORLD:
        return load_image_encoder(MICROWORLD)
    name, equals, path = source.partition("=")
    if not (name and equals and path):
        raise UnknownBackboneError(
            f"{source!r} is no CLIP model: expected MODEL=FILE, such as "
            f"ViT-H-14=models/clip_vision/file.safetensors, or {MICROWORLD!r}, or {NONE!r}."
        )
    return load_open_clip(name, path, tokens=None)
