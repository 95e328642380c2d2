"""Judges of microworld pictures: what a picture shows, and whether two show one person.

Both judges are ONNX files of their own. The scorer's embedding never conditions an adapter, so
likeness measured with it is not the adapter marking its own work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microworld import files
from microworld.captions import attributes_of
from microworld.config import RECOGNISER_SIZE
from microworld.portraits import (
    ATTRIBUTE_NAMES,
    ATTRIBUTE_SIZES,
    Attributes,
    Identity,
    Nuisance,
    Picture,
    face_landmarks,
    render,
)

SCORER = files.WEIGHTS / "scorer.onnx"
ATTRIBUTES = files.WEIGHTS / "attributes.onnx"
DETECTOR_SIZE = 320  # pixels; for the surest face as good as 640, in a quarter of the time

Array = NDArray[np.float32]


@lru_cache(maxsize=4)
def _session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(path: str, images: Array) -> Array:
    session = _session(path)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def _planes(pictures: Sequence[Picture]) -> Array:
    """uint8 RGB pictures to [B, 3, H, W] in -1..1."""
    # BHWC -> BCHW
    return (np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5


def read_attributes(pictures: Sequence[Picture]) -> NDArray[np.int64]:
    """What 128 px pictures show: [B, 4] indices in the order of ATTRIBUTE_NAMES."""
    logits = _run(str(ATTRIBUTES), _planes(pictures))
    parts = np.split(logits, np.cumsum(ATTRIBUTE_SIZES)[:-1], axis=1)
    return np.stack([part.argmax(axis=1) for part in parts], axis=1)


def prompt_kept(pictures: Sequence[Picture], prompts: Sequence[str]) -> dict[str, float]:
    """Per attribute and as `mean`, how often a picture shows what its prompt names."""
    read = read_attributes(pictures)
    right: dict[str, list[bool]] = {name: [] for name in ATTRIBUTE_NAMES}
    for row, prompt in zip(read, prompts, strict=True):
        for name, value in attributes_of(prompt).items():
            right[name].append(bool(row[ATTRIBUTE_NAMES.index(name)] == value))
    rates = {name: float(np.mean(seen)) for name, seen in right.items() if seen}
    return {**rates, "mean": float(np.mean([r for seen in right.values() for r in seen]))}


def find_landmarks(
    picture: Picture, *, detector: str | None = None, size: int = DETECTOR_SIZE
) -> NDArray[np.float64] | None:
    """The five points [5, 2] of the surest face, or None; by default of the embedded detector.

    `size`: pixels the detector works at.
    """
    boxes, points = _detector(detector or str(files.DETECTOR)).detect(
        picture[..., ::-1].copy(), input_size=(size, size), max_num=0
    )
    if len(boxes) == 0:
        return None
    return np.asarray(points[int(boxes[:, 4].argmax())], dtype=np.float64)


@lru_cache(maxsize=2)
def _detector(path: str) -> Any:
    from insightface.model_zoo.scrfd import SCRFD

    detector = SCRFD(model_file=path, session=_session(path))
    detector.prepare(-1, input_size=(DETECTOR_SIZE, DETECTOR_SIZE), det_thresh=0.4)
    return detector


def scorer_embeddings(
    pictures: Sequence[Picture],
    landmarks: Sequence[NDArray[np.float64] | None] | None = None,
    *,
    model: str | None = None,
) -> tuple[Array, NDArray[np.bool_]]:
    """The scorer's unit embeddings [B, 512], zeros where no face is found, and the found ones.

    `landmarks` where they are known; otherwise the embedded detector looks for them.
    """
    import cv2
    from insightface.utils import face_align

    known = [find_landmarks(picture) for picture in pictures] if landmarks is None else landmarks
    found = np.array([points is not None for points in known])
    crops = []
    for picture, points in zip(pictures, known, strict=True):
        if points is None:
            crops.append(np.zeros((RECOGNISER_SIZE, RECOGNISER_SIZE, 3), dtype=np.uint8))
            continue
        matrix = face_align.estimate_norm(points.astype(np.float32), RECOGNISER_SIZE)
        crops.append(cv2.warpAffine(picture, matrix, (RECOGNISER_SIZE, RECOGNISER_SIZE)))
    raw = _run(model or str(SCORER), _planes(crops))
    unit = raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-9)
    return unit * found[:, None], found


def likeness(first: Array, second: Array) -> NDArray[np.float32]:
    """Cosines [B] of two sets of `scorer_embeddings`' rows, pair by pair."""
    return np.asarray((first * second).sum(axis=1))


def real_likeness(
    people: Sequence[int],
    rng: np.random.Generator,
    *,
    model: str | None = None,
    exact: bool = True,
) -> tuple[float, float]:
    """Ceiling and floor on renders: mean cosine of one person's two pictures, and of two people.

    With `exact` landmarks, or those that the detector finds.
    """
    pictures: list[Picture] = []
    points: list[NDArray[np.float64] | None] = []
    for seed in people:
        identity = Identity.from_seed(seed)
        for _ in range(2):
            nuisance = Nuisance.sample(rng)
            pictures.append(render(identity, Attributes.sample(rng), nuisance))
            points.append(face_landmarks(identity, nuisance))
    rows, _ = scorer_embeddings(pictures, points if exact else None, model=model)
    same = float(likeness(rows[0::2], rows[1::2]).mean())
    other = float(likeness(rows[0::2], np.roll(rows[1::2], 1, axis=0)).mean())
    return same, other
