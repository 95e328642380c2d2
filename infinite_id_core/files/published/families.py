"""The published families, in the order in which they are asked: the first that matches is it."""

from __future__ import annotations

from ..safetensors_file import Header
from .face import FaceId, FaceIdPlus, FaceIdResampler
from .family import PublishedFormat
from .image import Base, Full, Plus
from .parts import parts_of
from .pulid import Pulid1, Pulid11
from .refusals import refusal

PUBLISHED: tuple[PublishedFormat, ...] = (
    Pulid11(),
    Pulid1(),
    FaceIdPlus(),
    FaceIdResampler(),
    Plus(),
    Full(),
    FaceId(),
    Base(),
)


def refusal_of(header: Header) -> str | None:
    """What a file is that none of them recognises, and what to do; None where nobody knows."""
    return refusal(header, parts_of(header.tensors))
