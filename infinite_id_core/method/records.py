"""What is recorded with an adapter, and how records come out of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from ..errors import OptionError
from .face_clip import ClipLayer, Embedding, check_choices, face_clip_readings
from .features import MAX_WIDTH, Reading


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """What is recorded with an adapter of any kind. Raises ``OptionError``."""

    context_width: int
    """C: width of the UNet's text context (2048 for SDXL)."""
    base_model: str = ""
    """The SDXL it was trained on."""
    training_step: int = 0
    """0 also where it is not known."""
    dataset_fingerprint: str = ""
    licence_note: str = ""

    def __post_init__(self) -> None:
        check_width("context_width", self.context_width)
        if self.training_step < 0:
            raise OptionError(f"training_step must not be negative, got {self.training_step}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file's metadata."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """What it is and what it reads, a line each, for people."""
        return "an adapter"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(AdapterRecord):
    """Everything recorded with an adapter of ours. Raises ``OptionError`` for impossible values."""

    clip_width: int
    """D: hidden width of the image encoder (1280 ViT-H, 1664 ViT-bigG)."""
    recogniser: str
    """Face recogniser it was trained with, e.g. ``buffalo_l/w600k_r50``."""
    clip_model: str
    """Image encoder it was trained with, e.g. ``ViT-H-14``."""
    clip_layer: ClipLayer = "last"
    embedding: Embedding = "normed"
    face_width: int = 512
    face_tokens: int = 4
    """T: tokens the face embedding becomes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_width", "face_width", "face_tokens"):
            check_width(name, getattr(self, name))
        check_choices(self.embedding, self.clip_layer)

    @property
    def summary(self) -> str:
        """See ``AdapterRecord``."""
        return (
            f"Infinite-ID\nimage encoder: {self.clip_model}, {self.clip_layer} hidden states\n"
            f"recogniser: {self.recogniser}, {self.embedding}"
        )

    @property
    def needs(self) -> dict[str, Reading]:
        """How the two features must have been read."""
        return face_clip_readings(
            recogniser=self.recogniser,
            embedding=self.embedding,
            face_width=self.face_width,
            clip_model=self.clip_model,
            clip_layer=self.clip_layer,
            clip_width=self.clip_width,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Inverse of ``to_json``. Raises ``OptionError`` naming what is wrong."""
        return cast(AdapterConfig, record_from_json(cls, values))


@dataclass(frozen=True, kw_only=True)
class PublishedRecord(AdapterRecord):
    """What is known of a published adapter, out of its contents."""

    family: str
    """As people call it, e.g. ``IP-Adapter FaceID plus v2``."""
    encoder: str = ""
    """The image encoder it reads and which output of it, in words; empty: none."""
    recogniser: str = ""
    """The face recogniser, likewise."""
    crop: str = ""
    """What the image encoder sees: the face, or the whole picture."""
    assumed: tuple[str, ...] = ()
    """What the file does not say and was taken as usual, in words."""
    left_out: tuple[str, ...] = ()
    """Groups of the file that were not read."""

    @property
    def summary(self) -> str:
        """See ``AdapterRecord``."""
        lines = {
            "image encoder": self.encoder, "recogniser": self.recogniser, "crop": self.crop,
            "assumed": "; ".join(self.assumed), "not read": ", ".join(self.left_out),
        }  # fmt: skip
        return "\n".join(
            [self.family, *(f"{name}: {text}" for name, text in lines.items() if text)]
        )


@dataclass(frozen=True, kw_only=True)
class AdapterDescription:
    """What is known of an adapter's file before its tensors are read."""

    record: AdapterRecord
    needs: Mapping[str, Reading]
    """The features it reads of a person, by name."""


def check_width(name: str, width: int) -> None:
    """Raise ``OptionError`` where a width, or number of tokens, cannot be one."""
    if not 1 <= width <= MAX_WIDTH:
        raise OptionError(f"{name} must lie in [1, {MAX_WIDTH}], got {width}.")


def record_from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Build a flat dataclass from JSON values, checking names and types.

    Raises ``OptionError`` naming what is missing, unknown or of the wrong type.
    """
    known = {f.name: f for f in fields(cls)}
    required = {n for n, f in known.items() if f.default is f.default_factory}
    missing, unknown = sorted(required - values.keys()), sorted(values.keys() - known.keys())
    if missing or unknown:
        raise OptionError(
            f"configuration lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
        )
    for name, value in values.items():
        wanted = int if known[name].type == "int" else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise OptionError(f"configuration entry {name!r} must be {wanted.__name__}: {value!r}")
    return cls(**values)
