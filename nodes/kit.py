"""An adapter and all that reads photos for it: what goes along the wire INFINITE_ID."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..infinite_id_core.encoders.references import ImageEncoder, Reference, read_references
from ..infinite_id_core.faces.detect import DetectedFace
from ..infinite_id_core.faces.find import (
    FaceOptions,
    detect_in_batch,
    find_faces_in_batch,
    wanted_faces,
)
from ..infinite_id_core.faces.preview import numbered_previews
from ..infinite_id_core.method.identity import Identity
from ..infinite_id_core.method.low_rank import LowRankUse

if TYPE_CHECKING:
    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter

_KEPT = 8  # people read by one loader


@dataclass(frozen=True, kw_only=True, eq=False)
class Kit:
    """An adapter and all that reads photos for it."""

    adapter: LoadedAdapter
    face_analysis: Any | None
    clip_vision: ImageEncoder | None
    low_rank: LowRankUse = LowRankUse()
    read: OrderedDict[str, tuple[Identity, Tensor]] = field(default_factory=OrderedDict)
    """Who was read already, and their preview, by a hash of the photos."""

    def person(self, photos: Tensor) -> tuple[Identity, Tensor]:
        """Who is in photos ``[n, H, W, C]`` of one person; each set of photos is read once."""
        key = hashlib.sha256(photos.cpu().numpy().tobytes()).hexdigest()
        if key not in self.read:
            self.read[key] = self._person(photos)
            while len(self.read) > _KEPT:
                self.read.popitem(last=False)
        self.read.move_to_end(key)
        return self.read[key]

    def _person(self, photos: Tensor) -> tuple[Identity, Tensor]:
        adapters, preview = [self.adapter.adapter], photos
        references = [Reference(photo=photo) for photo in photos]
        if self.face_analysis is not None:
            found = find_faces_in_batch(self.face_analysis, photos)
            references = [
                Reference(photo=photo, face=seen.chosen[0])
                for photo, seen in zip(photos, found, strict=True)
            ]
            preview = numbered_previews(photos, found)
        return read_references(references, adapters, self.clip_vision), preview

    def faces(self, photos: Tensor) -> list[DetectedFace]:
        """The largest face of each of photos ``[n, H, W, C]``, found and not read.

        Raises ``NoFaceError``, ``ImageError``, ``FaceModelError``.
        """
        found = detect_in_batch(self.face_analysis, photos)
        wanted = wanted_faces(found, FaceOptions())
        return [seen.detected[number] for seen, (number,) in zip(found, wanted, strict=True)]
