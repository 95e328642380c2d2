"""What published adapters read of a photo: names of features, encoders, and ways of cutting."""

from __future__ import annotations

from .face_clip import CLIP_TOKENS, FACE, FACE_WIDTH
from .features import NORMED, RAW, Reading

PROJECTED = "projected"
POOLED = "pooled"
"""The image encoder's projected class token."""
EVA, EVA_LEVELS = "eva", "eva_levels"
"""PuLID's image encoder: its head's output, and its hidden states at five depths."""

VIT_H, VIT_BIGG = "ViT-H-14", "ViT-bigG-14"
EVA_CLIP = "EVA02-L-14-336"
BUFFALO, ANTELOPE = "buffalo_l/w600k_r50", "antelopev2/glintr100"

ARCFACE = "arcface"
"""The face upright, as tightly as a recogniser is given it (insightface's ``norm_crop``)."""
WHOLE = "whole picture"
PULID_CUT = "pulid"
"""PuLID's own: a larger crop in grey, its background white where that can be found."""

STATE_ENCODERS = {1280: VIT_H, 1664: VIT_BIGG}
"""Image encoders by the width of their hidden states."""
POOLED_ENCODERS = {1280: VIT_BIGG, 1024: VIT_H}
"""Image encoders by the width of their projected class token."""

EVA_BLOCKS = (4, 8, 12, 16, 20)
"""The blocks, from 0, before which PuLID takes the hidden states."""
EVA_TOKENS = 577


def face_reading(recogniser: str, *, normed: bool) -> Reading:
    """A recogniser's embedding."""
    return Reading(model=recogniser, output=NORMED if normed else RAW, shape=(FACE_WIDTH,))


def states_reading(encoder: str, width: int, cut: str) -> Reading:
    """257 hidden states, one block before the last, class token first, no final norm."""
    return Reading(model=encoder, output="penultimate", shape=(CLIP_TOKENS, width), cut=cut)


def pooled_reading(encoder: str, width: int, cut: str) -> Reading:
    """The class token after the final norm and the projection to the texts' space."""
    return Reading(model=encoder, output=PROJECTED, shape=(width,), cut=cut)


def pulid_readings(recogniser: str, eva_width: int, level_width: int) -> dict[str, Reading]:
    """What both versions of PuLID read; the head's output has unit length."""
    levels = "entering blocks " + ", ".join(map(str, EVA_BLOCKS))
    shape = (len(EVA_BLOCKS), EVA_TOKENS, level_width)
    return {
        FACE: face_reading(recogniser, normed=False),
        EVA: Reading(model=EVA_CLIP, output=NORMED, shape=(eva_width,), cut=PULID_CUT),
        EVA_LEVELS: Reading(model=EVA_CLIP, output=levels, shape=shape, cut=PULID_CUT),
    }
