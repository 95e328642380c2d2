"""Reference photos to the features that adapters need: each is read once, whoever reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import EncoderError, OptionError
from ..faces.align import CROP_SIZE, AlignedFace, align
from ..faces.pulid import pulid_picture
from ..method.adapter import Adapter
from ..method.face_clip import CLIP_LAYER, FACE_WIDTH
from ..method.features import NORMED, RAW, Feature, Reading
from ..method.identity import Identity, average
from ..method.published import ARCFACE, EVA_CLIP, PROJECTED, PULID_CUT, WHOLE
from .clip_vision import ClipVision, empty_states, hidden_states, image_embeddings
from .encode import Combine, check_recognisers, checked_weights
from .eva import EvaVision
from .named import encoder_name

ImageEncoder = ClipVision | EvaVision
"""What reads photos for adapters: most by ComfyUI's interface, PuLID's by its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """One photo of a person."""

    photo: Tensor
    """``[H, W, C]`` in [0, 1]"""
    face: AlignedFace | None = None
    """The person's; None where no adapter needs one."""


def references_of(faces: Sequence[AlignedFace]) -> list[Reference]:
    """Aligned faces as references. Raises ``EncoderError`` where a photo was not kept."""
    photos = [face.photo for face in faces]
    found = [
        Reference(photo=p, face=f) for p, f in zip(photos, faces, strict=True) if p is not None
    ]
    if len(found) < len(faces):
        raise EncoderError("These faces came without their photos. Find them again by Align Face.")
    return found


def needs_face(adapters: Sequence[Adapter]) -> bool:
    """Whether any of them reads a face, or the picture of one."""
    readings = (reading for adapter in adapters for reading in adapter.needs.values())
    return any(reading.cut != WHOLE for reading in readings)


def image_encoder_of(adapter: Adapter) -> str | None:
    """The image encoder that an adapter reads; None where it reads face embeddings alone."""
    others = (reading.model for reading in adapter.needs.values() if not _is_face(reading))
    return next(others, None)


def recogniser_of(adapter: Adapter) -> str | None:
    """The face recogniser that an adapter reads, if any."""
    found = (reading.model for reading in adapter.needs.values() if _is_face(reading))
    return next(found, None)


def read_references(
    references: Sequence[Reference],
    adapters: Sequence[Adapter],
    clip_vision: ImageEncoder | None,
    *,
    combine: Combine = "stack",
    weights: tuple[float, ...] = (),
    name: str = "",
) -> Identity:
    """One person, with all that ``adapters`` read of them.

    Face embeddings are kept raw: normed follows. Raises ``OptionError``, ``EncoderError`` for an
    image encoder that is not the wanted one, ``IdentityMismatchError``.
    """
    if not references:
        raise OptionError("At least one reference photo is needed, got none.")
    check_recognisers([r.face for r in references if r.face is not None])
    features: dict[str, Feature] = {}
    for wanted, reading, empty in _distinct(adapters):
        feature = _face(references) if _is_face(reading) else None
        feature = feature or _picture(references, reading, clip_vision, empty)
        features[_free(wanted, features)] = feature
    identity = Identity(
        features=features,
        weight=torch.tensor(checked_weights(weights, len(references)), dtype=torch.float32),
        name=name,
    )
    return average(identity) if combine == "average" else identity


def _distinct(adapters: Sequence[Adapter]) -> Iterator[tuple[str, Reading, bool]]:
    """What is to be read, once each: name, reading, and whether nobody is to be encoded, too."""
    found: dict[Reading, tuple[str, bool]] = {}
    for adapter in adapters:
        for name, reading in adapter.needs.items():
            if _is_face(reading):
                reading = replace(reading, output=RAW)
            known, empty = found.get(reading, (name, False))
            empty = empty or adapter.projector.nobody.get(name) == "encoded"
            found[reading] = (known, empty)
    for reading, (name, empty) in found.items():
        yield name, reading, empty


def _free(name: str, taken: Mapping[str, object]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def _is_face(reading: Reading) -> bool:
    return (
        reading.output in (NORMED, RAW)
        and reading.shape == (FACE_WIDTH,)
        and reading.model != EVA_CLIP
    )


def _face(references: Sequence[Reference]) -> Feature:
    faces = [_face_of(reference) for reference in references]
    return Feature(
        reading=Reading(model=faces[0].recogniser, output=RAW, shape=(FACE_WIDTH,)),
        value=torch.stack([face.embedding.float() for face in faces]),
    )


def _picture(
    references: Sequence[Reference],
    reading: Reading,
    clip_vision: ImageEncoder | None,
    empty: bool,
) -> Feature:
    if reading.model == EVA_CLIP:
        return _eva(references, reading, clip_vision)
    if isinstance(clip_vision, EvaVision):
        raise EncoderError(
            f"This adapter reads {reading.model}, and the image encoder given is {EVA_CLIP}. Load "
            f"{file_of_encoder(reading.model)}."
        )
    if clip_vision is None:
        raise EncoderError(
            f"This adapter reads the image encoder {reading.model}. Connect Load CLIP Vision with "
            "its file."
        )
    layer = next((layer for layer in CLIP_LAYER if layer == reading.output), None)
    if layer is None and reading.output != PROJECTED:
        raise EncoderError(f"No image encoder here gives {reading.output!r} of {reading.model}.")
    pictures = [_cut(reference, reading.cut) for reference in references]
    if layer is None:
        value = image_embeddings(clip_vision, pictures)
    else:
        value = hidden_states(clip_vision, pictures, layer)
    read = replace(
        reading,
        model=encoder_name(clip_vision, value.shape[-1]),
        shape=tuple(value.shape[1:]),
    )
    if read != reading:
        raise EncoderError(
            f"This adapter reads {reading.model} ({reading.output}, {list(reading.shape)}), and "
            f"the image encoder given is {read.model} ({list(read.shape)}). Load "
            f"{file_of_encoder(reading.model)}."
        )
    null = empty_states(clip_vision, layer)[0] if empty and layer is not None else None
    return Feature(reading=read, value=value, null=null)


def _eva(
    references: Sequence[Reference], reading: Reading, encoder: ImageEncoder | None
) -> Feature:
    """One of the two features that PuLID's image encoder gives."""
    if not isinstance(encoder, EvaVision):
        given = "none was given" if encoder is None else "another image encoder was given"
        raise EncoderError(
            f"This adapter reads {EVA_CLIP}, PuLID's image encoder, and {given}. Put "
            f"{file_of_encoder(EVA_CLIP)} and use Infinite-ID Loader, which finds it."
        )
    head, levels = encoder.read([_cut(reference, reading.cut) for reference in references])
    return Feature(reading=reading, value=head if reading.output == NORMED else levels)


_FILES = {
    EVA_CLIP: "EVA02_CLIP_L_336_psz14_s6B.pt",
    "ViT-H-14": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "ViT-bigG-14": "CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors",
}


def file_of_encoder(model: str) -> str:
    """The file that people know an image encoder by, and its folder."""
    return f"{_FILES.get(model, f'the file of {model}')} (models/clip_vision)"


def _cut(reference: Reference, cut: str) -> Tensor:
    """What the image encoder is to see."""
    if cut == WHOLE:
        return reference.photo
    face = _face_of(reference)
    if cut == PULID_CUT:
        return pulid_picture(reference.photo, face.detected.landmarks)
    if cut == ARCFACE:
        return align(reference.photo, face.detected.landmarks, CROP_SIZE, 0.0)
    if cut:
        raise EncoderError(f"No way of cutting a face is called {cut!r} here.")
    return face.crop


def _face_of(reference: Reference) -> AlignedFace:
    if reference.face is None:
        raise EncoderError(
            "This adapter reads a face, and none was looked for in the photo. Connect face models."
        )
    return reference.face
