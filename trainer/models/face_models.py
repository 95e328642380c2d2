"""A face model pack by its folder, or the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infinite_id_core.errors import FaceModelError
from infinite_id_core.faces.pack import DETECTOR_SIZE, Provider, load_face_models

from .source import MICROWORLD, source_of


def pack_folder(source: str | Path) -> Path:
    """The folder ROOT/models/PACK. Raises ``FaceModelError`` for another."""
    folder = source_of(source, "face_models").path
    if folder.parent.name != "models":
        raise FaceModelError(
            f"{folder} is no face model pack: expected its folder ROOT/models/PACK (.onnx files "
            "of a detector and a recogniser), as insightface and ComfyUI keep them, or "
            f"{MICROWORLD!r}."
        )
    return folder


def face_pack(
    source: str | Path,
    detector_size: int = DETECTOR_SIZE,
    provider: Provider = "auto",
    threads: int = 0,
) -> Any:
    """insightface's ``FaceAnalysis`` of a pack. Raises ``FaceModelError``,
    ``MissingPackageError``."""
    folder = pack_folder(source)
    return load_face_models(
        folder.name, [folder.parent.parent], provider, detector_size, threads=threads
    )
