"""What somebody says of an adapter file that does not say it itself."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError
from ..method.face_clip import EMBEDDING, Embedding
from ..method.merging import MERGING
from ..method.resampler import REFERENCES, References
from ..sdxl.layers import CrossAttentionLayer


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Overrides for published adapters; the default of each is what their authors published.

    A file of our own format says all this itself. Raises ``OptionError``.
    """

    recogniser: str | None = None
    """The face recogniser, as an identity records it, e.g. ``buffalo_l/w600k_r50``. InstantID and
    IP-Adapter's portrait-unnorm have the same layers and differ in this alone."""
    embedding: Embedding | None = None
    """Whether the face embedding has unit length; None: as the family has it."""
    image_encoder: str | None = None
    """The image encoder, e.g. ``ViT-H-14``; None: by the width that the file reads."""
    whole_picture: bool | None = None
    """Whether the image encoder sees the whole photo, not the face; None: as the family has it."""
    references: References = "sequence"
    """How several photos go through a face resampler (InstantID, portrait-unnorm)."""
    plus_version: int = 2
    """FaceID plus: whether the shortcut is added (2) or not (1, never published for SDXL)."""
    shortcut: float = 1.0
    """FaceID plus version 2: how much the picture counts beside the embedding."""
    pulid_mode: str | None = None
    """How PuLID adds the person in one stream, of ``method/merging.py``; None: as its authors run
    each version."""
    layers: tuple[CrossAttentionLayer, ...] | None = None
    """The layers of the UNet that it was made for, in the order of ``sdxl/layers.py``; None:
    SDXL's own 70."""

    def __post_init__(self) -> None:
        if self.embedding not in (None, *EMBEDDING) or self.references not in REFERENCES:
            raise OptionError(
                f"embedding must be one of {EMBEDDING} and references one of {REFERENCES}; got "
                f"{self.embedding!r} and {self.references!r}."
            )
        if self.plus_version not in (1, 2) or not -10.0 <= self.shortcut <= 10.0:
            raise OptionError(
                "plus_version must be 1 or 2 and shortcut lie in [-10, 10]; got "
                f"{self.plus_version} and {self.shortcut}."
            )
        if self.pulid_mode is not None and self.pulid_mode not in MERGING:
            raise OptionError(
                f"pulid_mode must be one of {', '.join(MERGING)}; got {self.pulid_mode!r}."
            )
        if self.layers is not None and not self.layers:
            raise OptionError("layers must name the layers of a UNet, got none.")
