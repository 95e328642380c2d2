"""Training pictures for the face detector: known faces placed on known backgrounds.

The faces are the microworld's portraits and the one photograph that scikit-image ships (NASA's
portrait of an astronaut, public domain), so that the embedded default also finds a face in a
photograph. Backgrounds are scikit-image's pictures without people, noise, gradients and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import skimage.data
from numpy.typing import NDArray

from microworld import portraits

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]

# In the picture's own pixels. Landmarks: eyes, nose tip, mouth corners, left before right.
ASTRONAUT_BOX = np.array([178.0, 66.0, 271.0, 179.0])
ASTRONAUT_LANDMARKS = np.array(
    [[203.0, 101.0], [246.0, 103.5], [226.0, 126.0], [204.0, 140.5], [246.0, 139.0]]
)
_ASTRONAUT_HEAD = (228, 105, 78, 92)  # ellipse around hair and chin: x, y, half width, half height

# "coffee" and "rocket" are left out: the tests ask whether nothing is found in them.
_PEOPLELESS = (
    "brick", "cat", "cell", "coins", "colorwheel", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "logo", "moon", "page", "retina", "text",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture with one face. `mask` says which pixels are pasted."""

    picture: Picture  # [h, w, 3]
    mask: NDArray[np.float32]  # [h, w] in 0..1
    box: Array  # [4]
    landmarks: Array  # [5, 2]

    @cached_property
    def pyramid(self) -> list[tuple[Picture, NDArray[np.float32]]]:
        """The picture and its mask at 1, 1/2, 1/4, ... size."""
        levels = [(self.picture, self.mask)]
        while min(levels[-1][0].shape[:2]) >= 32:
            picture, mask = levels[-1]
            size = (picture.shape[1] // 2, picture.shape[0] // 2)
            levels.append(
                tuple(cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in (picture, mask))
            )
        return levels

    @property
    def size(self) -> float:
        """The face's size: the square root of its box's area."""
        return math.sqrt(float(np.prod(self.box[2:] - self.box[:2])))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A canvas and the faces in it."""

    picture: Picture  # [s, s, 3]
    boxes: Array  # [n, 4]
    landmarks: Array  # [n, 5, 2]


def astronaut_sources() -> list[Source]:
    """The astronaut three times: whole, head and shoulders, and the head alone."""
    picture = np.asarray(skimage.data.astronaut())
    whole = np.ones(picture.shape[:2], dtype=np.float32)
    bust, head = np.zeros_like(whole), np.zeros_like(whole)
    bust[:300, 60:400] = 1
    x, y, half_width, half_height = _ASTRONAUT_HEAD
    cv2.ellipse(head, (x, y), (half_width, half_height), 0, 0, 360, 1.0, -1)
    head = cv2.GaussianBlur(head, (0, 0), 4)
    return [
        Source(picture=picture, mask=mask, box=ASTRONAUT_BOX, landmarks=ASTRONAUT_LANDMARKS)
        for mask in (whole, bust, head)
    ]


def portrait_sources(count: int, rng: np.random.Generator, size: int = 192) -> list[Source]:
    """Portraits of `count` people of the training seeds."""
    sources = []
    for _ in range(count):
        person = portraits.Identity.from_seed(int(rng.integers(len(portraits.TRAIN_SEEDS))))
        nuisance = portraits.Nuisance.sample(rng)
        attributes = portraits.Attributes.sample(rng)
        sources.append(
            Source(
                picture=portraits.render(person, attributes, nuisance, size),
                mask=np.ones((size, size), dtype=np.float32),
                box=portraits.face_box(person, nuisance, size),
                landmarks=portraits.face_landmarks(person, nuisance, size),
            )
        )
    return sources


def background_pictures() -> list[Picture]:
    """Pictures without people as RGB: scikit-image's, at most 512 pixels high, and our scenery."""
    pictures = [
        portraits.render_scene(kind, style, 192)
        for kind in range(len(portraits.BACKGROUNDS))
        for style in range(len(portraits.STYLES))
    ]
    found = [np.asarray(getattr(skimage.data, name)()) for name in _PEOPLELESS]
    for picture in [*found, np.asarray(skimage.data.stereo_motorcycle()[0])]:
        if picture.ndim == 2:
            picture = np.repeat(picture[..., None], 3, axis=2)
        scale = min(1.0, 512 / picture.shape[0])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        pictures.append(
            cv2.resize(picture[..., :3].astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        )
    return pictures


class SceneMaker:
    """Draws scenes: `faces` are pasted over `backgrounds`."""

    def __init__(
        self,
        photographs: Sequence[Source],
        drawings: Sequence[Source],
        backgrounds: Sequence[Picture],
        canvas: int = 128,
    ) -> None:
        self.photographs, self.drawings = photographs, drawings
        self.backgrounds, self.canvas = backgrounds, canvas

    def make(self, rng: np.random.Generator) -> Scene:
        """One scene of zero to four faces, some of them cut by the edge or too small to find."""
        return self._make(rng, faces=int(rng.choice([0, 1, 1, 2, 4])))

    def empty(self, rng: np.random.Generator) -> Scene:
        """One scene without a face."""
        return self._make(rng, faces=0)

    def _make(self, rng: np.random.Generator, faces: int) -> Scene:
        picture = self._background(rng)
        boxes: list[Array] = []
        landmarks: list[Array] = []
        free = np.ones((self.canvas, self.canvas), dtype=bool)
        if rng.random() < 0.2:
            _shapes(picture, rng)
        if rng.random() < 0.35:
            self._distract(picture, rng)
        for _ in range(faces):
            placed = self._place(picture, free, rng)
            if placed is not None:
                boxes.append(placed[0])
                landmarks.append(placed[1])
        if rng.random() < 0.2:  # the detector pads with black, right and below
            self._pad(picture, boxes, rng)
        if rng.random() < 0.3:
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.3))
        return Scene(
            picture=np.clip(picture, 0, 255).astype(np.uint8),
            boxes=np.array(boxes).reshape(-1, 4),
            landmarks=np.array(landmarks).reshape(-1, 5, 2),
        )

    def _background(self, rng: np.random.Generator) -> NDArray[np.float32]:
        kind, n = rng.random(), self.canvas
        if kind < 0.55:
            source = self.backgrounds[int(rng.integers(len(self.backgrounds)))]
            return _restyled(_crop(source, n, rng), rng)
        if kind < 0.75:  # the photograph below its face: clothes, flag and wall are no face
            return _restyled(_crop(self.photographs[0].picture[190:], n, rng), rng)
        corners = rng.uniform(0, 255, (2, 2, 3)).astype(np.float32)
        if kind < 0.82:
            corners[:] = corners[0, 0]
        smooth = cv2.resize(corners, (n, n), interpolation=cv2.INTER_LINEAR)
        if kind > 0.88:
            cells = int(rng.integers(3, 40))
            noise = rng.normal(0, rng.uniform(10, 70), (cells, cells, 3)).astype(np.float32)
            smooth += cv2.resize(noise, (n, n), interpolation=cv2.INTER_CUBIC)
        return smooth

    def _distract(self, picture: NDArray[np.float32], rng: np.random.Generator) -> None:
        """A face with its tiles shuffled: all the parts, none of the order."""
        source = self._source(rng)
        x0, y0, x1, y1 = np.clip(source.box, 0, 10_000).round().astype(int)
        side = int(rng.integers(18, self.canvas - 8)) // 3 * 3
        face = cv2.resize(source.picture[y0:y1, x0:x1], (side, side), interpolation=cv2.INTER_AREA)
        third = side // 3
        tiles = [
            face[r : r + third, c : c + third]
            for r in range(0, side, third)
            for c in range(0, side, third)
        ]
        order = rng.permutation(9)
        mixed = np.vstack([np.hstack([tiles[i] for i in order[r : r + 3]]) for r in (0, 3, 6)])
        x, y = rng.integers(0, self.canvas - side, 2)
        picture[y : y + side, x : x + side] = mixed

    def _source(self, rng: np.random.Generator) -> Source:
        sources = self.photographs if rng.random() < 0.5 else self.drawings
        return sources[int(rng.integers(len(sources)))]

    def _place(
        self, picture: NDArray[np.float32], free: NDArray[np.bool_], rng: np.random.Generator
    ) -> tuple[Array, Array] | None:
        source, n = self._source(rng), self.canvas
        # Beyond 135 pixels a face is the half-size picture's business: its parts are no faces.
        smallest, largest = (140, 500) if rng.random() < 0.2 else (12, 140)
        size = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        level = 0
        while size / source.size * 2**level < 0.5 and level + 1 < len(source.pyramid):
            level += 1
        pixels, mask = source.pyramid[level]
        matrix = _placement(source, size, rng.uniform(0.05, 0.95, 2) * n, rng)
        boxes, points = _transformed(source, matrix)
        if not _all_free(free, boxes):
            return None
        shrunk = matrix.copy()
        shrunk[:, :2] *= 2**level
        face = cv2.warpAffine(pixels, shrunk, (n, n), flags=cv2.INTER_LINEAR)
        weight = cv2.warpAffine(mask, shrunk, (n, n), flags=cv2.INTER_LINEAR)[..., None]
        weight = weight * free[..., None]  # faces already there keep their pixels
        picture *= 1 - weight
        picture += weight * _recoloured(face, rng)
        free &= weight[..., 0] < 0.05
        return boxes, points

    def _pad(
        self, picture: NDArray[np.float32], boxes: list[Array], rng: np.random.Generator
    ) -> None:
        edge = int(rng.integers(self.canvas // 3, self.canvas))
        if rng.random() < 0.5 and all(box[3] < edge for box in boxes):
            picture[edge:] = 0
        elif all(box[2] < edge for box in boxes):
            picture[:, edge:] = 0


def _placement(
    source: Source, size: float, centre: Array, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A 2x3 similarity that puts the face's centre at `centre` with that size, a little turned."""
    turn = rng.normal(0, 0.16)
    scale = size / source.size
    cos, sin = math.cos(turn) * scale, math.sin(turn) * scale
    # A little stretch keeps the one photograph from having one shape only.
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.diag(rng.uniform(0.92, 1.08, 2))
    middle = (source.box[:2] + source.box[2:]) / 2
    return np.concatenate([matrix, (centre - matrix @ middle)[:, None]], axis=1)


def _transformed(source: Source, matrix: NDArray[np.float64]) -> tuple[Array, Array]:
    """The upright box [4] around the turned face, and its landmarks [5, 2]."""
    x0, y0, x1, y1 = source.box
    angles = np.linspace(0, 2 * math.pi, 24)
    half = np.array([(x1 - x0) / 2, (y1 - y0) / 2])
    # Faces are oval: the turned oval's box, not the turned box's.
    oval = np.stack([np.cos(angles), np.sin(angles)], axis=1) * half + [
        (x0 + x1) / 2,
        (y0 + y1) / 2,
    ]
    placed = oval @ matrix[:, :2].T + matrix[:, 2]
    points = source.landmarks @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([placed.min(axis=0), placed.max(axis=0)]), points


def _all_free(free: NDArray[np.bool_], box: Array) -> bool:
    x0, y0, x1, y1 = np.clip(box, 0, free.shape[0]).round().astype(int)
    return bool(free[y0:y1, x0:x1].all())


def _crop(picture: Picture, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A square of random place and scale."""
    shortest = min(picture.shape[:2])
    side = round(math.exp(rng.uniform(math.log(32), math.log(shortest))))
    x = int(rng.integers(picture.shape[1] - side + 1))
    y = int(rng.integers(picture.shape[0] - side + 1))
    square = picture[y : y + side, x : x + side]
    if rng.random() < 0.5:
        square = np.rot90(square, int(rng.integers(4)))
    return cv2.resize(
        np.ascontiguousarray(square),
        (size, size),
        interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR,
    ).astype(np.float32)


def _restyled(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Few backgrounds must stand for all: other colours, contrasts, negatives, mirror images."""
    picture = picture[..., rng.permutation(3)]
    if rng.random() < 0.2:
        picture = 255 - picture
    if rng.random() < 0.25:  # faces are symmetric, symmetric things are not all faces
        half = picture[:, : picture.shape[1] // 2]
        picture = np.concatenate([half, half[:, ::-1]], axis=1)
    if rng.random() < 0.4:
        picture = (picture - picture.mean()) * rng.uniform(0.5, 2.5) + rng.uniform(60, 190)
    return np.ascontiguousarray(picture, dtype=np.float32)


def _recoloured(face: Picture, rng: np.random.Generator) -> NDArray[np.float32]:
    gain = rng.uniform(0.6, 1.3) * rng.uniform(0.85, 1.15, 3)
    mixed = face.astype(np.float32)
    if rng.random() < 0.2:
        mixed = np.repeat(mixed.mean(axis=2, keepdims=True), 3, axis=2)
    return mixed * gain.astype(np.float32) + np.float32(rng.uniform(-25, 25))


def _shapes(picture: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Ovals, rings and bars, skin-coloured ones among them: faces are more than an oval."""
    n = picture.shape[0]
    for _ in range(int(rng.integers(1, 8))):
        colour = rng.uniform(0, 255, 3) if rng.random() < 0.6 else (220, 180, 150)
        colour = tuple(float(c) for c in colour)
        centre = tuple(int(v) for v in rng.integers(0, n, 2))
        axes = tuple(int(v) for v in rng.integers(3, n // 3, 2))
        if rng.random() < 0.4:
            cv2.ellipse(picture, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1)
        elif rng.random() < 0.5:
            for ring in range(axes[0], 0, -max(2, axes[0] // int(rng.integers(1, 5)))):
                cv2.circle(picture, centre, ring, tuple(rng.uniform(0, 255, 3).tolist()), -1)
        else:
            corner = (centre[0] + axes[0], centre[1] + axes[1])
            cv2.rectangle(picture, centre, corner, colour, -1)
