"""Captions of portraits in ordinary words, with paraphrases, and the way back.

A caption names style, expression, accessory and background, each in one of several wordings, and
sometimes describes the person, as captions of real photos do. `parse` reads the attributes back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .portraits import ATTRIBUTE_VALUES, Attributes, Identity

EMPTY = ""  # the caption of unconditional training and of a plain negative prompt

_SUBJECTS = ("a person", "someone", "a man", "a woman")

_STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a photograph of", "a color photo of"),
    "sketch": ("a pencil sketch of", "a drawing of", "a sketch of"),
    "sepia": ("a sepia photo of", "an old sepia picture of", "a vintage photo of"),
    "neon": ("a neon picture of", "a glowing neon portrait of", "neon art of"),
}
_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "neutral": ("with a calm face", "looking serious", "with a neutral expression"),
    "smile": ("smiling", "with a big smile", "laughing", "looking happy"),
    "surprise": ("surprised", "with an open mouth", "looking amazed", "shocked"),
}
_ACCESSORIES: dict[str, tuple[str, ...]] = {
    "glasses": ("wearing glasses", "with round glasses", "in spectacles"),
    "hat": ("wearing a hat", "with a hat", "in a round hat"),
    "scarf": ("wearing a scarf", "with a warm scarf", "in a thick scarf"),
}
_BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "at the beach", "by the sea"),
    "forest": ("in a forest", "among the trees", "in the woods"),
    "city": ("in a city", "on a city street", "in front of tall buildings"),
    "mountain": ("in the mountains", "in front of a snowy mountain", "in the snow"),
    "night": ("at night", "under the stars", "under the night sky"),
    "desert": ("in the desert", "among sand dunes", "in a hot desert"),
    "library": ("in a library", "in front of a bookshelf", "among books"),
    "garden": ("in a garden", "among flowers", "in a flower garden"),
}
_WORDINGS = {
    "background": _BACKGROUNDS,
    "style": _STYLES,
    "expression": _EXPRESSIONS,
    "accessory": _ACCESSORIES,
}

# Low and high wording of each trait; the middle is left unsaid.
_TRAITS: dict[str, tuple[str, str]] = {
    "skin": ("pale skin", "dark skin"),
    "hair_light": ("black hair", "blond hair"),
    "hair_red": ("plain hair", "red hair"),
    "hair_length": ("short hair", "long hair"),
    "fringe": ("bare forehead", "low fringe"),
    "face_width": ("narrow face", "wide face"),
    "jaw": ("pointed chin", "square jaw"),
    "eye_spacing": ("close set eyes", "wide set eyes"),
    "eye_size": ("small eyes", "big eyes"),
    "brows": ("thin eyebrows", "thick eyebrows"),
    "nose": ("small nose", "big nose"),
    "mouth": ("small mouth", "wide mouth"),
}


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How talkative captions are; each a probability."""

    mention: float = 0.93
    """That an attribute other than a plain face and no accessory is named."""
    plain: float = 0.5
    """That a plain face is named."""
    describe: float = 0.6
    """That the person is described at all."""
    trait: float = 0.5
    """That a described person's clear trait is named."""


def caption(
    attributes: Attributes,
    rng: np.random.Generator,
    identity: Identity | None = None,
    options: CaptionOptions | None = None,
) -> str:
    """A caption of a portrait; with `identity` it may describe the person."""
    options = options or CaptionOptions()
    names = attributes.names()
    style = names["style"] if rng.random() < options.mention else ""
    opening = _pick(rng, _STYLES[style]) if style else "a picture of"
    parts = [_pick(rng, _SUBJECTS)]
    if identity is not None and rng.random() < options.describe:
        parts += described(identity, rng, options.trait)
    chance = options.plain if names["expression"] == "neutral" else options.mention
    tail = []
    if rng.random() < chance:
        tail.append(_pick(rng, _EXPRESSIONS[names["expression"]]))
    if names["accessory"] != "none" and rng.random() < options.mention:
        tail.append(_pick(rng, _ACCESSORIES[names["accessory"]]))
    if rng.random() < options.mention:
        tail.append(_pick(rng, _BACKGROUNDS[names["background"]]))
    rng.shuffle(tail)
    return f"{opening} {_join(parts, tail)}"


def plain_caption(attributes: Attributes) -> str:
    """The first wording of everything: the prompt of evaluations."""
    names = attributes.names()
    tail = [_EXPRESSIONS[names["expression"]][0]]
    if names["accessory"] != "none":
        tail.append(_ACCESSORIES[names["accessory"]][0])
    tail.append(_BACKGROUNDS[names["background"]][0])
    return f"{_STYLES[names['style']][0]} {_join(['a person'], tail)}"


def described(identity: Identity, rng: np.random.Generator, chance: float = 1.0) -> list[str]:
    """Phrases such as "very dark skin" for the traits that are clear, in random order."""
    phrases = []
    for name, (low, high) in _TRAITS.items():
        value = getattr(identity, name)
        strength = abs(value - 0.5)
        if strength < 0.12 or rng.random() >= chance:
            continue
        phrase = low if value < 0.5 else high
        phrases.append(f"very {phrase}" if strength > 0.38 else phrase)
    rng.shuffle(phrases)
    return phrases


def parse(text: str) -> dict[str, str]:
    """The attributes a caption names, by the words that only they use; unnamed ones are absent."""
    found: dict[str, str] = {}
    for attribute, wordings in _WORDINGS.items():
        for value, phrases in wordings.items():
            if any(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in phrases):
                found[attribute] = value
    if found.get("style") == "photo" and re.search(r"\b(sepia|vintage)\b", text):
        found["style"] = "sepia"
    return found


def attributes_of(text: str) -> dict[str, int]:
    """`parse` as indices into `portraits.ATTRIBUTE_VALUES`."""
    return {name: ATTRIBUTE_VALUES[name].index(value) for name, value in parse(text).items()}


def all_phrases() -> Iterator[str]:
    """Every phrase captions are made of: the vocabulary of the text encoders."""
    yield from ("a picture of", "a portrait of", "very", "and", "with", ",", ".", *_SUBJECTS)
    for wordings in _WORDINGS.values():
        for phrases in wordings.values():
            yield from phrases
    for pair in _TRAITS.values():
        yield from pair


def _join(subject: list[str], tail: list[str]) -> str:
    person = subject[0]
    if len(subject) > 1:
        person += " with " + ", ".join(subject[1:])
        return ", ".join([person, *tail])
    return " ".join([person, *tail])


def _pick(rng: np.random.Generator, wordings: tuple[str, ...]) -> str:
    return wordings[int(rng.integers(len(wordings)))]
