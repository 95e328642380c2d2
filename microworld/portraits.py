"""Procedural portraits: a person of twelve continuous traits, a scene, a style, and free nuisances.

A face is drawn in its own coordinates (chin at y = 1, top of the skull at y = -1, x to the
picture's right) and put into the picture by one similarity transform, so landmarks and boxes come
from the same numbers as the pixels. Drawing is done at twice the size and averaged down.

Everything is a pure function of its arguments: the same identity, attributes, nuisance and size
give the same bytes on one machine; another processor may round a colour to the next level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .config import IMAGE_SIZE

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

BACKGROUNDS = ("beach", "forest", "city", "mountain", "night", "desert", "library", "garden")
STYLES = ("photo", "sketch", "sepia", "neon")
EXPRESSIONS = ("neutral", "smile", "surprise")
ACCESSORIES = ("none", "glasses", "hat", "scarf")

TRAIN_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 2_000_000)

_OVERSAMPLE = 2
_FACE_HALF_HEIGHT = 0.36  # of the picture, at scale 1


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A person: twelve traits in [0, 1], all of them visible in the face in every style."""

    skin: float  # pale .. dark
    hair_light: float  # black .. fair
    hair_red: float  # plain .. red
    hair_length: float  # cropped .. below the chin
    fringe: float  # bare forehead .. fringe down to the brows
    face_width: float  # narrow .. wide
    jaw: float  # pointed .. square
    eye_spacing: float  # close .. wide apart
    eye_size: float  # small .. large
    brows: float  # thin .. thick
    nose: float  # small .. large
    mouth: float  # small .. wide

    @classmethod
    def from_seed(cls, seed: int) -> Identity:
        """The person of a seed. `TRAIN_SEEDS` and `HELD_OUT_SEEDS` never share one.

        Traits are drawn from Beta(0.7, 0.7): extremes are commoner than middles, so that two
        people differ clearly in several traits.
        """
        rng = np.random.default_rng((seed, 0x1D))
        return cls.from_array(rng.beta(0.7, 0.7, len(fields(cls))))

    @classmethod
    def from_array(cls, traits: Sequence[float] | Array) -> Identity:
        """The inverse of `as_array`; values are clipped to [0, 1]."""
        values = np.clip(np.asarray(traits, dtype=np.float64), 0.0, 1.0)
        names = [field.name for field in fields(cls)]
        if values.shape != (len(names),):
            raise ValueError(f"Expected {len(names)} traits, got shape {values.shape}.")
        return cls(**dict(zip(names, map(float, values), strict=True)))

    def as_array(self) -> Array:
        """Traits [12] in field order."""
        return np.array(astuple(self))


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What a caption names. Indices into BACKGROUNDS, STYLES, EXPRESSIONS, ACCESSORIES."""

    background: int
    style: int
    expression: int
    accessory: int

    def __post_init__(self) -> None:
        for name, value, count in zip(ATTRIBUTE_NAMES, astuple(self), ATTRIBUTE_SIZES, strict=True):
            if not 0 <= value < count:
                raise ValueError(f"Expected {name} in 0..{count - 1}, got {value}.")

    @classmethod
    def sample(
        cls, rng: np.random.Generator, *, held_out: bool = False, style: int | None = None
    ) -> Attributes:
        """A combination of the training set, or (`held_out`) one that training never shows.

        `style`: in this style only.
        """
        while True:
            sizes = zip(ATTRIBUTE_NAMES, ATTRIBUTE_SIZES, strict=True)
            found = cls(**{name: int(rng.integers(size)) for name, size in sizes})
            if found.is_held_out == held_out and style in (None, found.style):
                return found

    @property
    def is_held_out(self) -> bool:
        """Whether this combination is kept from all training (an eighth of the 384)."""
        a = self
        return (a.background + 2 * a.style + 3 * a.expression + 5 * a.accessory) % 8 == 3

    def names(self) -> dict[str, str]:
        """The attribute values as words, by attribute."""
        return {
            "background": BACKGROUNDS[self.background],
            "style": STYLES[self.style],
            "expression": EXPRESSIONS[self.expression],
            "accessory": ACCESSORIES[self.accessory],
        }


ATTRIBUTE_NAMES = ("background", "style", "expression", "accessory")
ATTRIBUTE_VALUES = {
    "background": BACKGROUNDS,
    "style": STYLES,
    "expression": EXPRESSIONS,
    "accessory": ACCESSORIES,
}
ATTRIBUTE_SIZES = (len(BACKGROUNDS), len(STYLES), len(EXPRESSIONS), len(ACCESSORIES))


@dataclass(frozen=True, kw_only=True)
class Nuisance:
    """What neither the person nor the caption decides."""

    x: float = 0.0  # shift, in picture widths
    y: float = 0.0
    scale: float = 1.0
    roll: float = 0.0  # radians, in the picture's plane
    yaw: float = 0.0  # -1 .. 1: features move against the outline
    light: float = 0.0  # -1 .. 1: from the picture's left or right
    brightness: float = 1.0
    scenery: float = 0.5  # 0 .. 1: which part of the background's panorama
    clothes: int = 0  # index into the clothes' colours
    trim: int = 0  # index into the accessory's colours

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Nuisance:
        """A draw of the training distribution."""
        return cls(
            x=float(rng.uniform(-0.05, 0.05)),
            y=float(rng.uniform(-0.03, 0.03)),
            scale=float(rng.uniform(0.9, 1.06)),
            roll=float(rng.uniform(-0.14, 0.14)),
            yaw=float(rng.uniform(-1, 1)),
            light=float(rng.uniform(-1, 1)),
            brightness=float(rng.uniform(0.9, 1.1)),
            scenery=float(rng.uniform(0, 1)),
            clothes=int(rng.integers(len(_CLOTHES))),
            trim=int(rng.integers(len(_TRIMS))),
        )


_CLOTHES: tuple[Colour, ...] = (
    (60, 80, 140),
    (150, 50, 55),
    (70, 120, 80),
    (210, 205, 195),
    (50, 50, 58),
    (190, 150, 60),
)
_TRIMS: tuple[Colour, ...] = ((200, 40, 50), (40, 90, 190), (60, 60, 66), (235, 190, 60))
_SKINS: tuple[Colour, ...] = ((252, 226, 206), (232, 186, 148), (178, 124, 86), (98, 62, 42))


def render(
    identity: Identity,
    attributes: Attributes,
    nuisance: Nuisance | None = None,
    size: int = IMAGE_SIZE,
) -> Picture:
    """Draw a portrait.

    Returns uint8 [size, size, 3] RGB. Raises ValueError for a size below 16.
    """
    nuisance = nuisance or Nuisance()
    if size < 16:
        raise ValueError(f"Expected a size of at least 16 pixels, got {size}.")
    canvas = _background(attributes.background, size * _OVERSAMPLE, nuisance.scenery)
    _Painter(ImageDraw.Draw(canvas), identity, attributes, nuisance, size * _OVERSAMPLE).paint()
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255.0
    lit = pixels * _light(size, nuisance.light, nuisance.brightness)
    styled = _STYLERS[attributes.style](np.clip(lit, 0.0, 1.0))
    return (np.clip(styled, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def render_scene(
    background: int, style: int, size: int = IMAGE_SIZE, scenery: float = 0.5
) -> Picture:
    """Draw a background in a style, with nobody in it: uint8 [size, size, 3] RGB."""
    canvas = _background(background, size * _OVERSAMPLE, scenery)
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255.0
    return (np.clip(_STYLERS[style](pixels), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def face_landmarks(
    identity: Identity, nuisance: Nuisance | None = None, size: int = IMAGE_SIZE
) -> Array:
    """Eyes, nose tip, mouth corners as [5, 2] pixels (x, y), the picture's left before its right.

    ArcFace's order. Expressions move the mouth's corners by less than its width; they are left out.
    """
    nuisance = nuisance or Nuisance()
    face = _Face(identity, nuisance)
    points = np.array(
        [
            [face.eye_x(-1), face.eye_y],
            [face.eye_x(1), face.eye_y],
            [face.shift(0.2), face.nose_y],
            [face.shift(0.11) - face.mouth_half, face.mouth_y],
            [face.shift(0.11) + face.mouth_half, face.mouth_y],
        ]
    )
    return face.to_picture(points, size)


def face_box(identity: Identity, nuisance: Nuisance | None = None, size: int = IMAGE_SIZE) -> Array:
    """The face from brow ridge's hairline to chin as [4] pixels x0, y0, x1, y1 (not clipped)."""
    nuisance = nuisance or Nuisance()
    face = _Face(identity, nuisance)
    points = face.to_picture(face.outline()[face.outline()[:, 1] > -0.75], size)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


_T = np.linspace(0, 2 * math.pi, 28, endpoint=False)
_CIRCLE = np.stack([np.cos(_T), np.sin(_T)], axis=1)


def _mix(low: float, high: float, t: float) -> float:
    return low + (high - low) * t


def _blend(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    return tuple(round(_mix(p, q, t)) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]


def _shade(colour: Sequence[float], factor: float) -> Colour:
    return tuple(min(255, round(c * factor)) for c in colour)  # type: ignore[return-value]


class _Face:
    """The geometry of one face under one nuisance, in face coordinates."""

    def __init__(self, identity: Identity, nuisance: Nuisance) -> None:
        self.identity, self.nuisance = identity, nuisance
        self.width = _mix(0.60, 0.88, identity.face_width)
        self.eye_y = -0.06
        self.eye_half = _mix(0.085, 0.165, identity.eye_size)
        self.nose_half = _mix(0.055, 0.17, identity.nose)
        self.nose_y = _mix(0.24, 0.40, identity.nose)
        self.mouth_y = 0.60
        self.mouth_half = _mix(0.15, 0.37, identity.mouth)

    def shift(self, depth: float) -> float:
        return depth * self.nuisance.yaw * 0.6

    def eye_x(self, side: int) -> float:
        return side * _mix(0.20, 0.40, self.identity.eye_spacing) + self.shift(0.10)

    def outline(self, grow: float = 0.0) -> Array:
        """[28, 2]; the lower half's exponent makes the jaw pointed or square."""
        x, y = _CIRCLE[:, 0], _CIRCLE[:, 1]
        power = _mix(1.35, 3.6, self.identity.jaw)
        low = np.clip(1 - np.abs(y) ** power, 0, 1) ** (1 / 1.7)
        high = np.sqrt(np.clip(1 - np.abs(y) ** 2.3, 0, 1))
        # The chin's corner points: a square jaw keeps some width at the very bottom.
        low = np.maximum(low, 0.34 * self.identity.jaw)
        half = np.where(y > 0, low, high) * (self.width + grow)
        return np.stack([np.sign(x) * half, y * (1 + grow)], axis=1)

    def to_picture(self, points: Array, size: int) -> Array:
        n = self.nuisance
        unit = _FACE_HALF_HEIGHT * n.scale * size
        c, s = math.cos(n.roll) * unit, math.sin(n.roll) * unit
        x, y = points[:, 0], points[:, 1]
        centre_x, centre_y = (0.5 + n.x) * size, (0.515 + n.y) * size
        return np.stack([c * x - s * y + centre_x, s * x + c * y + centre_y], axis=1)


class _Painter:
    """Draws one portrait on a canvas, back to front."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        identity: Identity,
        attributes: Attributes,
        nuisance: Nuisance,
        size: int,
    ) -> None:
        self.draw, self.identity, self.nuisance, self.size = draw, identity, nuisance, size
        self.attributes = attributes
        self.face = _Face(identity, nuisance)
        position = identity.skin * (len(_SKINS) - 1)
        index = min(int(position), len(_SKINS) - 2)
        self.skin = _blend(_SKINS[index], _SKINS[index + 1], position - index)
        plain = _blend((22, 18, 20), (240, 214, 150), identity.hair_light)
        red = _blend((88, 18, 16), (236, 118, 56), identity.hair_light)
        self.hair = _blend(plain, red, identity.hair_red)
        self.unit = _FACE_HALF_HEIGHT * nuisance.scale * size

    def paint(self) -> None:
        self._hair_back()
        self._body()
        self._face()
        self._eyes()
        self._nose()
        self._mouth()
        self._hair_front()
        if self.attributes.accessory == 1:
            self._glasses()
        elif self.attributes.accessory == 2:
            self._hat()

    def _fill(self, points: Array | list[tuple[float, float]], colour: Colour) -> None:
        placed = self.face.to_picture(np.asarray(points, dtype=np.float64), self.size)
        self.draw.polygon(placed.ravel().tolist(), fill=colour)

    def _line(self, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
        placed = self.face.to_picture(np.asarray(points), self.size)
        self.draw.line(
            placed.ravel().tolist(),
            fill=colour,
            width=max(1, round(width * self.unit)),
            joint="curve",
        )

    def _oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self._fill(_CIRCLE * (rx, ry) + (x, y), colour)

    def _hair_back(self) -> None:
        width, length = self.face.width, self.identity.hair_length
        bottom = _mix(-0.25, 1.35, length)
        flare = _mix(0.06, 0.20, length)
        side = width + flare
        top = _CIRCLE[14:] * (width + 0.10, 1.12) + (0, -0.04)
        lower = [
            (side, bottom * 0.5),
            (side + 0.02, bottom),
            (-side - 0.02, bottom),
            (-side, bottom * 0.5),
        ]
        self._fill(np.concatenate([top, np.array(lower)]), _shade(self.hair, 0.82))

    def _body(self) -> None:
        clothes = _CLOTHES[self.nuisance.clothes]
        dark = _shade(self.skin, 0.78)
        neck = self.face.width * 0.5
        self._fill([(-neck, 0.6), (neck, 0.6), (neck, 1.5), (-neck, 1.5)], dark)
        self._oval(0.0, 2.05, 1.5, 0.86, clothes)
        if self.attributes.accessory == 3:
            trim = _TRIMS[self.nuisance.trim]
            self._oval(0.0, 1.18, 1.12, 0.40, trim)
            self._line(
                [(-0.95, 1.18), (-0.3, 1.40), (0.4, 1.42), (0.95, 1.20)], _shade(trim, 0.55), 0.07
            )
            self._line([(-0.98, 1.02), (-0.2, 1.22), (0.6, 1.18)], _shade(trim, 1.4), 0.06)

    def _face(self) -> None:
        ear = self.face.width + 0.02
        for side in (-1, 1):
            self._oval(side * ear, 0.06, 0.09, 0.16, _shade(self.skin, 0.85))
        self._fill(self.face.outline(0.025), _shade(self.skin, 0.66))
        self._fill(self.face.outline(), self.skin)

    def _eyes(self) -> None:
        face, surprised = self.face, self.attributes.expression == 2
        tall = 1.15 if surprised else 0.72
        half = face.eye_half
        for side in (-1, 1):
            x = face.eye_x(side)
            self._oval(x, face.eye_y, half + 0.02, half * tall + 0.025, _shade(self.skin, 0.6))
            self._oval(x, face.eye_y, half, half * tall, (250, 250, 250))
            gaze = x + face.shift(0.05)
            self._oval(gaze, face.eye_y, half * 0.55, half * 0.6, (48, 36, 34))
            self._brow(side, x, surprised)

    def _brow(self, side: int, x: float, surprised: bool) -> None:
        thick = _mix(0.03, 0.12, self.identity.brows)
        y = self.face.eye_y - self.face.eye_half - 0.09 - thick * 0.5 - (0.1 if surprised else 0)
        half = max(0.15, self.face.eye_half * 1.25)
        # Brows are hair, a little darker; against like skin they stay visible.
        colour = _shade(_blend(self.hair, (30, 22, 20), 0.35), 0.85)
        points = [(x - side * half, y + 0.03), (x, y - 0.03), (x + side * half, y + 0.05)]
        self._line(points, colour, thick)

    def _nose(self) -> None:
        face = self.face
        x, half, y = face.shift(0.2), face.nose_half, face.nose_y
        bridge = face.shift(0.1)
        shadow = _shade(self.skin, 0.80)
        self._fill(
            [
                (bridge - 0.03, 0.0),
                (bridge + 0.05, 0.0),
                (x + half, y),
                (x, y + 0.07),
                (x - half, y),
            ],
            shadow,
        )
        self._fill(
            [
                (bridge - 0.025, 0.02),
                (bridge + 0.015, 0.02),
                (x + half * 0.4, y - 0.02),
                (x - half * 0.6, y - 0.02),
            ],
            _shade(self.skin, 1.06),
        )
        for side in (-1, 1):
            self._oval(
                x + side * half * 0.55, y + 0.015, half * 0.3, 0.026, _shade(self.skin, 0.45)
            )

    def _mouth(self) -> None:
        face, expression = self.face, self.attributes.expression
        x, y, half = face.shift(0.11), face.mouth_y, face.mouth_half
        lip = _blend(self.skin, (165, 40, 50), 0.62)
        inside = (82, 22, 28)
        if expression == 0:
            self._oval(x, y + 0.012, half, 0.062, lip)
            self._line([(x - half, y), (x + half, y)], _shade(lip, 0.55), 0.03)
        elif expression == 1:
            wide = half * 1.15
            arc = _CIRCLE[:15] * (wide, 0.24) + (x, y - 0.09)
            self._fill(arc + (arc - (x, y)) * 0.16, lip)
            self._fill(arc, inside)
            self._fill(_CIRCLE[:15] * (wide * 0.86, 0.10) + (x, y - 0.07), (250, 248, 240))
        else:
            self._oval(x, y + 0.06, half * 0.62 + 0.03, 0.205, lip)
            self._oval(x, y + 0.06, half * 0.62 - 0.03, 0.150, inside)

    def _hair_front(self) -> None:
        face, identity = self.face, self.identity
        line = _mix(-0.80, -0.36, identity.fringe)
        outer = face.width + 0.07
        cap = _CIRCLE[14:] * (outer, 1.10) + (0, -0.05)
        side_y = _mix(-0.05, 0.62, identity.hair_length)
        lock = _mix(0.05, 0.17, identity.hair_length)
        inner = face.width * 0.90
        parting = face.shift(0.08)
        edge = [
            (outer, -0.05),
            (outer, side_y),
            (outer - lock, side_y - 0.05),
            (inner - 0.02, -0.28),
            (inner * 0.62 + parting, line + 0.05),
            (parting, line - 0.05),
            (-inner * 0.62 + parting, line + 0.05),
            (-inner + 0.02, -0.28),
            (-outer + lock, side_y - 0.05),
            (-outer, side_y),
            (-outer, -0.05),
        ]
        self._fill(np.concatenate([cap, np.array(edge)]), self.hair)
        shine = _shade(_blend(self.hair, (255, 255, 255), 0.22), 1.0)
        self._line(
            [(-0.42 + parting, -0.86), (-0.1 + parting, -0.96), (0.3 + parting, -0.93)], shine, 0.07
        )

    def _glasses(self) -> None:
        face, frame = self.face, (24, 24, 30)
        for side in (-1, 1):
            x = face.eye_x(side)
            ring = _CIRCLE * (0.235, 0.205) + (x, face.eye_y + 0.01)
            self._line([*map(tuple, ring), tuple(ring[0]), tuple(ring[1])], frame, 0.06)
            self._line(
                [(x + side * 0.23, face.eye_y), (side * (face.width + 0.02), -0.1)], frame, 0.05
            )
        self._line(
            [(face.eye_x(-1) + 0.22, face.eye_y - 0.03), (face.eye_x(1) - 0.22, face.eye_y - 0.03)],
            frame,
            0.06,
        )

    def _hat(self) -> None:
        trim = _TRIMS[self.nuisance.trim]
        outer = self.face.width + 0.13
        crown = _CIRCLE[14:] * (outer, 0.78) + (0, -0.66)
        self._fill(crown, trim)
        brim = outer + 0.22
        self._fill(
            [
                (-brim, -0.62),
                (-outer, -0.72),
                (outer, -0.72),
                (brim, -0.62),
                (outer, -0.54),
                (-outer, -0.54),
            ],
            _shade(trim, 0.62),
        )
        self._fill(
            [(-outer, -0.86), (outer, -0.86), (outer, -0.72), (-outer, -0.72)], _shade(trim, 1.4)
        )


def _background(kind: int, size: int, scenery: float) -> Image.Image:
    panorama = _panorama(kind, size)
    left = round(scenery * (panorama.width - size))
    return panorama.crop((left, 0, left + size, size))


@lru_cache(maxsize=64)
def _panorama(kind: int, size: int) -> Image.Image:
    """A background twice as wide as the picture, from its own seed."""
    image = Image.new("RGB", (2 * size, size))
    _SCENES[kind](ImageDraw.Draw(image), float(size), np.random.default_rng(kind + 77))
    return image


def _bands(draw: ImageDraw.ImageDraw, size: float, bands: Sequence[tuple[float, Colour]]) -> None:
    for top, colour in bands:
        draw.rectangle((0, top * size, 2 * size, size), fill=colour)


def _beach(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (140, 205, 245)), (0.38, (30, 110, 190)), (0.62, (240, 215, 150))])
    for x in (0.2, 1.0, 1.8):
        draw.ellipse(_disc(x, 0.14, 0.09, size), fill=(255, 240, 120))
    for y in (0.44, 0.5, 0.56):
        draw.line((0, y * size, 2 * size, y * size), fill=(190, 225, 245), width=int(size * 0.014))


def _forest(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (50, 120, 60)), (0.8, (40, 70, 30))])
    for i in range(14):
        x = (i + 0.5 + rng.uniform(-0.15, 0.15)) / 7
        half = rng.uniform(0.018, 0.032)
        draw.rectangle(((x - half) * size, 0, (x + half) * size, 0.85 * size), fill=(75, 48, 28))
        draw.ellipse(_disc(x + 0.07, rng.uniform(0.0, 0.6), 0.065, size), fill=(90, 165, 70))


def _city(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (190, 200, 212)), (0.9, (80, 82, 90))])
    for i in range(12):
        x, top = i / 6, rng.uniform(0.06, 0.4)
        grey = int(rng.integers(85, 135))
        wall = (grey, grey, grey + 12)
        draw.rectangle((x * size, top * size, (x + 0.14) * size, size), fill=wall)
        for row in np.arange(top + 0.04, 0.95, 0.085):
            for column in (0.02, 0.08):
                left = (x + column) * size
                draw.rectangle(
                    (left, row * size, left + 0.036 * size, (row + 0.04) * size),
                    fill=(250, 230, 130),
                )


def _mountain(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (165, 200, 240)), (0.75, (238, 243, 250))])
    for i in range(7):
        x, top = i / 3, rng.uniform(0.1, 0.3)
        draw.polygon(
            [
                ((x - 0.34) * size, 0.8 * size),
                (x * size, top * size),
                ((x + 0.34) * size, 0.8 * size),
            ],
            fill=(92, 102, 125),
        )
        cut = (0.8 - top) * 0.34
        wide = 0.34 * 0.34
        draw.polygon(
            [
                ((x - wide) * size, (top + cut) * size),
                (x * size, top * size),
                ((x + wide) * size, (top + cut) * size),
            ],
            fill=(248, 250, 255),
        )


def _night(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (14, 16, 48)), (0.85, (8, 8, 22))])
    for x in (0.16, 0.84, 1.16, 1.84):
        draw.ellipse(_disc(x, 0.15, 0.08, size), fill=(245, 240, 210))
    for _ in range(110):
        x, y, r = rng.uniform(0, 2), rng.uniform(0, 0.85), rng.uniform(0.006, 0.013)
        draw.ellipse(_disc(x, y, r, size), fill=(250, 250, 255))


def _desert(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (250, 190, 110))])
    xs = np.linspace(0, 2, 60)
    for level, colour in ((0.30, (225, 140, 60)), (0.52, (200, 110, 45)), (0.74, (170, 85, 35))):
        wave = level + 0.07 * np.sin(xs * 5 + level * 9)
        points = [(x * size, y * size) for x, y in zip(xs, wave, strict=True)]
        draw.polygon([(0, size), *points, (2 * size, size)], fill=colour)


def _library(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (70, 42, 26))])
    books: list[Colour] = [(150, 40, 40), (40, 80, 60), (50, 60, 120), (190, 150, 80), (90, 50, 90)]
    for shelf in range(4):
        x = 0.0
        while x < 2:
            wide, tall = rng.uniform(0.035, 0.07), rng.uniform(0.14, 0.2)
            bottom = shelf * 0.25 + 0.225
            draw.rectangle(
                (x * size, (bottom - tall) * size, (x + wide) * size - 2, bottom * size),
                fill=books[int(rng.integers(len(books)))],
            )
            x += wide


def _garden(draw: ImageDraw.ImageDraw, size: float, rng: np.random.Generator) -> None:
    _bands(draw, size, [(0, (190, 230, 250)), (0.22, (130, 200, 90))])
    petals: list[Colour] = [(240, 90, 150), (250, 250, 250), (250, 210, 60), (220, 60, 70)]
    for i in range(70):
        x, y = (i + rng.uniform(0, 1)) / 35, rng.uniform(0.26, 0.98)
        colour = petals[int(rng.integers(len(petals)))]
        draw.ellipse(_disc(x, y, 0.034, size), fill=colour)
        draw.ellipse(_disc(x, y, 0.012, size), fill=(120, 70, 30))


def _disc(x: float, y: float, r: float, size: float) -> tuple[float, float, float, float]:
    return ((x - r) * size, (y - r) * size, (x + r) * size, (y + r) * size)


_SCENES = (_beach, _forest, _city, _mountain, _night, _desert, _library, _garden)


def _light(size: int, side: float, brightness: float) -> NDArray[np.float32]:
    ramp = 1.0 + 0.16 * side * np.linspace(-1, 1, size, dtype=np.float32)
    columns: NDArray[np.float32] = (ramp * np.float32(brightness))[None, :, None]
    return columns


_LUMA = np.array([0.30, 0.59, 0.11], dtype=np.float32)


def _edges(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    edge = np.zeros_like(grey)
    # Differences over two pixels: lines are wide enough to survive an 8x autoencoder.
    edge[:, 1:-1] = np.abs(grey[:, 2:] - grey[:, :-2])
    edge[1:-1] += np.abs(grey[2:] - grey[:-2])
    return edge


def _photo(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    return rgb


def _sketch(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    grey = rgb @ _LUMA
    paper = 0.62 + 0.36 * grey - 1.0 * _edges(grey)
    return paper[..., None] * np.array([1.0, 1.0, 0.98], dtype=np.float32)


def _sepia(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    grey = (rgb @ _LUMA)[..., None]
    dark = np.array([0.20, 0.11, 0.04], dtype=np.float32)
    pale = np.array([1.0, 0.90, 0.70], dtype=np.float32)
    return dark + (pale - dark) * grey


def _neon(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    grey = rgb @ _LUMA
    size = grey.shape[0]
    glow = np.minimum(1.6 * _edges(grey), 1.0)[..., None]
    height = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    magenta = np.array([1.0, 0.15, 0.75], dtype=np.float32)
    cyan = np.array([0.1, 0.95, 1.0], dtype=np.float32)
    base = np.array([0.06, 0.01, 0.16], dtype=np.float32)
    fill = np.array([0.42, 0.10, 0.72], dtype=np.float32)
    lines: NDArray[np.float32] = glow * (cyan + (magenta - cyan) * height)
    return base + grey[..., None] * fill + lines


_STYLERS = (_photo, _sketch, _sepia, _neon)
