"""From pictures to scores: what each shows, against its reference, its prompt and its peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infinite_id_core.encoders.clip_vision import ClipVision, image_embeddings
from infinite_id_core.errors import NoFaceError
from infinite_id_core.scores.metrics import (
    Population,
    Scores,
    clip_i,
    clip_t,
    copy_paste,
    identity_fidelity,
    m_face,
    population_of,
)
from infinite_id_core.scores.score import FaceReader, mean_cosine, text_embeddings

from ..errors import NoPicturesError
from ..photos import read_photo, read_reference
from ..prepare.photo import PhotoError
from .manifest import Row
from .people import Person

Progress = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What the backbones make of one picture."""

    face: Tensor | None = None
    """E_face ``[D]``; None: no face."""
    crop: Tensor | None = None
    """E_clip of the face crop ``[E]``."""
    whole: Tensor | None = None
    """E_clip of the whole picture ``[E]``."""
    problem: str = ""
    """Why the picture could not be read."""


def look(reader: FaceReader, clip: ClipVision | None, picture: Tensor) -> Seen:
    """Read one picture ``[H, W, 3]``."""
    face = reader.read(picture)
    if clip is None:
        return Seen(face=None if face is None else face.embedding)
    whole = image_embeddings(clip, [picture])[0]
    if face is None:
        return Seen(whole=whole)
    return Seen(face=face.embedding, crop=image_embeddings(clip, [face.crop])[0], whole=whole)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Scores of ``n`` rows ``[n]``; NaN where not measured."""

    rows: tuple[Row, ...]
    status: tuple[str, ...]
    """``ok``, ``no face``, or why the picture is unreadable."""
    m_face: Scores
    clip_i: Scores
    clip_t: Scores
    copy_paste: Scores
    recogniser: str
    populations: Mapping[str, Population] = field(default_factory=dict)
    """mu and sigma of Eq. 10: ``m_face`` and ``clip_i``; empty where either was not measured."""

    @cached_property
    def readable(self) -> NDArray[np.bool_]:
        """Which pictures could be read."""
        return np.array([status in ("ok", "no face") for status in self.status])

    @cached_property
    def found(self) -> NDArray[np.bool_]:
        """Which pictures show a face."""
        return np.array([status == "ok" for status in self.status])

    @cached_property
    def fidelity(self) -> Scores:
        """Eq. 10 of each picture with a face; NaN elsewhere."""
        if not self.populations:
            return np.full(len(self.rows), np.nan)
        populations = self.populations["m_face"], self.populations["clip_i"]
        return identity_fidelity(self.m_face, self.clip_i, *populations)


def measure(
    rows: Sequence[Row],
    reader: FaceReader,
    clip: ClipVision | None,
    people: Sequence[Person] = (),
    progress: Progress | None = None,
) -> Measured:
    """Score every row. ``people``: more photos of the same identities, for the copy-paste measure.

    Unreadable pictures are recorded, not raised. Raises ``NoFaceError`` and
    ``ReferencePhotoError`` for a reference, ``NoPicturesError`` where not one picture can be read.
    """
    references = {row.reference: row for row in rows}
    wanted = {path: _look_at_reference(reader, clip, path) for path in references}
    others = _other_photos(reader, rows, people)
    seen = {}
    for path in dict.fromkeys(row.image for row in rows):
        seen[path] = _look_at_picture(reader, clip, path)
        if progress is not None:
            progress()
    pictures = [seen[row.image] for row in rows]
    if all(picture.problem for picture in pictures):
        raise NoPicturesError(
            f"None of the {len(seen)} pictures can be read, e.g. {rows[0].image}: "
            f"{pictures[0].problem}."
        )
    targets = [wanted[row.reference] for row in rows]
    wanted_faces = _rows([t.face for t in targets])
    faces = _rows([p.face for p in pictures], wanted_faces)
    likeness = m_face(faces, wanted_faces)
    crops = np.full(len(rows), np.nan)
    if clip is not None:
        wanted_crops = _rows([t.crop for t in targets])
        crops = clip_i(_rows([p.crop for p in pictures], wanted_crops), wanted_crops)
    measured = Measured(
        rows=tuple(rows),
        status=tuple(p.problem or ("no face" if p.face is None else "ok") for p in pictures),
        m_face=likeness,
        clip_i=crops,
        clip_t=_prompt_scores(clip, rows, pictures),
        copy_paste=_copies(rows, faces, likeness, wanted, others),
        recogniser=reader.name,
    )
    return measured if clip is None else _with_populations(measured)


def _look_at_reference(reader: FaceReader, clip: ClipVision | None, path: Path) -> Seen:
    seen = look(reader, clip, read_reference(path))
    if seen.face is None:
        raise NoFaceError(
            f"{path}: no face was found in this reference by {reader.name}, so nothing can be "
            "compared with it. Use a photo that shows the face from the front, larger or with more "
            "room around it, or leave its pictures out."
        )
    return seen


def _look_at_picture(reader: FaceReader, clip: ClipVision | None, path: Path) -> Seen:
    try:
        return look(reader, clip, read_photo(path))
    except PhotoError as error:
        return Seen(problem=f"{error.reason} ({error.detail})")


def _rows(parts: Sequence[Tensor | None], like: Tensor | None = None) -> Tensor:
    """``[n, D]`` with NaN for what is absent; ``like [m, D]`` where all may be."""
    widths = (part.shape[0] for part in parts if part is not None)
    nothing = torch.full((next(widths) if like is None else like.shape[1],), torch.nan)
    return torch.stack([nothing if part is None else part for part in parts])


def _prompt_scores(
    clip: ClipVision | None, rows: Sequence[Row], pictures: Sequence[Seen]
) -> Scores:
    """CLIP-T (Eq. 11) of the rows that have a prompt."""
    scores = np.full(len(rows), np.nan)
    prompted = [i for i, row in enumerate(rows) if row.prompt and pictures[i].whole is not None]
    if clip is None or not prompted:
        return scores
    texts = list(dict.fromkeys(rows[i].prompt for i in prompted))
    embeds = dict(zip(texts, text_embeddings(clip, texts), strict=True))
    wholes = _rows([pictures[i].whole for i in prompted])
    scores[prompted] = clip_t(wholes, torch.stack([embeds[rows[i].prompt] for i in prompted]))
    return scores


def _with_populations(measured: Measured) -> Measured:
    """Eq. 10 over all pictures with a face, of all methods of the run."""
    if not measured.found.any():
        return measured
    over = "all pictures with a face, of all methods of this run"
    populations = {
        name: population_of(getattr(measured, name), over) for name in ("m_face", "clip_i")
    }
    return replace(measured, populations=populations)


# --- copies ----------------------------------------------------------------------------------


def _other_photos(
    reader: FaceReader, rows: Sequence[Row], people: Sequence[Person]
) -> dict[tuple[str, Path], Tensor]:
    """E_face ``[k, D]`` of an identity's photos other than the reference, where there are any."""
    photos = {person.name: person.photos for person in people}
    embeddings: dict[Path, Tensor | None] = {}
    found = {}
    for identity, reference in dict.fromkeys((row.identity, row.reference) for row in rows):
        rest = [p for p in photos.get(identity, ()) if p.resolve() != reference.resolve()]
        for path in rest:
            if path not in embeddings:
                face = reader.read(read_reference(path))
                embeddings[path] = None if face is None else face.embedding
        known = [e for e in (embeddings[path] for path in rest) if e is not None]
        if known:
            found[identity, reference] = torch.stack(known)
    return found


def _copies(
    rows: Sequence[Row],
    faces: Tensor,
    likeness: Scores,
    wanted: Mapping[Path, Seen],
    others: Mapping[tuple[str, Path], Tensor],
) -> Scores:
    """The copy-paste measure ``[n]``, where an identity has other photos."""
    to_others, between = np.full(len(rows), math.nan), np.full(len(rows), math.nan)
    for (identity, reference), photos in others.items():
        mine = [
            i for i, row in enumerate(rows)
            if (row.identity, row.reference) == (identity, reference)
        ]  # fmt: skip
        face = wanted[reference].face
        assert face is not None
        to_others[mine] = mean_cosine(faces[mine], photos)
        between[mine] = mean_cosine(face[None], photos)[0]
    return copy_paste(likeness, to_others, between)
