"""Eq. 9 and 11 on pictures: the one scorer behind the node and ``trainer evaluate``.

Pictures are ``[H, W, C]`` float tensors in [0, 1]. In a picture with several faces the largest is
read, in references as in generated pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..encoders.clip_vision import ClipVision, image_embeddings
from ..errors import EncoderError, NoFaceError, OptionError
from ..faces.align import align, read_face
from ..faces.detect import detect_faces
from ..faces.find import no_face_message
from ..faces.pack import recogniser_name
from ..faces.pixels import check_batch
from ..method.face_clip import FACE
from ..method.identity import Identity, check_match
from .metrics import Scores, clip_i, clip_t, cosine, zero_filled

# --- E_face ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadFace:
    """One face, cut out and read: FA and E_face of Eq. 9."""

    embedding: Tensor
    """``[D]`` float32, of any length."""
    crop: Tensor
    """``[S, S, 3]`` in [0, 1], for E_clip."""


class FaceReader(Protocol):
    """Anything that finds and reads the largest face of a picture."""

    name: str
    """Of the recogniser, for the record."""

    def read(self, picture: Tensor) -> ReadFace | None:
        """``[H, W, C]`` in [0, 1] -> its largest face; None where there is none."""
        ...


class PackReader:
    """A face model pack as insightface's ``FaceAnalysis``, of our loader or another pack's."""

    def __init__(self, app: Any) -> None:
        """Raises ``FaceModelError`` where the pack has no recogniser."""
        self.app = app
        self.name = recogniser_name(app)

    def read(self, picture: Tensor) -> ReadFace | None:
        """See ``FaceReader``. Raises ``ImageError``, ``FaceModelError``."""
        faces, _ = detect_faces(self.app, picture)
        if not faces:
            return None
        face = max(faces, key=lambda f: f.area)
        return ReadFace(
            embedding=read_face(self.app, picture, face), crop=align(picture, face.landmarks)
        )


# --- E_clip and E_text -----------------------------------------------------------------------


def text_embeddings(clip_vision: ClipVision, texts: Sequence[str]) -> Tensor:
    """E_text of texts by the same model that reads the pictures: ``[n, E]`` float32.

    Raises ``EncoderError`` for an encoder that reads pictures only, as ComfyUI's own do.
    """
    read = getattr(clip_vision, "read_texts", None)
    if read is None:
        raise EncoderError(
            "CLIP-T compares a picture with its prompt, and this image encoder has no text side. "
            "Load the model with Infinite-ID Load open_clip, from a file that holds both sides, or "
            "leave the prompt empty."
        )
    embeds: Tensor = read(list(texts))
    return embeds


# --- one person ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What generated pictures are compared with: ``r`` photos of one person."""

    face: Tensor
    """E_face ``[r, D]``."""
    weight: Tensor
    """``[r]``, positive: how much each photo counts."""
    clip: Tensor | None = None
    """E_clip of the face crops ``[r', E]``; None leaves CLIP-I out."""


def mean_cosine(rows: Tensor, references: Tensor, weight: Tensor | None = None) -> Scores:
    """Eq. 9 against several photos: the weighted mean of the cosines, ``[n, D], [r, D] -> [n]``."""
    each = np.stack([cosine(rows, one.unsqueeze(0)) for one in references])
    shares = None if weight is None else weight.double().numpy()
    mean: Scores = np.average(each, axis=0, weights=shares)
    return mean


def reference_of(
    reader: FaceReader,
    identity: Identity | None = None,
    photos: Tensor | None = None,
    clip_vision: ClipVision | None = None,
) -> Reference:
    """The person an identity or photos ``[r, H, W, C]`` show.

    With both, the identity is whose face is wanted and the photos serve CLIP-I, which an identity
    alone cannot: it keeps no picture. Raises ``OptionError`` (neither), ``NoFaceError`` (a photo
    without a face), ``IdentityMismatchError`` (identity of another recogniser).
    """
    if identity is None and photos is None:
        raise OptionError(
            "Nobody to compare with: connect an identity, or a reference picture of the person."
        )
    if identity is not None:
        check_match(
            "the identity", {"recogniser": identity[FACE].reading.model},
            "the face models", {"recogniser": reader.name},
        )  # fmt: skip
    faces = [] if photos is None else list(_read_photos(reader, photos))
    clip = image_embeddings(clip_vision, [f.crop for f in faces]) if clip_vision and faces else None
    if identity is not None:
        return Reference(face=identity[FACE].value, weight=identity.weight, clip=clip)
    rows = torch.stack([face.embedding for face in faces])
    return Reference(face=rows, weight=torch.ones(len(faces)), clip=clip)


def _read_photos(reader: FaceReader, photos: Tensor) -> Iterator[ReadFace]:
    check_batch(photos)
    for number, photo in enumerate(photos):
        face = reader.read(photo)
        if face is None:
            raise NoFaceError(
                f"The reference: {no_face_message([reader.name], number, photos.shape[0])}"
            )
        yield face


# --- a batch of pictures ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchScores:
    """Scores of ``n`` pictures ``[n]``; NaN where not measured."""

    m_face: Scores
    """NaN: no face."""
    clip_i: Scores
    clip_t: Scores
    recogniser: str

    @property
    def found(self) -> Any:
        """Which pictures show a face, ``[n]`` bool."""
        return ~np.isnan(self.m_face)

    def ranking(self) -> list[int]:
        """Numbers of the pictures, the most alike first.

        By M_face with 0 for a picture without a face and for a negative score (FastComposer's
        rule); among equals those with a face first, then the higher score, then the order given.
        """
        filled = zero_filled(self.m_face, clamp_negatives=True)
        raw = zero_filled(self.m_face)
        keys = zip(filled, self.found, raw, strict=True)
        order = [(-float(f), not has, -float(r), n) for n, (f, has, r) in enumerate(keys)]
        return [entry[-1] for entry in sorted(order)]

    def table(self) -> str:
        """For people: a line a picture, the best first; pictures are counted from 0."""
        lines = [f"{'rank':>4}  {'picture':>7}  {'M_face':>7}  {'CLIP-I':>7}  {'CLIP-T':>7}"]
        for rank, n in enumerate(self.ranking(), start=1):
            face = _cell(self.m_face[n]) if self.found[n] else "no face"
            scores = f"{_cell(self.clip_i[n]):>7}  {_cell(self.clip_t[n]):>7}"
            lines.append(f"{rank:>4}  {n:>7}  {face:>7}  {scores}")
        lines += [f"M_face by {self.recogniser};", "compare within one recogniser only."]
        return "\n".join(lines)


def score_batch(
    reader: FaceReader,
    images: Tensor,
    *,
    identity: Identity | None = None,
    reference: Tensor | None = None,
    clip_vision: ClipVision | None = None,
    prompt: str = "",
) -> BatchScores:
    """M_face and CLIP-I (Eq. 9) and CLIP-T (Eq. 11) of ``images [n, H, W, C]``.

    CLIP-I needs ``reference`` photos and ``clip_vision``, CLIP-T ``prompt`` and ``clip_vision``.
    Raises ``OptionError`` (nobody to compare with; a prompt without an encoder), ``ImageError``,
    ``NoFaceError`` (the reference), ``IdentityMismatchError``, ``EncoderError``.
    """
    check_batch(images)
    prompt = prompt.strip()
    if prompt and clip_vision is None:
        raise OptionError(
            "CLIP-T compares the pictures with the prompt and needs an image encoder: connect "
            "clip_vision, or leave the prompt empty."
        )
    wanted = text_embeddings(clip_vision, [prompt]) if prompt and clip_vision else None
    person = reference_of(reader, identity, reference, clip_vision)
    faces = [reader.read(image) for image in images]
    unmeasured = np.full(len(faces), np.nan)
    text_scores, crop_scores = unmeasured, unmeasured.copy()
    if wanted is not None and clip_vision is not None:
        text_scores = clip_t(image_embeddings(clip_vision, list(images)), wanted)
    if person.clip is not None and clip_vision is not None:
        crop_scores = _crop_scores(clip_vision, faces, person.clip)
    rows = embedding_rows(faces, person.face.shape[1])
    return BatchScores(
        m_face=mean_cosine(rows, person.face, person.weight),
        clip_i=crop_scores,
        clip_t=text_scores,
        recogniser=reader.name,
    )


def embedding_rows(faces: Sequence[ReadFace | None], width: int) -> Tensor:
    """Embeddings ``[n, D]``, NaN for a picture without a face."""
    nobody = torch.full((width,), torch.nan)
    return torch.stack([nobody if face is None else face.embedding for face in faces])


def _crop_scores(
    clip_vision: ClipVision, faces: Sequence[ReadFace | None], references: Tensor
) -> Scores:
    """CLIP-I ``[n]`` as the mean over the references ``[r, E]``; NaN without a face."""
    scores = np.full(len(faces), np.nan)
    found = [n for n, face in enumerate(faces) if face is not None]
    if found:
        crops = image_embeddings(clip_vision, [face.crop for face in faces if face is not None])
        scores[found] = np.mean([clip_i(crops, one.unsqueeze(0)) for one in references], axis=0)
    return scores


def _cell(score: float) -> str:
    return "-" if np.isnan(score) else f"{score:.3f}"
