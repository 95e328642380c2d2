"""How much a picture shows a person: the cosine of two face embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn.functional import cosine_similarity

from infinite_id_core.errors import FaceModelError
from infinite_id_core.faces.align import read_face
from infinite_id_core.faces.detect import detect_faces
from infinite_id_core.faces.pack import load_face_models


class Recogniser(Protocol):
    """Anything that finds and reads the largest face of a picture."""

    def embed(self, picture: Tensor) -> Tensor | None:
        """``[H, W, 3]`` in [0, 1] -> an embedding ``[512]``, or None where no face is found."""
        ...


class InsightFaceRecogniser:
    """An insightface pack as a recogniser."""

    def __init__(self, folder: str | Path) -> None:
        """``folder``: ``ROOT/models/PACK``. Raises ``FaceModelError``, ``MissingPackageError``."""
        folder = Path(folder)
        if folder.parent.name != "models":
            raise FaceModelError(
                f"{folder}: expected a face model pack's folder ROOT/models/PACK, as insightface "
                "and ComfyUI keep them."
            )
        self.app: Any = load_face_models(folder.name, [folder.parent.parent])

    def embed(self, picture: Tensor) -> Tensor | None:
        """See ``Recogniser``."""
        faces, _ = detect_faces(self.app, picture)
        if not faces:
            return None
        return read_face(self.app, picture, max(faces, key=lambda face: face.area))


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Cosines to the reference, with what becomes of pictures without a face."""

    cosines: tuple[float | None, ...]
    """By picture; None where no face was found."""

    @property
    def detected(self) -> float:
        """Share of pictures with a face."""
        return sum(c is not None for c in self.cosines) / len(self.cosines)

    @property
    def zero_filled(self) -> float:
        """Mean, a picture without a face counting 0."""
        return sum(c or 0.0 for c in self.cosines) / len(self.cosines)

    @property
    def detected_only(self) -> float | None:
        """Mean over pictures with a face."""
        found = [c for c in self.cosines if c is not None]
        return sum(found) / len(found) if found else None

    def numbers(self) -> dict[str, float]:
        """For a log."""
        values = {"likeness/detected": self.detected, "likeness/zero_filled": self.zero_filled}
        if self.detected_only is not None:
            values["likeness/detected_only"] = self.detected_only
        return values


def likeness(
    recogniser: Recogniser, pictures: Sequence[Tensor], references: Sequence[Tensor]
) -> Likeness:
    """Score pictures ``[H, W, 3]`` against one reference embedding ``[512]`` each."""
    cosines: list[float | None] = []
    for picture, reference in zip(pictures, references, strict=True):
        found = recogniser.embed(picture)
        cosines.append(None if found is None else float(cosine_similarity(found, reference, dim=0)))
    return Likeness(cosines=tuple(cosines))
